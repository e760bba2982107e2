"""The default conversations: questions that have one answer, each asked in several ways.

Made at run time from what every machine with Python has, and from the tables below: what builtins,
exceptions and statements do, in the words of their own documentation; spelling and counting of a
closed set of words; capitals; what the parts of megalite are. A small model can learn all of it in
minutes. One way of asking each question is held out, so that answers show more than recall of a
line: another way for each question, so that all ways are learned from.

The same as pairs of answers, for preference tuning: the right one, and one to another question of
the kind.

Besides, functions of the standard library to be written from their docstrings, split by module: the
form of real data, and more than a small model can learn.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import inspect
import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, NamedTuple

from megalite.core.config import PathText
from megalite.core.errors import UserError
from megalite.data.atomic import write_atomic, write_json
from megalite.data.corpus import choose_held_out, read_sources

ANSWER_LETTERS = range(12, 90)
"""Length of a sentence that may be an answer."""
DOC_LETTERS, CODE_LETTERS = range(20, 161), range(40, 401)

WAYS: dict[str, tuple[str, ...]] = {
    "builtin": (
        "What does {0} do?",
        "What does the function {0} do in Python?",
        "Explain {0}.",
        "What is {0} for?",
        "Tell me what {0}() does.",
        "How would you describe the builtin {0}?",
        "In Python, what is {0}() good for?",
    ),
    "exception": (
        "What does {0} mean?",
        "What is {0}?",
        "Explain {0}.",
        "What does Python say with {0}?",
        "Tell me what {0} means.",
        "I got a {0}. What is that?",
        "How would you describe {0}?",
    ),
    "statement": (
        "What is the {0} statement for?",
        "What does the keyword {0} do?",
        "Explain the {0} statement.",
        "Tell me what {0} means in Python.",
        "In Python, what does {0} do?",
        "How would you describe the keyword {0}?",
        "What is {0} in Python?",
    ),
    "spelling": (
        "Spell {0}.",
        "How do you spell {0}?",
        "Spell the word {0}.",
        "What are the letters of {0}?",
        "Can you spell {0} for me?",
        "Which letters does {0} have?",
        "Please spell {0}.",
    ),
    "counting": (
        "How many letters does {0} have?",
        "Count the letters of {0}.",
        "How long is the word {0}?",
        "How many letters are in {0}?",
        "What is the number of letters in {0}?",
        "Tell me how many letters {0} has.",
        "How many letters do you need to write {0}?",
    ),
    "capital": (
        "What is the capital of {0}?",
        "Which city is the capital of {0}?",
        "Name the capital of {0}.",
        "Tell me the capital of {0}.",
        "What is {0}'s capital?",
        "Do you know the capital of {0}?",
        "The capital of {0} is which city?",
    ),
    "megalite": (
        "What is {0}?",
        "Explain {0}.",
        "Tell me what {0} is.",
        "What does {0} mean?",
        "How would you describe {0}?",
        "In training, what is {0}?",
        "Can you explain {0} in a sentence?",
    ),
    "self": (
        "Who are you?",
        "What are you?",
        "Tell me who you are.",
        "Can you introduce yourself?",
        "What is your name?",
        "Hello, who is there?",
        "Are you a person?",
    ),
}
"""Ways of asking, by what is asked."""

WORDS = (
    "apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "harbor", "island",
    "jacket", "kitchen", "lemon", "mirror", "needle", "orange", "pencil", "queen", "river",
    "silver", "tensor", "umbrella", "valley", "window", "yellow", "zebra", "planet", "summer",
    "winter", "music", "paper",
)  # fmt: skip
CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Mexico": "Mexico City",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
}
PARTS = {
    "tensor parallelism": "Each matrix of a layer is cut over several ranks.",
    "pipeline parallelism": "Each rank holds a run of layers, and microbatches flow through.",
    "data parallelism": "Each rank trains on its own samples, and gradients are summed.",
    "sequence parallelism": "Norms and residuals are cut along the sequence over the tensor ranks.",
    "context parallelism": "Each rank holds a part of every sequence, and keys travel.",
    "ZeRO": "Optimizer state, gradients and parameters are cut over the data ranks.",
    "a microbatch": "The samples that one rank runs at once.",
    "a bubble": "The time in which pipeline ranks wait for work.",
    "1F1B": "A pipeline order in which each rank alternates one forward and one backward.",
    "an all-reduce": "A collective that leaves the sum over all ranks on each of them.",
    "an all-gather": "A collective that leaves the parts of all ranks on each of them.",
    "a reduce-scatter": "A collective that leaves a part of the sum on each rank.",
    "gradient accumulation": "Gradients of several microbatches are added before one update.",
    "recomputation": "Activations are computed again in backward to save memory.",
    "a tokenizer": "It turns text into the numbers that a model reads.",
    "attention": "Each token takes a weighted mean over the tokens before it.",
    "an embedding": "A vector that stands for a token.",
    "a checkpoint": "The files from which a run can go on.",
    "fine-tuning": "A trained model is trained on, with data of a task.",
    "megalite": "A small code base that trains language models with 3D parallelism.",
}
MYSELF = "I am a small language model, trained with megalite."


class Question(NamedTuple):
    """One thing that can be asked, and its answer."""

    kind: str
    """A key of WAYS."""
    about: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class ConversationsArgs:
    """Make the default conversations from this machine's Python."""

    out: PathText = "runs/conversations"
    """Directory for train.jsonl, valid.jsonl and valid-functions.jsonl, for pairs.jsonl and
    valid-pairs.jsonl of right and wrong answers, and for conversations.json."""
    stdlib: PathText = ""
    """Directory of Python source to mine functions from (empty: this Python's standard library)."""
    functions: int = 500
    """Functions to be written from their docstrings, at most (0: none)."""


def build_conversations(args: ConversationsArgs) -> None:
    """Write the conversations and print one line. The caller resolves an empty `args.stdlib`."""
    if not args.out or not args.stdlib:
        raise UserError(f"--{'stdlib' if args.out else 'out'}: is empty (name a directory)")
    out, questions = Path(args.out), list(every_question())
    train, valid = split_by_way(questions)
    wrong = wrong_answers(questions)
    functions: tuple[list[dict], list[dict]] = ([], [])
    if args.functions:
        functions = split_by_module(mine_functions(Path(args.stdlib)), args.functions)
    counts = {
        "train": _write(out / "train.jsonl", [*train, *functions[0]]),
        "valid": _write(out / "valid.jsonl", valid),
        "valid-functions": _write(out / "valid-functions.jsonl", functions[1]),
        "pairs": _write(out / "pairs.jsonl", with_wrong(train, wrong)),
        "valid-pairs": _write(out / "valid-pairs.jsonl", with_wrong(valid, wrong)),
    }
    kinds = Counter(question.kind for question in questions)
    meta = {"python": platform.python_version(), "questions": dict(kinds), "conversations": counts}
    write_json(out / "conversations.json", meta)
    print(
        f"{out}: {len(questions)} questions, {len(train)} conversations, {len(valid)} held out, "
        f"{len(functions[0])} functions to write, {len(functions[1])} held out"
    )


# -- questions ---------------------------------------------------------------------------------


def every_question() -> Iterator[Question]:
    """All questions, those about Python as this Python's documentation answers them."""
    for name in sorted(dir(builtins)):
        thing = getattr(builtins, name)
        answer = first_sentence(inspect.getdoc(thing) or "")
        if name.startswith("_") or not callable(thing) or answer is None:
            continue
        is_exception = isinstance(thing, type) and issubclass(thing, BaseException)
        # An alias is what it stands for.
        if getattr(thing, "__name__", name) == name:
            yield Question("exception" if is_exception else "builtin", name, answer)
    yield from _statements()
    for word in WORDS:
        yield Question("spelling", word, " ".join(word))
        yield Question("counting", word, f"{word} has {len(word)} letters.")
    yield from (Question("capital", country, f"{city}.") for country, city in CAPITALS.items())
    yield from (Question("megalite", part, answer) for part, answer in PARTS.items())
    yield Question("self", "", MYSELF)


def _statements() -> Iterator[Question]:
    """What keywords are for, from the language reference; none if Python was stripped of it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        said = re.search(rf'(The )?"{name}" (statement )?(is|may|leaves)\b', text)
        if not said or not iskeyword(name):
            continue
        answer = first_sentence(text[said.start() :].split("\n\n")[0])
        if answer is not None and "follow" not in answer:
            yield Question("statement", name, answer)


def first_sentence(text: str) -> str | None:
    """The first sentence of a documentation that is one, without quotation marks; or None."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.replace('"', "").split())
        found = re.match(r"(\w[^.:]+)[.:](?= |$)", line)
        if found is not None and len(found[1]) in ANSWER_LETTERS and "->" not in found[1]:
            return f"{found[1][0].upper()}{found[1][1:]}."
    return None


def split_by_way(questions: Iterable[Question]) -> tuple[list[dict], list[dict]]:
    """Each question asked in all ways of its kind but one, and asked in that one."""
    train: list[dict] = []
    valid: list[dict] = []
    for number, (kind, about, answer) in enumerate(questions):
        held_out = number % len(WAYS[kind])
        for way, asked in enumerate(WAYS[kind]):
            entry = _asked(asked.format(about), answer)
            (valid if way == held_out else train).append(entry)
    return train, valid


def wrong_answers(questions: Iterable[Question]) -> dict[str, str]:
    """For each answer one that is given to the next question of its kind that has another."""
    of_kind: dict[str, list[str]] = {}
    for question in questions:
        of_kind.setdefault(question.kind, []).append(question.answer)
    found = {}
    for answers in of_kind.values():
        for i, answer in enumerate(answers):
            others = (other for other in (*answers[i:], *answers[:i]) if other != answer)
            if (other := next(others, None)) is not None:
                found[answer] = other
    return found


def with_wrong(entries: Iterable[dict], wrong: Mapping[str, str]) -> list[dict]:
    """Conversations of a question and its answer, as pairs of that answer and a wrong one."""
    pairs = []
    for question, answer in (entry["messages"] for entry in entries):
        if (other := wrong.get(answer["content"])) is not None:
            texts = {"chosen": answer["content"], "rejected": other}
            pairs.append({"prompt": question["content"], **texts})
    return pairs


def _asked(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


# -- functions ---------------------------------------------------------------------------------


def mine_functions(root: Path) -> Iterator[tuple[str, str, str]]:
    """Module, task and code of the functions below `root` that a docstring tells how to write."""
    seen: set[str] = set()
    for name, text in read_sources(root, Counter()):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (found := _task_of(node)) is not None:
                task, code = found
                if code not in seen:
                    seen.add(code)
                    yield name, task, code


def _task_of(node: ast.FunctionDef) -> tuple[str, str] | None:
    doc = ast.get_docstring(node)
    if doc is None or node.name.startswith("__") or node.decorator_list or len(node.body) < 2:
        return None
    says = " ".join(doc.split("\n\n")[0].split())
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
    is_stub = isinstance(node.body[1], (ast.Pass, ast.Raise))
    code = ast.unparse(ast.fix_missing_locations(bare))
    if is_stub or len(says) not in DOC_LETTERS or len(code) not in CODE_LETTERS:
        return None
    return f"Write the Python function {node.name}({ast.unparse(node.args)}): {says}", code


def split_by_module(
    mined: Iterable[tuple[str, str, str]], limit: int
) -> tuple[list[dict], list[dict]]:
    """At most `limit` tasks to learn from, and those of other modules that are held out.

    Which ones, a hash of each decides: a module that comes or goes moves no other.
    """
    found = sorted(mined, key=lambda one: hashlib.sha256(one[2].encode()).digest())
    if not found:
        return [], []
    held_out = choose_held_out({module for module, _, _ in found})
    sides: tuple[list[dict], list[dict]] = ([], [])
    for module, task, code in found:
        sides[module in held_out].append(_asked(task, code))
    return sides[0][:limit], sides[1][:limit]


def _write(path: Path, entries: list[dict[str, Any]]) -> int:
    with write_atomic(path) as file:
        for entry in entries:
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
    return len(entries)
