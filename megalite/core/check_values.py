"""What one field may hold: its type, the range of every number, and how errors name it.

Rules between fields: core/check.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megalite.core.errors import UserError

LARGEST_INT = 2**31 - 1  # divisors() walks to the square root, and no count of ours comes near it
LARGEST_SEED = 2**63 - 1

RULES: dict[str, Callable[[float], bool]] = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
}
# Rule -> the fields that obey it. A number of Config that is named nowhere here fails a test.
FIELDS: dict[str, str] = {
    "> 0": "norm_eps rope_theta logit_soft_cap attention_soft_cap init_std bucket_mb lr eps "
    "initial_loss_scale min_loss_scale repetition_penalty max_seconds lora_alpha",
    ">= 0": "z_loss temperature top_k zero warmup_steps weight_decay clip_grad seed eval_interval "
    "save_interval loss_scale port max_queue lora_rank dpo_beta",
    ">= 1": "num_layers hidden_size num_heads num_kv_heads ffn_hidden_size vocab_size seq_len "
    "sliding_window mup_base_width tp pp cp dp vpp recompute_layers micro_batch_size "
    "global_batch_size train_steps log_interval eval_samples world max_tokens num_samples random "
    "max_ranks steps loss_scale_window hysteresis slots",
    "in [0, 1)": "dropout attention_dropout label_smoothing beta1 beta2 momentum",
    "in (0, 1]": "wsd_decay_share top_p",
    "in [0, 1]": "min_lr_ratio min_p",
}
RULE_OF = {name: rule for rule, names in FIELDS.items() for name in names.split()}


def flag(name: str) -> str:
    """The flag of a field, as every error spells it: `hidden_size` gives `--hidden-size`."""
    return "--" + name.replace("_", "-")


def divisors(n: int) -> list[int]:
    """All divisors of n > 0, in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def choices(values: Iterable[object]) -> str:
    """`1, 2, 4`, as an error lists them."""
    return ", ".join(str(v) for v in values)


def nearest(values: Iterable[int], to: int, count: int = 8) -> list[int]:
    """The `count` values nearest to `to`, in order."""
    return sorted(sorted(values, key=lambda v: abs(v - to))[:count])


def multiples_near(n: int, step: int) -> list[int]:
    """The multiples of `step` just below and above n, 0 left out."""
    below = n // step * step
    return [m for m in (below, below + step) if m]


def unknown(what: str, value: str, names: Iterable[str]) -> str:
    """The text for a name that is in no table: its nearest neighbour and all that are."""
    known = list(names)
    close = difflib.get_close_matches(value.lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} {value!r} ({hint}known: {', '.join(known)})"


@functools.cache
def kinds_of(hint: Any) -> tuple[tuple[Any, ...], bool]:
    """The types a hint allows without None, and whether it allows None."""
    bare = _without_marks(hint)
    is_union = get_origin(bare) in (Union, types.UnionType)
    members = [_without_marks(m) for m in get_args(bare)] if is_union else [bare]
    return tuple(m for m in members if m is not type(None)), type(None) in members


def _without_marks(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def expected(kind: Any) -> str:
    """What a value of this kind looks like, for `expected ...`."""
    if get_origin(kind) is Literal:
        return f"one of {choices(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"{'integers' if get_args(kind)[0] is int else 'values'} as 3,3,2,2"
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(v, get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def check_value(name: str, value: Any, hint: Any, *, label: str = "") -> None:
    """Raise UserError unless `value` has the type and lies in the range of the field `name`.

    `label` is how the text begins: what the user typed, where that says more (1e400 is inf).
    """
    if fault := _fault_of(name, value, hint):
        raise UserError(f"{label or f'{flag(name)} {value}'}: {fault}")


def _fault_of(name: str, value: Any, hint: Any) -> str:
    kinds, may_be_none = kinds_of(hint)
    if value is None and may_be_none:
        return ""
    if not any(_is_of(value, kind) for kind in kinds):
        return f"expected {expected(kinds[0])}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    rule = RULE_OF.get(name)
    if not math.isfinite(value) or (rule is not None and not RULES[rule](value)):
        noun = "a finite number" if float in kinds else "an integer"
        return f"must be {noun}{f' {rule}' if rule else ''}"
    largest = LARGEST_SEED if name == "seed" else LARGEST_INT
    return f"must be at most {largest}" if int in kinds and abs(value) > largest else ""


@functools.cache
def _hints_of(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def check_fields(record: Any) -> None:
    """Raise UserError unless each field of a flat dataclass has its type and lies in its range."""
    hints = _hints_of(record.__class__)
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        check_value(field.name, value, hints[field.name])
        if value == "" and field.default != "":
            raise UserError(f"{flag(field.name)}: must not be empty")
