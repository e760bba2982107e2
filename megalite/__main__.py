"""The front door: `megalite <verb> ...`, one table of verbs and one place where errors are printed.

The rooms behind a verb are imported once its arguments are read, so that --help is quick. This file
reads argv and the environment and passes the values down. What a verb does: see its row.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import megalite
from megalite.core.errors import RunError, UserError

INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
SPEAK_SECONDS = 20.0  # a slow start of the first rank; it is ended as soon as that one has spoken
DPO_BETA = 0.1
PIPE_CLOSED = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Verb:
    """What a verb reads and what it calls, each as `module:name`."""

    about: str
    schema: str
    function: str


VERBS: dict[str, Verb] = {
    "corpus": Verb(
        about="collect the default corpus from this machine's own Python library",
        schema="megalite.data.corpus:CorpusArgs",
        function="megalite.data.corpus:build_corpus",
    ),
    "conversations": Verb(
        about="make the default questions and answers to fine-tune on",
        schema="megalite.data.questions:ConversationsArgs",
        function="megalite.data.questions:build_conversations",
    ),
    "tokenizer train": Verb(
        about="learn a byte-level BPE vocabulary from text",
        schema="megalite.data.bpe:TokenizerTrainArgs",
        function="megalite.data.bpe:train_tokenizer",
    ),
    "tokenizer show": Verb(
        about="show how a tokenizer cuts a text",
        schema="megalite.data.tokenizer:TokenizerShowArgs",
        function="megalite.data.tokenizer:show_tokenizer",
    ),
    "preprocess": Verb(
        about="turn text into the indexed tokens that training reads",
        schema="megalite.data.preprocess:PreprocessArgs",
        function="megalite.data.preprocess:preprocess",
    ),
    "pretrain": Verb(
        about="train a model, under torchrun where the layout has more than one rank",
        schema="megalite.core.config:Config",
        function="megalite.train.pretrain:pretrain",
    ),
    "sft": Verb(
        about="fine-tune a trained model on conversations, under torchrun like pretrain",
        schema="megalite.core.config:Config",
        function="megalite.train.pretrain:pretrain",
    ),
    "dpo": Verb(
        about="teach a model which of two answers is preferred, under torchrun like pretrain",
        schema="megalite.core.config:Config",
        function="megalite.train.pretrain:pretrain",
    ),
    "verify": Verb(
        about="show that a layout, or many drawn ones, computes what one process computes",
        schema="megalite.train.verify_args:VerifyRun",
        function="megalite.train.verify_command:verify",
    ),
    "inspect": Verb(
        about="show what a checkpoint, a dataset or a tokenizer holds",
        schema="megalite.checkpoint.inspect:InspectArgs",
        function="megalite.checkpoint.inspect:inspect",
    ),
    "convert one-file": Verb(
        about="write a checkpoint's weights into one safetensors file",
        schema="megalite.train.convert:OneFileArgs",
        function="megalite.train.convert:one_file",
    ),
    "convert merge-lora": Verb(
        about="make adapters a part of the weights beside them, in a new run",
        schema="megalite.train.merge:MergeArgs",
        function="megalite.train.merge:merge_lora",
    ),
    "generate": Verb(
        about="go on from a prompt with a trained model",
        schema="megalite.serve.talk_args:GenerateArgs",
        function="megalite.serve.generate:generate",
    ),
    "chat": Verb(
        about="talk with a fine-tuned model in the terminal",
        schema="megalite.serve.talk_args:ChatArgs",
        function="megalite.serve.chat:chat",
    ),
    "serve": Verb(
        about="serve a model to OpenAI's clients and to a page",
        schema="megalite.serve.serve_args:ServeArgs",
        function="megalite.serve.server:serve",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; an error is one line, printed once a host."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv), os.environ)
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(f"megalite: error: {error}")
        _let_the_first_rank_speak()
        return error.exit_code
    except KeyboardInterrupt:
        _complain("megalite: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more; without this the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"megalite: error: {error.filename}: {error.strerror}")
        return RunError.exit_code


def _complain(text: str) -> None:
    """Print one line, on the first rank of each host alone: the others would say the same."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", ""))
    if not local_rank.isdigit() or int(local_rank) == 0:
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)


def _let_the_first_rank_speak() -> None:
    """Wait, on any but a host's first rank: torchrun ends all ranks as soon as one has ended."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(SPEAK_SECONDS)


def _run(argv: list[str], environment: Mapping[str, str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else UserError.exit_code
    if argv[0] == "--version":
        print(f"megalite {megalite.__version__}")
        return 0
    name, rest = _split(argv)
    if VERBS[name].function == VERBS["pretrain"].function:
        return _train(name, rest, environment)
    from megalite.core.cli import parse
    from megalite.models.presets import PRESETS
    from megalite.train.recipes import RECIPES

    verb = VERBS[name]
    schema = _load(verb.schema)
    args = parse(rest, schema, models=PRESETS, recipes=RECIPES, prog=f"megalite {name}")
    if name in ("corpus", "conversations") and not args.stdlib:
        args = dataclasses.replace(args, stdlib=sysconfig.get_path("stdlib"))
    if (size := environment.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"{name}: is one process, but WORLD_SIZE={size} (run it without torchrun)")
    code = _load(verb.function)(args)
    return code if name == "verify" else 0


def _train(name: str, argv: list[str], environment: Mapping[str, str]) -> int:
    """A verb that trains: on text, on conversations, or on pairs of answers."""
    from megalite.core.check import check_paths
    from megalite.core.cli import parse
    from megalite.core.config import Config
    from megalite.core.world import World
    from megalite.models.presets import PRESETS
    from megalite.train.recipes import RECIPES

    config = parse(argv, Config, models=PRESETS, recipes=RECIPES, prog=f"megalite {name}")
    config = _config_for(name, config)
    world = World.from_environment(environment)
    layout = config.layout
    needed = layout.tp * layout.pp * layout.cp * (layout.dp or 1)
    size = world.size if world.launched else needed
    if config.train.dry_run:
        size = config.train.world or size
    config.check(size)
    check_paths(config)
    if config.train.dry_run:
        if world.rank == 0:
            _load("megalite.plan.dry_run:dry_run")(config, size)
        return 0
    if needed > 1 and not world.launched:
        _say_how_to_launch(needed, [name, *argv])
        return UserError.exit_code
    explain = _load("megalite.plan.out_of_memory:explain")
    _load(VERBS[name].function)(config, world, explain)
    return 0


def _config_for(name: str, config: Any) -> Any:
    """The config of a verb that trains. Raises UserError where it is another one's."""
    data = config.data
    if data.talks != (name != "pretrain"):
        other = "sft" if data.talks else "pretrain"
        of = {"sft": "conversations", "dpo": "pairs of answers"}.get(name)
        fix = f"name a .jsonl file of {of}, or" if of else "preprocess it, or"
        raise UserError(f"--data {data.data}: not for {name} ({fix} use megalite {other})")
    if name == "dpo" and not data.prefers:
        return dataclasses.replace(config, data=dataclasses.replace(data, dpo_beta=DPO_BETA))
    if name != "dpo" and data.prefers:
        raise UserError(f"--dpo-beta {data.dpo_beta:g}: not for {name} (use megalite dpo)")
    return config


def _say_how_to_launch(ranks: int, argv: Sequence[str]) -> None:
    command = shlex.join(argv)
    _complain(
        f"megalite: error: the layout needs {ranks} ranks, and this is one process; run one of"
    )
    _complain(f"  examples/launch.sh {ranks} {command}")
    _complain(f"  torchrun --standalone --nproc-per-node {ranks} -m megalite {command}")


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and what follows it."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in VERBS:
            return name, argv[words:]
    seconds = [name.split()[1] for name in VERBS if name.startswith(argv[0] + " ")]
    if seconds:
        found = f"unknown {argv[0]} verb {argv[1]!r}; " if len(argv) > 1 else ""
        raise UserError(f"{argv[0]}: {found}use {argv[0]} {' or '.join(seconds)}")
    from megalite.core.check_values import unknown

    raise UserError(unknown("verb", argv[0], dict.fromkeys(name.split()[0] for name in VERBS)))


def _overview() -> str:
    width = max(len(name) for name in VERBS)
    rows = [f"  {name:{width}}  {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: megalite VERB ...   (megalite VERB --help lists what it takes)",
            "",
            *rows,
            "",
            "  --version, --help",
        ]
    )


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _leave() -> None:
    """Run, and end this process with the exit code of the command.

    The threads of process groups can abort an interpreter that shuts down around them (exit code -6
    in place of ours, seen with gloo): under torchrun nothing is left that needs the shutdown.
    """
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else RunError.exit_code
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave()
