"""The chapters of docs/guide as plain Markdown, with the code that they quote filled in.

A chapter is Markdown with three directives, each on a line of its own:

    {{ code FILE NAME }}           the source of a function, class or method, as it is now
    {{ figure NAME | CAPTION }}    a picture of figures.py
    {{ answer FILE NAME }}         the test that answers the exercise above it

A directive becomes a fenced block whose first word is `code`, `figure` or `answer`; html.py and
pdf.py know how to show them. Commands are the lines of blocks marked `sh`.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ROOT / "docs" / "guide"
DIRECTIVE = re.compile(r"\{\{ (\w+) (.*) \}\}")
FENCE = "````"


class GuideError(Exception):
    """What is wrong with a chapter, in one line that begins with its file and line."""


@dataclass(frozen=True)
class Directive:
    """One line of a chapter that is filled in."""

    kind: str
    words: str
    where: str
    """Its file and line, as errors begin."""


@dataclass(frozen=True)
class Command:
    """One command of a chapter, as a reader types it."""

    text: str
    where: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


@dataclass(frozen=True)
class Chapter:
    """One file of docs/guide."""

    path: Path

    @property
    def name(self) -> str:
        """What its page is called."""
        return self.path.stem

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()

    @property
    def title(self) -> str:
        """Its first heading, with its number, which is that of its file.

        Raises GuideError if it does not begin with one.
        """
        if not self.lines or not self.lines[0].startswith("# "):
            raise GuideError(f"{self._where(1)}: a chapter begins with a title (# ...)")
        number = self.name.partition("-")[0]
        return f"{int(number)}. {self.lines[0][2:]}" if number.isdigit() else self.lines[0][2:]

    def directives(self) -> Iterator[Directive]:
        """All of its directives, in order."""
        for number, line in enumerate(self.lines, start=1):
            if line.startswith("{{"):
                yield self._directive(number, line)

    def commands(self) -> Iterator[Command]:
        """Its commands, in order; one that ends with a backslash goes on in the next line."""
        inside, text, begun = False, "", 0
        for number, line in enumerate(self.lines, start=1):
            if line.startswith("```"):
                inside = line == "```sh"
                continue
            if not inside or not line.strip() or line.startswith("#"):
                continue
            begun = begun or number
            text += line.removesuffix("\\")
            if not line.endswith("\\"):
                yield Command(" ".join(text.split()), self._where(begun))
                text, begun = "", 0

    @property
    def markdown(self) -> str:
        """With every directive filled in. Raises GuideError for one that cannot be."""
        made = [f"# {self.title}"]
        for number, line in enumerate(self.lines[1:], start=2):
            made.append(filled_in(self._directive(number, line)) if line.startswith("{{") else line)
        return "\n".join(made) + "\n"

    def _directive(self, number: int, line: str) -> Directive:
        found = DIRECTIVE.fullmatch(line)
        if found is None or found[1] not in ("code", "figure", "answer"):
            raise GuideError(
                f"{self._where(number)}: {line}: expected {{{{ code FILE NAME }}}}, "
                "{{ figure NAME | CAPTION }} or {{ answer FILE NAME }}"
            )
        return Directive(found[1], found[2], self._where(number))

    def _where(self, number: int) -> str:
        return f"{self.path.name}:{number}"


def all_chapters(folder: Path = CHAPTERS) -> list[Chapter]:
    """In the order of their names; index.md, which comes before the first, is first."""
    found = [Chapter(path) for path in sorted(folder.glob("*.md"))]
    return sorted(found, key=lambda chapter: (chapter.name != "index", chapter.name))


def filled_in(directive: Directive) -> str:
    """The fenced block of a directive."""
    if directive.kind == "figure":
        name, bar, caption = directive.words.partition(" | ")
        if not bar:
            raise GuideError(f"{directive.where}: figure {name}: has no caption (NAME | CAPTION)")
        return f"{FENCE}figure {name}\n{caption}\n{FENCE}"
    file, _, name = directive.words.partition(" ")
    return f"{FENCE}{directive.kind} {file} {name}\n{source_of(file, name, directive.where)}{FENCE}"


def kind_of(info: str) -> list[str]:
    """The words that a fenced block begins with: its kind, and what it is of."""
    return info.split() or ["text"]


def source_of(file: str, name: str, where: str) -> str:
    """The source of `name` (Class.method, function, CONSTANT) in `file` of this repository.

    As it stands in the file, but moved to the left. Raises GuideError, beginning with `where`.
    """
    path = ROOT / file
    if not path.is_file():
        raise GuideError(f"{where}: no file {file}")
    text, tree = _parsed(path)
    found: ast.AST = tree
    for part in name.split("."):
        inside = {n: node for node in ast.iter_child_nodes(found) for n in _names(node)}
        if part not in inside:
            raise GuideError(f"{where}: {file} has no {name}")
        found = inside[part]
    assert isinstance(found, ast.stmt) and found.end_lineno is not None
    decorators = getattr(found, "decorator_list", [])
    first = min([found.lineno, *(node.lineno for node in decorators)])
    lines = text.splitlines()[first - 1 : found.end_lineno]
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines) + "\n"


@lru_cache
def _parsed(path: Path) -> tuple[str, ast.Module]:
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
