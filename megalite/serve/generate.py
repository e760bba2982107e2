"""`megalite generate RUN PROMPT`: go on from a prompt with a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path

from megalite.data.chat import Message, Template
from megalite.serve.model import opened
from megalite.serve.talk_args import GenerateArgs

AT_ONCE = 16
"""Texts that are made at the same time."""


def generate(args: GenerateArgs) -> None:
    """Print `num_samples` texts; a single one as it comes."""
    with opened(Path(args.checkpoint), args, slots=min(args.num_samples, AT_ONCE)) as model:
        tokenizer = model.tokenizer
        ids, end, before = tokenizer.encode(args.prompt), tokenizer.eod, args.prompt
        if args.chat:
            template = Template(tokenizer)
            ids, end, before = (
                template.prompt([Message("user", args.prompt)]),
                template.end,
                "",
            )
        if args.num_samples == 1:
            print(before, end="", flush=True)
            for _, piece in model.texts(ids, args, end=end):
                print(piece, end="", flush=True)
            print()
            return
        made = [before] * args.num_samples
        for number, piece in model.texts(ids, args, end=end, count=args.num_samples):
            made[number] += piece
        for number, text in enumerate(made, start=1):
            print(f"--- {number} of {args.num_samples}")
            print(text)
