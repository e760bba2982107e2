"""Layouts drawn at random so that few rows try every legal pair of settings: a covering array.

FACTORS is the whole description: a name and its values, the plain one first; of TRIPLES the values
of all three are tried together. What is legal is asked of Config.check and of the schedule itself,
never stated here. A new feature adds a line to FACTORS and, if its name is no field of Config, a
line to `config_of`. Kuhn, Kacker and Lei 2010 (NIST SP 800-142) on why pairs; the greedy draw is of
the family of AETG, Cohen et al. 1997.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from megalite.core.config import Config, LayoutConfig
from megalite.core.errors import UserError
from megalite.schedule.custom import is_file
from megalite.schedule.generators import SCHEDULES
from megalite.train.build import schedule_maker
from megalite.train.own_files import attention_of

Row = dict[str, Any]
"""A value for every factor."""
Combo = tuple[tuple[str, Any], ...]
"""Two or three factors, in the order of FACTORS, with a value each."""

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False}
FORMS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": LLAMA,
    "all": {
        **LLAMA,
        "qk_norm": True,
        "sliding_window": 5,
        "logit_soft_cap": 4.0,
        "attention_soft_cap": 3.0,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
    },
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 3, 4),
    "sequence_parallel": (True, False),
    "pp": (1, 2, 3, 4),
    "vpp": (1, 2, 3),
    "schedule": tuple(sorted(SCHEDULES, key=lambda name: name != "1f1b")),
    "post_validation": (False, True),
    "uneven": (False, True),
    "cp": (1, 2, 3),
    "cp_form": ("ring", "gather", "ulysses"),
    "recompute": ("none", "selective", "full"),
    "recompute_layers": (None, 1),
    "dp": (1, 2, 3, 4),
    "zero": (0, 1, 2, 3),
    "bucket_mb": (None, 0.01),
    "microbatches": (1, 2, 3, 4, 7),
    "micro_batch_size": (1, 2),
    "lengths_vary": (False, True),
    "reset_attention_mask": (False, True),
    "form": tuple(FORMS),
    "tie_embeddings": (True, False),
    "num_kv_heads": (None, 1, 2, 3, 4),
    "dropout": (0.0, 0.2),
    "attention_dropout": (0.0, 0.1),
    "optimizer": ("adamw", "muon", "sgd"),
    "mup_base_width": (None, 16),
    "lora_rank": (0, 3),
    "dpo_beta": (0.0, 0.5),
    "ramp": (False, True),
}
EASY = {"microbatches": 2, "recompute": "selective"}
"""Values that other settings need: with the plain ones in their place, those would look illegal."""
TRIPLES = (("schedule", "recompute", "zero"),)
"""What holds gradients and activations, and for how long."""
ALL_AXES = {"tp": 2, "pp": 2, "cp": 2, "dp": 2}
EVERY = 15
"""One row in this many has ALL_AXES, where so many ranks are allowed."""
HEADS = 12
"""Of every drawn model: all values of tp and of num_kv_heads divide it."""


@dataclass(frozen=True)
class Drawn:
    """One drawn layout."""

    row: Row
    config: Config
    world: int

    @property
    def name(self) -> str:
        """What is not plain, in the order of FACTORS."""
        return name_of({k: v for k, v in self.row.items() if v != FACTORS[k][0]})


@dataclass
class Coverage:
    """Which combinations there are, which are legal, and which the rows so far have."""

    legal: dict[Combo, Row] = field(default_factory=dict)
    """Each legal combination, with a row that has it."""
    refused: dict[Combo, str] = field(default_factory=dict)
    """Each that no legal row has, with the rule."""
    covered: set[Combo] = field(default_factory=set)

    def new_in(self, row: Row, name: str) -> int:
        """How many combinations with `name` in them a row would cover that none did."""
        return sum(c in self.legal and c not in self.covered for c in combos_of(row, name))

    def cover(self, row: Row) -> int:
        """Count a row in; how many combinations it was the first to have."""
        new = {c for c in combos_of(row) if c in self.legal} - self.covered
        self.covered |= new
        return len(new)

    def refused_by_rule(self) -> dict[str, list[Combo]]:
        """The refused combinations by rule, its numbers left out."""
        rules: dict[str, list[Combo]] = {}
        for combo, text in self.refused.items():
            rule = re.sub(r" \(.*|\d+", lambda m: "N" * m[0].isdigit(), text)
            rules.setdefault(rule, []).append(combo)
        return rules


class Space:
    """The rows that are legal on top of a given config.

    What differs from its default there stays as it is in every row.
    """

    def __init__(self, base: Config, max_ranks: int):
        self.base, self.max_ranks = base, max_ranks
        self.factors = {name: self._values(name) for name in FACTORS}
        plain = {name: values[0] for name, values in self.factors.items()}
        easy = {name: value for name, value in EASY.items() if value in self.factors[name]}
        self.begin = {**plain, **easy}
        self._known: dict[tuple, str] = {}
        self._schedules: dict[tuple, str] = {}

    def _values(self, name: str) -> tuple[Any, ...]:
        base, values = self.base, FACTORS[name]
        if name == "form":
            plain = all(
                getattr(base.model, key) == getattr(type(base.model)(), key) for key in FORMS["all"]
            )
            return values if plain else ("gpt",)
        if name == "uneven" and base.layout.pp_layers is not None:
            return (False,)
        if name in ("reset_attention_mask", "dpo_beta") and not _minds_documents(base):
            return values[:1]
        if name == "ramp" and base.train.rampup_batch_size is not None:
            return (True,)
        for group in (base.layout, base.model, base.data, base.train, base.optim):
            if hasattr(group, name) and getattr(group, name) != getattr(type(group)(), name):
                return (getattr(group, name),)
        return values

    def draw(self, row: Row) -> Drawn:
        """The config of a row, legal or not."""
        world = row["tp"] * row["pp"] * row["cp"] * row["dp"]
        return Drawn(dict(row), config_of(row, self.base), world)

    def why_not(self, row: Row) -> str:
        """The rule that refuses a row; empty for a legal one."""
        key = tuple(row.values())
        if key not in self._known:
            self._known[key] = self._ask(row)
        return self._known[key]

    def _ask(self, row: Row) -> str:
        drawn = self.draw(row)
        if drawn.world > self.max_ranks:
            return f"--max-ranks {self.max_ranks}: the layout has {drawn.world} ranks"
        try:
            drawn.config.check(drawn.world)
        except UserError as error:
            return str(error)
        layout, n = drawn.config.layout, row["microbatches"]
        asked = (layout.schedule, layout.pp, layout.vpp, n, row["tie_embeddings"])
        if asked not in self._schedules:
            try:
                schedule_maker(drawn.config)(n)
                self._schedules[asked] = ""
            except UserError as error:
                self._schedules[asked] = str(error)
        return self._schedules[asked]

    def completed(self, fixed: Row) -> tuple[Row | None, str]:
        """A legal row with these values and few others that are not plain.

        Looks two changes away from the plain row with EASY; if there is none, the second is the
        rule, the one that most speaks of these factors.
        """
        start = {**self.begin, **fixed}
        rules: dict[str, None] = {}
        for row in self._near(start, set(fixed)):
            rule = self.why_not(row)
            if not rule:
                return row, ""
            rules[rule] = None
        flags = [f"--{name.replace('_', '-')}" for name in fixed]
        return None, max(rules, key=lambda rule: sum(f in rule for f in flags))

    def _near(self, start: Row, fixed: set[str]) -> Iterator[Row]:
        yield start
        changes = [(n, v) for n, vs in self.factors.items() if n not in fixed for v in vs[1:]]
        for name, value in changes:
            yield {**start, name: value}
        # Only a setting that changes what the rules say can help with another one.
        rule = self.why_not(start)
        useful = [(n, v) for n, v in changes if self.why_not({**start, n: v}) != rule]
        for name, value in useful:
            for other, second in changes:
                if other != name:
                    yield {**start, name: value, other: second}


def combos_of(row: Row, name: str | None = None) -> list[Combo]:
    """All pairs and TRIPLES of values in a row; of one factor where a name is given."""
    if name is None:
        pairs = list(combinations(row.items(), 2))
    else:
        before = True
        pairs = []
        for other in row.items():
            if other[0] == name:
                before = False
            else:
                mine = (name, row[name])
                pairs.append((other, mine) if before else (mine, other))
    threes = [names for names in TRIPLES if name is None or name in names]
    return [*pairs, *(tuple((each, row[each]) for each in names) for names in threes)]


def coverage_of(space: Space) -> Coverage:
    """Every combination of values, sorted into legal and refused."""
    coverage = Coverage()
    for names in [*combinations(space.factors, 2), *TRIPLES]:
        for values in product(*(space.factors[name] for name in names)):
            combo = tuple(zip(names, values, strict=True))
            row, rule = space.completed(dict(combo))
            if row is None:
                coverage.refused[combo] = rule
            else:
                coverage.legal[combo] = row
    return coverage


def draw_rows(space: Space, count: int, seed: int) -> tuple[list[Drawn], Coverage]:
    """`count` legal layouts, each with as many combinations as can be that those before it lack."""
    chance, coverage = random.Random(seed), coverage_of(space)
    if not coverage.legal:
        rule = next(iter(coverage.refused.values()))
        raise UserError(f"--random {count}: no legal layout is left to draw: {rule}")
    all_axes = _all_axes(space)
    rows = []
    for number in range(count):
        if all_axes is not None and number % EVERY == EVERY - 1:
            row = _climb(space, coverage, all_axes, set(ALL_AXES), chance)
        else:
            left = [c for c in coverage.legal if c not in coverage.covered]
            combo = chance.choice(left or list(coverage.legal))
            row = _climb(space, coverage, coverage.legal[combo], dict(combo).keys(), chance)
        coverage.cover(row)
        rows.append(space.draw(row))
    return rows, coverage


def _all_axes(space: Space) -> Row | None:
    """A legal row with ALL_AXES, if the space has one."""
    if any(value not in space.factors[name] for name, value in ALL_AXES.items()):
        return None
    return space.completed(dict(ALL_AXES))[0]


def _climb(
    space: Space, coverage: Coverage, row: Row, fixed: Collection[str], chance: random.Random
) -> Row:
    """From a legal row, one factor at a time, but those `fixed`, to values that cover more."""
    names = [name for name in space.factors if name not in fixed]
    # Where nothing is left to cover the row is still a random one.
    for better in (lambda new, old: new >= old, lambda new, old: new > old):
        chance.shuffle(names)
        for name in names:
            values = list(space.factors[name])
            chance.shuffle(values)
            row = _best_value(space, coverage, row, name, values, better)
    return row


def _best_value(
    space: Space,
    coverage: Coverage,
    row: Row,
    name: str,
    values: list[Any],
    better: Callable[[int, int], bool],
) -> Row:
    best, most = row, coverage.new_in(row, name)
    for value in values:
        other = {**row, name: value}
        new = coverage.new_in(other, name)
        if better(new, most) and not space.why_not(other):
            best, most = other, new
    return best


def config_of(row: Row, base: Config) -> Config:
    """The config of a drawn row: small, and like `base` in all that no factor names."""
    stages = row["pp"] * row["vpp"]
    layers = tuple(1 + (stage == stages // 2) for stage in range(stages))
    given = base.layout.pp_layers
    # Cut in quarters by lengths that vary, and those over tp and, in two blocks a rank, over cp.
    least = 4 * row["tp"] * row["cp"] * (2 if row["cp"] > 1 else 1)
    model = replace(
        base.model,
        **FORMS[row["form"]],
        **_fields_in(row, base.model),
        num_heads=HEADS,
        hidden_size=4 * HEADS,
        ffn_hidden_size=8 * HEADS,
        num_layers=sum(given) if given else sum(layers) if row["uneven"] else max(2, stages),
        vocab_size=min(61, base.model.vocab_size),
        seq_len=least * -(-8 // least),
        init_std=0.1,
    )
    layout: LayoutConfig = replace(base.layout, **_fields_in(row, base.layout))
    if layout.recompute == "none":
        layout = replace(layout, recompute_layers=None)  # says nothing there, as cp_form at cp 1
    if row["uneven"]:
        layout = replace(layout, pp_layers=layers)
    unit = row["micro_batch_size"] * row["dp"]
    train = replace(
        base.train,
        **_fields_in(row, base.train),
        global_batch_size=row["microbatches"] * unit,
        # Of one microbatch there is none, which check then says.
        rampup_batch_size=small_ramp(unit, row["microbatches"]) if row["ramp"] else None,
    )
    data = replace(base.data, **_fields_in(row, base.data))
    optim = replace(base.optim, **_fields_in(row, base.optim))
    return replace(base, model=model, layout=layout, data=data, train=train, optim=optim)


def _minds_documents(base: Config) -> bool:
    try:
        attention_of(replace(base, data=replace(base.data, reset_attention_mask=True)))
    except UserError:
        return False
    return True


def small_ramp(unit: int, microbatches: int) -> tuple[int, int, int]:
    """A ramp whose end the third step sees; `unit` samples are one microbatch of every rank."""
    return unit, max(1, microbatches - 1) * unit, 2 * unit


def _fields_in(row: Row, group: Any) -> Row:
    names = {f.name for f in dataclasses.fields(group)}
    return {name: value for name, value in row.items() if name in names}


def name_of(settings: Mapping[str, Any]) -> str:
    """Settings in a few words: `tp2 pp2 zb-h1 no-sequence-parallel`."""
    words = []
    for name, value in settings.items():
        word = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(word if value else f"no-{word}")
        elif name in ("schedule", "form", "optimizer"):
            words.append(value.rpartition("/")[2] if is_file(value) else str(value))
        else:
            short = {"micro-batch-size": "micro", "num-kv-heads": "kv", "microbatches": "n"}
            space = "" if word in ("tp", "pp", "cp", "dp", "zero") else " "
            words.append(f"{short.get(word, word)}{space}{value}")
    return " ".join(words) or "one process"
