"""Which update rules there are, a user's own among them, and which parameters each of them updates.

A rule is a class made from an OptimConfig. It has `state_names` and `update(param, grad, state, *,
step, lr, decay)`, which changes flat tensors of numbers in place and knows nothing of any layout:
`state` has a tensor like `param` for each name, zero before the first step; `lr * decay` is the
share that weight decay takes. Three more names are optional. `layout = "matrix"` hands the rule the
2-d matrices of layers alone, and `update` one more keyword, `each_matrix` (matrices.py).
`in_one_pass = True` has two more: `factor`, which the gradient has not been multiplied with yet,
and `copy`, the parameters in their narrower type, or None; the rule sees to both.
`takes(name, shape)` says which parameters it updates, by name and whole shape. What a rule does not
take is AdamW's.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NoReturn

from megalite.core.check_values import unknown
from megalite.core.config import OptimConfig
from megalite.core.errors import UserError
from megalite.core.params import is_hidden_matrix
from megalite.core.shard import Shard
from megalite.optim.adamw import AdamW
from megalite.optim.muon import Muon
from megalite.optim.sgd import SGD
from megalite.schedule.custom import load_callable, told

LAYOUTS = ("flat", "matrix")
OTHERS = "adamw"
"""The rule of parameters that a rule does not take."""


class Rules:
    """The rules of one run by name: the one that was asked for, and AdamW for what it leaves."""

    def __init__(self, cfg: OptimConfig):
        self.name, self.main = cfg.optimizer, load_rule(cfg.optimizer)
        try:
            self.named: dict[str, Any] = {OTHERS: AdamW(cfg), self.name: self.main(cfg)}
        except Exception as error:  # of a user's own __init__: ours take any OptimConfig
            file = Path(cfg.optimizer.rpartition(":")[0])
            raise UserError(f"--optimizer {told(file, error)}") from error

    def of(self, name: str, shard: Shard) -> tuple[str, bool]:
        """The rule of a parameter, and whether that wants it whole: what buckets ask."""
        matrix = _layout(self.main) == "matrix"
        takes = getattr(self.main, "takes", None)
        taken = not matrix or is_hidden_matrix(name, shard.shape)
        if taken and takes is not None:
            taken = bool(takes(name, shard.shape))
        return (self.name, matrix) if taken else (OTHERS, False)


def load_rule(spec: str) -> Any:
    """The class that `spec` names: one of OPTIMIZERS, or a user's own as FILE.py:NAME.

    Runs the file. Raises UserError, in one line, if there is no rule.
    """
    if not spec.rpartition(":")[0].endswith(".py"):
        if spec not in OPTIMIZERS:
            raise UserError(unknown("--optimizer", spec, [*OPTIMIZERS, "FILE.py:NAME"]))
        return OPTIMIZERS[spec]
    try:
        rule = load_callable(spec)[1]
    except ValueError as error:
        raise UserError(f"--optimizer {error}") from None
    _check_rule(spec, rule)
    return rule


def _check_rule(spec: str, rule: Any) -> None:
    """Raise UserError unless it has all that a rule must have."""

    def refuse(what: str) -> NoReturn:
        raise UserError(f"--optimizer {spec}: {what}")

    if not inspect.isclass(rule):
        refuse(f"is no class but {type(rule).__name__} (see examples/my_optimizer.py)")
    names = getattr(rule, "state_names", None)
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        refuse('has no state_names (a tuple as ("momentum",); empty for no state)')
    if len({*names, "weights"}) <= len(names) or not all(n.isidentifier() for n in names):
        refuse(f"state_names {names}: not different words (weights is the parameters' own)")
    layout = _layout(rule)
    if layout not in LAYOUTS:
        refuse(f'layout {layout!r}: there are "flat" and "matrix" (leave it out for flat)')
    words = ["step", "lr", "decay"] + (["each_matrix"] if layout == "matrix" else [])
    words += ["factor", "copy"] if getattr(rule, "in_one_pass", False) else []
    given = ("self", "param", "grad", "state")
    for what, positional, keywords in (("__init__", ("cfg",), []), ("update", given, words)):
        called = rule if what == "__init__" else getattr(rule, what, None)
        if not callable(called):
            refuse(f"has no method {what}")
        try:
            inspect.signature(called).bind(*positional, **dict.fromkeys(keywords))
        except TypeError as error:
            shown = ", ".join(positional) + (f", *, {', '.join(keywords)}" if keywords else "")
            refuse(f"{what} cannot be called as {what}({shown}): {error}")


def _layout(rule: Any) -> str:
    return getattr(rule, "layout", LAYOUTS[0])


OPTIMIZERS: dict[str, Any] = {"adamw": AdamW, "sgd": SGD, "muon": Muon}
