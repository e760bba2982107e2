"""The house rules: what may import what, and what may not be written at all. Reads source only.

A rule is a function from a file to its faults, a row of RULES says where it holds and which small
bad sources it must catch, so that a rule cannot rot. The rules' reasons: CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

FLOORS = {
    **dict.fromkeys(("ops", "schedule"), 0),
    **dict.fromkeys(("core",), 1),
    **dict.fromkeys(("layers", "parallel", "data"), 2),
    **dict.fromkeys(("models", "optim"), 3),
    **dict.fromkeys(("checkpoint",), 4),
    **dict.fromkeys(("generate",), 5),
    **dict.fromkeys(("train",), 6),
    **dict.fromkeys(("serve", "plan"), 7),
    **dict.fromkeys(("__main__", "examples", "tools"), 8),
}
ENVIRONMENT_FLOOR = 6
FRONT_DOOR = "megalite/__main__.py"
DISTRIBUTED_FILES = (
    "megalite/core/host_group.py",
    "megalite/core/comm.py",
    "megalite/core/mesh.py",
    "megalite/parallel/p2p.py",
)
ACC_DTYPE_FILE = "megalite/core/params.py"
TORCH_LOAD_FILE = "megalite/train/convert.py"
CONFIG_FILE = "megalite/core/config.py"

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
OBJECT_COLLECTIVE = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?$")
# Written in two halves, so that this file does not break its own rule.
MACHINE_PATH = re.compile(r"(?<![\w.])/" + r"(tmp|root|home|Users|work)/")


@dataclass(frozen=True)
class Source:
    """One file of the project: its path from the root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def room(self) -> str:
        """The folder or file under megalite/, or `examples`, `tools`; "" for the package itself."""
        parts = self.path.removesuffix(".py").split("/")
        if parts[0] != "megalite":
            return parts[0]
        return "" if parts[1:] == ["__init__"] else parts[1]

    @property
    def floor(self) -> int:
        return FLOORS.get(self.room, 0)

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(parse(self.text))

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call with the dotted name it calls, `?` where that is an expression."""
        for node in self.nodes():
            if isinstance(node, ast.Call):
                yield dotted(node.func), node


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; an expression in front becomes `?`, as in `?.float`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def imports(source: Source, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, relative imports resolved."""
    package = source.path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree or parse(source.text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_rooms(source: Source) -> Iterator[tuple[int, str]]:
    for line, name in imports(source):
        parts = name.split(".")
        if parts[0] in ("examples", "tools"):
            yield line, parts[0]
        elif parts[0] == "megalite" and len(parts) > 1 and not parts[1].startswith("__version"):
            yield line, parts[1]


Faults = Iterator[str]


def no_unknown_room(source: Source) -> Faults:
    if source.room and source.room not in FLOORS:
        yield f"room {source.room} stands on no floor"


def no_upward_import(source: Source) -> Faults:
    for line, room in imported_rooms(source):
        if FLOORS.get(room, 99) > source.floor:
            yield f"{line}: {source.room} (floor {source.floor}) imports {room}"


def no_import_of_a_neighbour(source: Source) -> Faults:
    for line, room in imported_rooms(source):
        if room != source.room and FLOORS.get(room) == source.floor:
            yield f"{line}: {source.room} imports {room}, a room of its own floor"


def no_import_inside_a_function(source: Source) -> Faults:
    if source.path == FRONT_DOOR:  # so that --help stays quick
        return
    for node in source.nodes():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for line, name in imports(source, node):
                if name.split(".")[0] == "megalite":
                    yield f"{line}: imports {name} inside a function"


def no_environment(source: Source) -> Faults:
    if source.floor >= ENVIRONMENT_FLOOR:
        return
    watched = {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv"}
    for node in source.nodes():
        if isinstance(node, ast.Attribute) and dotted(node) in watched:
            yield f"{node.lineno}: reads {dotted(node)} on floor {source.floor}"
    for line, name in imports(source):
        if name in watched:
            yield f"{line}: reads {name} on floor {source.floor}"


def no_global(source: Source) -> Faults:
    for node in source.nodes():
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}"


def no_long_file(source: Source) -> Faults:
    lines = len(source.text.splitlines())
    if lines > MAX_LINES:
        yield f"has {lines} lines, over {MAX_LINES}"


def no_side_door_to_collectives(source: Source) -> Faults:
    if source.path in DISTRIBUTED_FILES:
        return
    for line, name in imports(source):
        if name.startswith(("torch.distributed", "torch._C._distributed")):
            yield f"{line}: imports {name}"
    for node in source.nodes():
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield f"{node.lineno}: reaches into torch.distributed"


def no_code_from_data(source: Source) -> Faults:
    """Pickle, eval and exec: a file or a message that is read must not be able to run code."""
    for line, name in imports(source):
        if name.split(".")[0] in UNPICKLERS or name in ("torch.load", "builtins.eval"):
            yield f"{line}: imports {name}"
    for name, call in source.calls():
        if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield f"{call.lineno}: calls {name}"
        words = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if words.get("allow_pickle", False) is not False:
            yield f"{call.lineno}: allow_pickle"
        safe = source.path == TORCH_LOAD_FILE and words.get("weights_only") is True
        if name == "torch.load" and not safe:
            yield f"{call.lineno}: calls torch.load"
        if OBJECT_COLLECTIVE.search(name.split(".")[-1]):
            yield f"{call.lineno}: calls {name}, which pickles"


def no_float_call(source: Source) -> Faults:
    if source.path == ACC_DTYPE_FILE:
        return
    for name, call in source.calls():
        if name.endswith(".float"):
            yield f"{call.lineno}: calls .float() (core/params.py: acc_dtype keeps float64)"


def no_machine_path(source: Source) -> Faults:
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := MACHINE_PATH.search(line):
            yield f"{number}: names a path of one machine, {found[0]}"


def no_letter_outside_ascii(source: Source) -> Faults:
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield f"{number}: {ascii(line.strip())}"


def no_field_name_twice(source: Source) -> Faults:
    """A field is a flag, and flags are flat: its name must be unique over all groups."""
    seen: dict[str, str] = {}
    for node in parse(source.text).body:
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    first = seen.setdefault(item.target.id, node.name)
                    if first != node.name:
                        yield f"{item.lineno}: {item.target.id} is in {first} and {node.name}"


LIBRARY = ("megalite/**/*.py",)
OURS = (*LIBRARY, "examples/**/*.py", "tools/**/*.py")
PYTHON = (*OURS, "tests/**/*.py", "kernels/**/*.py")
TEXT_FOLDERS = ("megalite", "examples", "tools", "tests", "kernels", "docs", ".ci")
BINARY = {".png", ".so"}
# In a linked work tree .git is a file that says where the repository is.
NOT_OURS = {"__pycache__", ".git"}
TEXT = ("*.*", "Makefile", "LICENSE", *(f"{folder}/**/*" for folder in TEXT_FOLDERS))


@dataclass(frozen=True)
class Rule:
    """Where a rule holds, and (path, source) pairs that it must catch and must let pass."""

    holds_for: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    good: tuple[tuple[str, str], ...] = ()


LAYER = "megalite/layers/x.py"
RULES: dict[Callable[[Source], Faults], Rule] = {
    no_unknown_room: Rule(
        LIBRARY,
        bad=(("megalite/utils.py", ""), ("megalite/helpers/x.py", "")),
        good=(("megalite/__init__.py", ""), (FRONT_DOOR, "")),
    ),
    no_upward_import: Rule(
        OURS,
        bad=(
            (LAYER, "from megalite.models.gpt import GPT"),
            (LAYER, "from megalite import models"),
            (LAYER, "import megalite.train.loop as loop"),
            (LAYER, "from ..optim import lr"),
            (LAYER, "def f():\n    from megalite.train import loop"),
            ("megalite/ops/x.py", "from megalite.core.mesh import Axis"),
            ("megalite/schedule/x.py", "if TYPE_CHECKING:\n    from megalite.core import config"),
            ("megalite/serve/x.py", "import megalite.__main__"),
            ("megalite/core/x.py", "import tools.bench_train"),
            ("megalite/core/x.py", "from megalite.nowhere import x"),
        ),
        good=(
            (LAYER, "from megalite.core.mesh import Axis\nfrom . import norm\nimport torch"),
            ("megalite/train/x.py", "from megalite import __version__"),
        ),
    ),
    no_import_of_a_neighbour: Rule(
        OURS,
        bad=(
            (LAYER, "from megalite.parallel.zero import Zero"),
            (LAYER, "from ..data import loader"),
            ("megalite/schedule/x.py", "import megalite.ops.gelu"),
            ("tools/x.py", "from megalite.__main__ import main"),
        ),
        good=((LAYER, "from megalite.layers.norm import RMSNorm"),),
    ),
    no_import_inside_a_function: Rule(
        OURS,
        bad=(
            (LAYER, "def f():\n    from megalite.core import comm"),
            (LAYER, "class A:\n    async def f(self):\n        import megalite.core.comm"),
        ),
        good=(
            (LAYER, "def f():\n    import torch"),
            (FRONT_DOOR, "def f():\n    import megalite.core"),
        ),
    ),
    no_environment: Rule(
        LIBRARY,
        bad=(
            (LAYER, "import os\nx = os.environ['RANK']"),
            (LAYER, "import os\nx = os.getenv('RANK')"),
            (LAYER, "from os import environ"),
            ("megalite/generate/x.py", "import sys\nx = sys.argv[1:]"),
        ),
        good=(("megalite/train/x.py", "import os\nx = os.environ['RANK']"),),
    ),
    no_global: Rule(PYTHON, bad=((LAYER, "def f():\n    global x\n    x = 1"),)),
    no_long_file: Rule(
        PYTHON, bad=((LAYER, "x = 1\n" * 501),), good=((LAYER, "x = 1\n" * MAX_LINES),)
    ),
    no_side_door_to_collectives: Rule(
        LIBRARY,
        bad=(
            (LAYER, "import torch.distributed as dist"),
            (LAYER, "from torch import distributed"),
            (LAYER, "from torch.distributed import all_reduce"),
            (LAYER, "import torch\ntorch.distributed.barrier()"),
        ),
        good=((DISTRIBUTED_FILES[0], "import torch.distributed as dist"),),
    ),
    no_code_from_data: Rule(
        OURS,
        bad=(
            (LAYER, "import pickle"),
            (LAYER, "from pickle import loads"),
            (LAYER, "import torch\ntorch.load('x', weights_only=True)"),
            (TORCH_LOAD_FILE, "import torch\ntorch.load('x')"),
            (LAYER, "from torch import load"),
            (LAYER, "eval('1')"),
            (LAYER, "exec('1')"),
            (LAYER, "import numpy as np\nnp.load('x', allow_pickle=True)"),
            (LAYER, "import numpy as np\nnp.load('x', allow_pickle=flag)"),
            (DISTRIBUTED_FILES[0], "dist.all_gather_object(a, b)"),
            (DISTRIBUTED_FILES[0], "dist.broadcast_object_list(a)"),
        ),
        good=(
            (LAYER, "model.eval()\nnp.load('x', allow_pickle=False)\nre.compile('x')"),
            (TORCH_LOAD_FILE, "torch.load('x', weights_only=True)"),
        ),
    ),
    no_float_call: Rule(
        LIBRARY,
        bad=((LAYER, "y = x.float()"), (LAYER, "y = (x + 1).float().sum()")),
        good=((LAYER, "y = x.to(torch.float32) + float(z)"), (ACC_DTYPE_FILE, "y = x.float()")),
    ),
    no_machine_path: Rule(
        TEXT,
        bad=tuple(
            (LAYER, f"x = '{start}/" + "log'") for start in ("/tmp", "/root", "/home", "/work")
        ),
        good=(("README.md", "see docs/work/ and https://example.org/home/"),),
    ),
    no_letter_outside_ascii: Rule(PYTHON, bad=((LAYER, "# caf\u00e9"),)),
    no_field_name_twice: Rule(
        (CONFIG_FILE,),
        bad=((CONFIG_FILE, "class A:\n    x: int = 1\nclass B:\n    x: int = 2"),),
        good=((CONFIG_FILE, "class A:\n    x: int\nclass Config:\n    x: A\nx: int = 1"),),
    ),
}
all_rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@cache
def sources(patterns: tuple[str, ...]) -> list[Source]:
    """The files that the patterns name; no pattern reaches into environments or runs."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    paths = sorted(p for p in found if p.suffix not in BINARY and not NOT_OURS & {*p.parts})
    return [
        Source(
            path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8", errors="replace")
        )
        for path in paths
    ]


@all_rules
def test_house_keeps(rule: Callable[[Source], Faults]) -> None:
    files = sources(RULES[rule].holds_for)
    assert files, f"{rule.__name__} looks at no file"
    faults = [f"{source.path}: {fault}" for source in files for fault in rule(source)]
    assert not faults, "\n" + "\n".join(faults)


@all_rules
def test_house_rule_catches_its_examples(rule: Callable[[Source], Faults]) -> None:
    for path, text in RULES[rule].bad:
        assert list(rule(Source(path, text))), f"not caught in {path}: {text!r}"
    for path, text in RULES[rule].good:
        assert not list(rule(Source(path, text))), f"wrongly caught in {path}: {text!r}"


def test_requirements_agree_with_pyproject() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev) = \[(.*?)\]", pyproject, re.DOTALL | re.MULTILINE)
    declared = {name for text in lists for name in re.findall(r'"([^"]+)"', text)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    assert len(lists) == 2 and required == declared | {"setuptools>=77"}


def test_requirements_never_name_apex() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert not [line for line in lines if re.match(r"\s*apex\b", line)]
