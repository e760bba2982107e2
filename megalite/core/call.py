"""One microbatch on its way through the layers: its tokens, and how this pass is run.

Every stage gets the same record, so shapes, positions and dropout masks are known everywhere before
a step starts and never travel. Sequence and context parallelism are properties of the call, not of
a layer: `seq_cut` is None when decoding or where tp is 1, `context` when decoding or where cp is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from megalite.core.mesh import Axis
from megalite.core.recompute import Parts
from megalite.core.shard import CONTEXT_ORDER, sequence_multiple, sequence_positions

# s sequence on this context rank, b micro batch

IGNORE = -1
"""A label that takes no part in the loss."""


@dataclass(frozen=True, eq=False)
class Context:
    """How sequences are cut over the context parallel ranks, and how attention sees across."""

    axis: Axis
    form: str
    """ring, gather or ulysses: layers/context.py has them."""

    def multiple(self, rows: int) -> int:
        """What a length must be a multiple of if each rank's part is cut over `rows` ranks more."""
        return sequence_multiple(self.axis.size, CONTEXT_ORDER[self.form], rows=rows)

    def spans(self, length: int, idx: int | None = None) -> list[range]:
        """What rank `idx` (None: mine) holds of a sequence of `length` tokens, in its order."""
        axis = self.axis if idx is None else replace(self.axis, idx=idx)
        return sequence_positions(length, axis, order=CONTEXT_ORDER[self.form])

    def take(self, x: Tensor) -> Tensor:
        """My rows of `x` [length, ...]."""
        return torch.cat([x[span.start : span.stop] for span in self.spans(x.shape[0])])


@dataclass(frozen=True)
class Run:
    """Requests of a call that follow each other in it, and so do their slots."""

    first: int
    """Place of the first of them in the call."""
    slot: int
    """Its slot."""
    before: int
    """Tokens that are there of each."""
    count: int = 1

    @property
    def mine(self) -> slice:
        """Where they are in the call."""
        return slice(self.first, self.first + self.count)

    @property
    def slots(self) -> slice:
        """Where their keys and values are."""
        return slice(self.slot, self.slot + self.count)


@dataclass(frozen=True, eq=False)
class Cached:
    """What came before the tokens of a call, each request's in a slot of its own."""

    layers: Mapping[int, tuple[Tensor, Tensor]]
    """Keys and values [slots, kv heads, length, d] of each layer, those on this rank."""
    slots: tuple[int, ...]
    """[b]: of each request."""
    before: tuple[int, ...]
    """[b]: its tokens that are there."""
    rows: tuple[int, ...]
    """[b]: how many of its s tokens in this call count; what follows is padding."""

    @cached_property
    def each(self) -> list[Run]:
        """The requests one by one."""
        return [Run(i, *at) for i, at in enumerate(zip(self.slots, self.before, strict=True))]

    @cached_property
    def alike(self) -> list[Run]:
        """The same in the longest runs there are."""
        found: list[Run] = []
        for run in self.each:
            last = found[-1] if found else None
            if last and (run.slot, run.before) == (last.slots.stop, last.before):
                found[-1] = replace(last, count=last.count + 1)
            else:
                found.append(run)
        return found


@dataclass(frozen=True, eq=False)
class EverySlot:
    """What came before the next token of every slot, row i of the call's that of slot i.

    Nothing of it but `span` is in the shapes, and nothing is read by the host: what one recording
    does holds for all steps of that span.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    """As in Cached."""
    places: Tensor
    """[slots] int64: where the token stands, after all that is there."""
    span: int
    """Places that are looked at: more than any of `places` that counts."""


@dataclass(frozen=True, eq=False)
class Preference:
    """What makes the samples of a call pairs of answers, the preferred one first.

    Each is two documents: `Call.starts` says where the second begins.
    """

    reference: Tensor
    """[b] float64: log p(preferred) - log p(other) under the model that training began from."""
    counts: Tensor
    """[b] bool: which samples are pairs; the others fill a microbatch up."""
    beta: float
    """What the difference of two such log ratios is multiplied with."""
    gains: list[Tensor] = field(default_factory=list)
    """That product [b], which the last stage leaves here when it finds the loss."""


@dataclass(frozen=True, eq=False)
class Call:
    """One microbatch and one way to run it."""

    tokens: Tensor
    """[s, b] int64."""
    labels: Tensor | None
    """[s, b] int64, IGNORE where masked; None when no loss is wanted."""
    positions: Tensor
    """[s] int64: place of each row in its whole sequence."""
    samples: Tensor
    """[b] int64: number of each sample in the whole run; names its random numbers."""
    seq_cut: Axis | None = None
    """The axis that cuts the residual stream along s, or None."""
    context: Context | None = None
    """The cut of whole sequences of which s is my part, or None."""
    starts: Tensor | None = None
    """[length, b] int64, of the whole sequence: the position at which the document of each token
    starts. A document is contiguous and attention causal, so this says all about the documents in a
    sample: position q sees positions starts[q] to q. None: a sample is one document."""
    later: list[Callable[[], None]] | None = None
    """Where weight-gradient jobs wait for W; None: no longer than in `beside`."""
    beside: list[Callable[[], None]] = field(default_factory=list)
    """Where weight-gradient jobs wait for a collective that they can hide."""
    training: bool = True
    """Dropout is on, and what is added to the loss."""
    parts: Parts | None = None
    """The parts of a layer that backward runs again; None keeps everything."""
    cache: Cached | EverySlot | None = None
    """Where attention keeps keys and values, and finds earlier ones; None: all are in the call."""
    counted: Tensor | None = None
    """[s, b] int64: places of the tokens, where they are not counted from `positions`."""
    known: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict, init=False)
    """What layers have computed that is the same for all of them."""
    wanted: Tensor | None = None
    """[w] int64: the rows of [s b] whose logits are wanted, which are then [w, 1, v/tp]."""
    preference: Preference | None = None
    """What is learned is which of two answers is preferred; None: the labels are."""

    @property
    def weight_jobs(self) -> list[Callable[[], None]]:
        """Where a weight gradient is left."""
        return self.beside if self.later is None else self.later

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[0]

    @property
    def batch(self) -> int:
        return self.tokens.shape[1]

    @property
    def whole_len(self) -> int:
        """Tokens of a sequence over all context ranks."""
        return self.seq_len * self.context.axis.size if self.context else self.seq_len

    @property
    def tokens_learned(self) -> Tensor:
        """Labels that take part: a scalar."""
        assert self.labels is not None
        return (self.labels > IGNORE).sum()

    @property
    def terms(self) -> Tensor:
        """What this rank adds to the number that the loss is a mean over: a scalar.

        Labels that take part; of pairs, whose loss all context ranks find together, the first one
        counts all.
        """
        if self.preference is None:
            return self.tokens_learned
        return self.preference.counts.sum() * self.is_first_part

    @property
    def is_first_part(self) -> bool:
        """Whether this is the first context rank's part."""
        return self.context is None or self.context.axis.idx == 0

    @property
    def rows(self) -> int:
        """Rows of the residual stream on this rank: s, or s/tp when cut."""
        return self.seq_len // self.seq_cut.size if self.seq_cut else self.seq_len

    @property
    def row_positions(self) -> Tensor:
        """Positions of those rows."""
        return self._my_rows(self.positions)

    @cached_property
    def places(self) -> Tensor:
        """Place of each token in its document: [s, b], or [s, 1] where a sample is one document.

        What position embeddings count by; what sees what, and dropout's names, go by `positions`.
        """
        if self.counted is not None:
            return self.counted
        at = self.positions[:, None]
        return at if self.starts is None else at - self.starts[self.positions]

    @property
    def row_places(self) -> Tensor:
        """Places of those rows of the residual stream that are on this rank."""
        return self._my_rows(self.places)

    def _my_rows(self, x: Tensor) -> Tensor:
        return x if self.seq_cut is None else x.narrow(0, self.seq_cut.idx * self.rows, self.rows)

    def deferring(self, later: list[Callable[[], None]]) -> Call:
        """The same call with its weight gradients left in `later`."""
        return replace(self, later=later)

    def evaluating(self) -> Call:
        """The same call, not to be learned from."""
        return replace(self, training=False)

    def recomputing(self, parts: Parts) -> Call:
        """The same call with some parts run again in backward."""
        return replace(self, parts=parts)

    def makes_again(self, name: str) -> bool:
        """Whether backward runs the parts of that name again."""
        return self.parts is not None and name in self.parts.names

    def part(self, name: str, fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`fn(*inputs)`, one tensor: a part of a layer that --recompute-modules may name.

        Where it does, nothing that `fn` makes is kept, its output neither. What `fn` uses besides
        its inputs must be parameters, or not need a gradient; it must not write to its inputs.
        """
        return fn(*inputs) if self.parts is None else self.parts.run(name, fn, inputs)


def run_jobs(jobs: list[Callable[[], None]]) -> None:
    """Do what was left for later, in order."""
    while jobs:
        jobs.pop(0)()  # and let go of what it holds


def make_call(
    tokens: Tensor,
    labels: Tensor | None,
    samples: Tensor,
    *,
    seq_cut: Axis | None,
    context: Context | None = None,
    starts: Tensor | None = None,
    preference: Preference | None = None,
) -> Call:
    """A training call over this context rank's part of whole sequences [length, b].

    Labels are those of the whole sequence, shifted already; `starts` are those of Call. A length
    that the cuts do not divide is padded at its end with tokens that no other looks at, and labels
    that do not count.
    """
    cut = seq_cut if seq_cut is not None and seq_cut.size > 1 else None
    context = context if context is not None and context.axis.size > 1 else None
    rows, length = cut.size if cut else 1, tokens.shape[0]
    if missing := -length % (context.multiple(rows) if context else rows):
        tokens = pad(tokens, (0, 0, 0, missing))
        starts = starts if starts is None else pad(starts, (0, 0, 0, missing), value=length)
        labels = labels if labels is None else pad(labels, (0, 0, 0, missing), value=IGNORE)
    positions = torch.arange(tokens.shape[0], device=tokens.device)
    if context is not None:
        tokens, positions = context.take(tokens), context.take(positions)
        labels = labels if labels is None else context.take(labels)
    return Call(tokens, labels, positions, samples, cut, context, starts, preference=preference)
