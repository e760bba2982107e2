"""A user's own schedule: a Python function, or a table of actions. No file of ours is touched.

`--schedule FILE.py:NAME` names a function NAME(pp, num_microbatches, vpp) that returns a Schedule,
the same on every rank; examples/my_schedule.py is one. `--schedule FILE.csv` has one row a rank and
one action a cell, as actions print: `F0@0` is the forward of microbatch 0 on stage 0, `R@0` the
reduction of stage 0; empty cells are skipped. Either way the ranks are pp and the stages pp * vpp,
and check.py has the last word on what can run.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
import io
import re
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megalite.schedule.action import (
    ALL_MICROBATCHES,
    Action,
    Op,
    Schedule,
    first_microbatches,
)
from megalite.schedule.generators import SCHEDULES

MakeSchedule = Callable[[int, int, int], Schedule]
"""Called as make(pp, num_microbatches, vpp); raises ValueError for sizes it cannot have."""

_CELL = re.compile(r"([FBIWR])([0-9]{0,9})@([0-9]{1,9})")


def is_file(spec: str) -> bool:
    """Whether `spec` means a user's file and not the name of a schedule of ours."""
    return ":" in spec or spec.endswith((".csv", ".py"))


def load_schedule(spec: str) -> MakeSchedule:
    """The schedule that `spec` names: one of SCHEDULES, FILE.py:NAME or FILE.csv.

    Runs the file, if it is Python. Raises ValueError, in one line, if there is nothing to call; so
    does the call if what comes back has other sizes than it was asked for.
    """
    if not is_file(spec):
        if spec not in SCHEDULES:
            raise ValueError(f"{spec}: no such schedule (known: {', '.join(SCHEDULES)})")
        return SCHEDULES[spec]
    make = _table(spec) if spec.endswith(".csv") else _function(spec)
    placements: dict[tuple[int, int], tuple[int, ...]] = {}

    def sized(pp: int, num_microbatches: int, vpp: int) -> Schedule:
        made = _well_formed(spec, make(pp, num_microbatches, vpp))
        _check_sizes(spec, made, pp, num_microbatches, vpp)
        # Stages are built before the microbatches are known.
        if placements.setdefault((pp, vpp), made.placement) != made.placement:
            raise ValueError(
                f"{spec}: places stages as {made.placement} with {num_microbatches} microbatches "
                f"and as {placements[pp, vpp]} with others (use one placement for all)"
            )
        return made

    return sized


def sha256_of(spec: str) -> str | None:
    """SHA-256 of the file that `spec` names, in hex; None for a schedule of ours.

    Raises ValueError if it cannot be read.
    """
    return hashlib.sha256(_read(_path(spec))).hexdigest() if is_file(spec) else None


def as_csv(schedule: Schedule) -> str:
    """`schedule` as the text of a table: a start for one's own."""
    return "".join(",".join(map(str, actions)) + "\n" for actions in schedule.actions)


def _well_formed(spec: str, made: Any) -> Schedule:
    """`made`, its lists as tuples and its ops as Op. Raises ValueError if it is no Schedule."""
    if not isinstance(made, Schedule):
        raise ValueError(f"{spec}: returned {type(made).__name__} (return a Schedule)")
    try:
        actions = tuple(tuple(Action(Op(op), s, m) for op, s, m in rank) for rank in made.actions)
    except (TypeError, ValueError):
        raise ValueError(
            f"{spec}: a rank's list holds what is no action (use Action(Op.F, stage, microbatch))"
        ) from None
    return dataclasses.replace(made, placement=tuple(made.placement), actions=actions)


def _check_sizes(spec: str, made: Schedule, pp: int, num_microbatches: int, vpp: int) -> None:
    """Raise ValueError unless `made` has the sizes that were asked for."""
    if made.num_ranks != pp:
        raise ValueError(
            f"{spec}: is for {made.num_ranks} pipeline ranks, got --pp {pp} "
            f"(use --pp {made.num_ranks}, or change the file)"
        )
    if made.num_stages != pp * vpp:
        way = (
            f"use --vpp {made.num_stages // pp}, or change"
            if made.num_stages % pp == 0
            else "change"
        )
        raise ValueError(
            f"{spec}: has {made.num_stages} stages, but --pp {pp} * --vpp {vpp} makes {pp * vpp} "
            f"({way} the file)"
        )
    if made.num_microbatches != num_microbatches:
        raise ValueError(
            f"{spec}: returned {made.num_microbatches} microbatches, asked for {num_microbatches} "
            "(pass num_microbatches on to Schedule)"
        )


# -- FILE.py:NAME ------------------------------------------------------------------------------


def load_callable(spec: str) -> tuple[Path, Callable[..., Any]]:
    """The file and what it calls NAME, of FILE.py:NAME. Runs the file.

    Raises ValueError, in one line, if there is nothing to call.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise ValueError(f"{spec}: names no function (use FILE.py:NAME, or FILE.csv)")
    path = _path(spec)
    names = vars(_run(path))
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "define it, or name another"
        raise ValueError(f"{spec}: {path.name} has no {name} ({hint})")
    if not callable(names[name]):
        raise ValueError(f"{spec}: {name} is no function but {type(names[name]).__name__}")
    return path, names[name]


def _function(spec: str) -> MakeSchedule:
    """The function of FILE.py:NAME; what it raises comes out as one line that names the place."""
    path, function = load_callable(spec)

    def make(pp: int, num_microbatches: int, vpp: int) -> Schedule:
        try:
            return function(pp, num_microbatches, vpp)
        except Exception as error:
            raise ValueError(told(path, error)) from error

    return make


def _run(path: Path) -> Any:
    """The module of a Python file, run anew. Raises ValueError if the file does."""
    _read(path)
    name = f"_user_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None, path
    module = importlib.util.module_from_spec(found)
    # dataclasses look their module up by name.
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(told(path, error)) from error
    return module


def told(path: Path, error: Exception) -> str:
    """An exception of the user's code as one line, with the line of their file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{where}: {kind}{' '.join(str(error).split())}"


# -- FILE.csv ----------------------------------------------------------------------------------


def _table(spec: str) -> MakeSchedule:
    """The schedule of a table, which is for one number of microbatches and one layout.

    Fewer microbatches, as evaluation and sampling run them, are the same lists with the surplus
    struck out.
    """
    schedule = _parse_table(spec)

    def make(pp: int, num_microbatches: int, vpp: int) -> Schedule:
        written = schedule.num_microbatches
        if num_microbatches > written:
            raise ValueError(
                f"{spec}: is written for {written} microbatches, the step has {num_microbatches} "
                "(a table is for one number: change --global-batch-size or --micro-batch-size)"
            )
        return first_microbatches(schedule, num_microbatches)

    return make


def _parse_table(spec: str) -> Schedule:
    """The Schedule that the cells of a table make."""
    try:
        rows = list(csv.reader(io.StringIO(_read(_path(spec)).decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{spec}: is no table of text ({error})") from None
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    ranks: list[tuple[Action, ...]] = []
    home: dict[int, int] = {}
    for rank, row in enumerate(rows):
        actions = []
        for column, cell in enumerate(row, 1):
            if not cell.strip():
                continue
            where = f"{spec}: row {rank + 1} column {column}: {cell.strip()!r}"
            action = _parse_cell(where, cell.strip())
            if home.setdefault(action.stage, rank) != rank:
                raise ValueError(
                    f"{where} runs stage {action.stage} on rank {rank}, but row "
                    f"{home[action.stage] + 1} has it on rank {home[action.stage]} "
                    "(a stage lives on one rank)"
                )
            actions.append(action)
        ranks.append(tuple(actions))
    microbatches = {a.microbatch for actions in ranks for a in actions} - {ALL_MICROBATCHES}
    for what, numbers in (("stage", set(home)), ("microbatch", microbatches)):
        absent = next((i for i in range(len(numbers)) if i not in numbers), None)
        if absent is not None or not numbers:
            raise ValueError(f"{spec}: no cell has {what} {absent or 0} (count them from 0)")
    placement = tuple(home[stage] for stage in range(len(home)))
    return Schedule(Path(spec).name, len(microbatches), placement, tuple(ranks))


def _parse_cell(where: str, cell: str) -> Action:
    """The Action that prints as `cell`."""
    match = _CELL.fullmatch(cell)
    if match is None or (match[2] == "" and match[1] != "R"):
        raise ValueError(
            f"{where} is no action (write F, B, I or W as F0@1: microbatch 0 on stage 1; R as R@1)"
        )
    microbatch = int(match[2]) if match[2] else ALL_MICROBATCHES
    return Action(Op(match[1]), int(match[3]), microbatch)


def _path(spec: str) -> Path:
    """The file of a spec."""
    return Path(spec if spec.endswith(".csv") else spec.rpartition(":")[0])


def _read(path: Path) -> bytes:
    """The bytes of a file. Raises ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
