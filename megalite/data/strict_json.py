"""JSON from outside, or one line that says where it is not JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from megalite.core.errors import DataError

KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
KINDS |= {list: "a list", dict: "an object"}


def parse_json(text: str, name: str, line: int | None = None) -> Any:
    """The value in `text`, which stands in file `name`, alone on line `line` if one is given.

    Beside what is not JSON this refuses what readers disagree about: a field that stands twice,
    NaN and infinities.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_fields, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        at = (line or 1) + error.lineno - 1
        raise DataError(f"{name}:{at}: not JSON: {error.msg} at column {error.colno}") from None
    except (_Refused, RecursionError, ValueError) as error:
        what = error if isinstance(error, _Refused) else "nested too deep, or a number too long"
        where = name if line is None else f"{name}:{line}"
        raise DataError(f"{where}: bad JSON: {what}") from None


def kind_of(value: Any) -> str:
    """What a JSON value is, for an error: `a number`."""
    return KINDS.get(type(value), "null")


def quote(value: Any) -> str:
    """A value as it stands in the file, short, in ASCII and on one line."""
    if isinstance(value, (list, dict)):
        return kind_of(value)
    return json.dumps(value[:60] if isinstance(value, str) else value)


class _Refused(Exception):
    """What is wrong in a text that Python's parser takes."""


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Refused(f"{quote(counts.most_common(1)[0][0])} stands twice in one object")
    return fields


def _refuse_constant(name: str) -> None:
    raise _Refused(f"{name} is not a number")
