"""Attention over sequences that are cut over the context parallel ranks, in three exact forms.

`ring`: keys and values travel round the ranks, and each block's output is merged into the last
ones' by its log-sum-exp (Liu et al. 2023, arXiv 2310.01889); rows lie in zigzag order, so that all
ranks have the same share of the causal work. `gather`: every rank gathers all keys and values.
`ulysses`: an all-to-all turns the cut of the sequence into one of the heads, and back (Jacobs et
al. 2023, arXiv 2309.14509). A call without a context has whole sequences. Not here: the cut itself
(core/shard.py) and the arithmetic of scores (core_attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.call import Cached, Call, Context, EverySlot
from megalite.core.params import acc_dtype
from megalite.layers.core_attention import CoreAttention, finite
from megalite.ops.softmax import attention_mask

# s rows of a sequence on this rank, c context ranks, b micro batch, n query heads and m kv heads on
# this tp rank, d head_dim; `length` is c s, the whole sequence


def attend(core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """My queries [s, b, n, d] over all keys and values, of which mine are [s, b, m, d]: as q."""
    if isinstance(call.cache, EverySlot):
        return _every_slot(core, q, k, v, call.cache)
    if call.cache is not None:
        return _cached(core, q, k, v, call.cache)
    if call.context is None:
        return _whole(core, q, k, v, call.positions, call.positions)
    return FORMS[call.context.form](core, q, k, v, call, call.context)


def heads_first(x: Tensor) -> Tensor:
    """From this room's order to that of core_attention.py."""
    return x.permute(1, 2, 0, 3)  # [s, b, n, d] -> [b, n, s, d]


def seq_first(x: Tensor) -> Tensor:
    """And back."""
    return x.permute(2, 0, 1, 3)  # [b, n, s, d] -> [s, b, n, d]


def _whole(
    core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor
) -> Tensor:
    """Queries all of whose keys are here."""
    return seq_first(core.attend(heads_first(q), heads_first(k), heads_first(v), q_at, k_at))


def _cached(core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, cache: Cached) -> Tensor:
    """Each request over its own earlier keys and these, which are added to them.

    What a request computes depends on nothing else in the batch, to the bit.
    """
    each = _next_tokens if max(cache.rows) == 1 else _chunks
    return each(core, q, k, v, cache, *cache.layers[core.layer])


def _next_tokens(
    core: CoreAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cached,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """One token of each request: [1, b, n, d]."""
    for run in cache.alike:
        keys[run.slots, :, run.before] = k[0, run.mine]  # [b, m, d]
        values[run.slots, :, run.before] = v[0, run.mine]
    q = _by_kv_head(q[0], keys)
    runs = cache.alike if core.can_batch(q) else cache.each
    made = [_next_token(core, q[r.mine], keys[r.slots], values[r.slots], r.before) for r in runs]
    return (made[0] if len(made) == 1 else torch.cat(made)).flatten(1, 2).unsqueeze(0)


def _by_kv_head(q: Tensor, keys: Tensor) -> Tensor:
    """Queries [b, n, d] of one token each as [b, m, n/m, d].

    As all keys are seen, the queries of one kv head can stand in the place of a sequence of them.
    """
    return q.unflatten(1, (keys.shape[1], -1))


def _next_token(core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
    """The token after `before` others: [b, m, n/m, d] over [b, m, length, d] gives as q."""
    first = 0 if core.window is None else max(0, before + 1 - core.window)
    return core.attend_all(q, k[:, :, first : before + 1], v[:, :, first : before + 1])


def _every_slot(core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, cache: EverySlot) -> Tensor:
    """The next token of every slot: [1, slots, n, d]."""
    keys, values = cache.layers[core.layer]
    slots = torch.arange(len(keys), device=q.device)
    keys[slots, :, cache.places], values[slots, :, cache.places] = k[0], v[0]  # [slots, m, d]
    at = torch.arange(cache.span, device=q.device)
    seen = attention_mask(cache.places, at, core.window)  # [slots, span]
    k, v = keys[:, :, : cache.span], values[:, :, : cache.span]
    y = core.attend_all(_by_kv_head(q[0], keys), k, v, seen[:, None, None])
    return y.flatten(1, 2).unsqueeze(0)


def _chunks(
    core: CoreAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cached,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Up to s tokens of each request: [s, b, n, d], zeros where it has fewer."""
    q, k, v = map(heads_first, (q, k, v))
    y = torch.zeros_like(q)
    for run, rows in zip(cache.each, cache.rows, strict=True):
        mine, before, end = run.mine, run.before, run.before + rows
        own_keys, own_values = keys[run.slots, :, :end], values[run.slots, :, :end]
        own_keys[:, :, before:], own_values[:, :, before:] = k[mine, :, :rows], v[mine, :, :rows]
        if rows == 1:  # as it would be without a longer one beside it
            last = _by_kv_head(q[mine, :, 0], keys)
            y[mine, :, 0] = _next_token(core, last, own_keys, own_values, before).flatten(1, 2)
            continue
        at = torch.arange(end, device=q.device)
        q_at = at[before:] if before else at
        y[mine, :, :rows] = core.attend(q[mine, :, :rows], own_keys, own_values, q_at, at)
    return seq_first(y)


def _at(spans: list[range], like: Tensor) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop, device=like.device) for r in spans])


def _at_all(context: Context, length: int, like: Tensor) -> Tensor:
    """Positions of all ranks' rows, rank by rank: [c s]."""
    ranks = range(context.axis.size)
    return _at([span for idx in ranks for span in context.spans(length, idx)], like)


def gather_keys(k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of whole sequences [c s, b, m, d], of which mine are [s, b, m, d].

    With them their positions [c s], rank by rank; a call without a context has them all already.
    """
    if call.context is None:
        return k, v, call.positions
    both = comm.gather(torch.cat((k, v), dim=2), call.context.axis)  # [c s, b, 2m, d]
    k, v = both.chunk(2, dim=2)
    return k, v, _at_all(call.context, call.whole_len, k)


def _gather(
    core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, call: Call, context: Context
) -> Tensor:
    k, v, k_at = gather_keys(k, v, call)
    return _whole(core, q, k, v, call.positions, k_at)


def _ulysses(
    core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, call: Call, context: Context
) -> Tensor:
    axis, n = context.axis, q.shape[2]
    heads, kv_heads = n // axis.size, lcm(k.shape[2], axis.size) // axis.size
    # kv heads that do not divide are repeated: each rank then has those of its own queries.
    k, v = (t.repeat_interleave(kv_heads * axis.size // t.shape[2], dim=2) for t in (k, v))
    by_rank = torch.cat([t.unflatten(2, (axis.size, -1)) for t in (q, k, v)], dim=3)
    # [s, b, c, (n + 2m)/c, d] -> [c s, b, (n + 2m)/c, d]
    whole = comm.all_to_all(by_rank.movedim(2, 0), axis).flatten(0, 1)
    q, k, v = whole.split((heads, kv_heads, kv_heads), dim=2)
    mine = replace(core, first_head=core.first_head + axis.idx * heads)
    at = _at_all(context, call.whole_len, q)  # in order: this form's rows are cut contiguously
    y = _whole(mine, q, k, v, at, at)
    parts = comm.all_to_all(y.unflatten(0, (axis.size, -1)), axis)  # [c, s, b, n/c, d]
    return parts.movedim(0, 2).flatten(2, 3)  # [s, b, n, d]


def _ring(
    core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, call: Call, context: Context
) -> Tensor:
    q, k, v = map(heads_first, (q, k, v))
    return seq_first(_Ring.apply(q, k, v, core, context, call.whole_len))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, core, context, length):
        wide = acc_dtype(q.dtype)
        y = torch.zeros_like(q, dtype=wide)
        lse = y.new_full(q.shape[:-1], -torch.inf)
        for kv, spans in _visits(torch.stack((k, v)), context, length):
            for mine, theirs, q_at, k_at in blocks(context.spans(length), spans, core.window, q):
                k_block, v_block = kv[:, :, :, theirs]
                found = core.partial(q[:, :, mine], k_block, v_block, q_at, k_at)
                y[:, :, mine], lse[:, :, mine] = merged(y[:, :, mine], lse[:, :, mine], *found)
        y_out = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, y_out, lse)
        ctx.core, ctx.context, ctx.length = core, context, length
        return y_out

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, lse = ctx.saved_tensors
        core, context, length = ctx.core, ctx.context, ctx.length
        dot = (y.to(lse.dtype) * dy).sum(-1)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        home: comm.Pending | None = None
        for kv, spans in _visits(torch.stack((k, v)), context, length):
            dkv = torch.zeros_like(kv, dtype=lse.dtype)
            for mine, theirs, q_at, k_at in blocks(context.spans(length), spans, core.window, q):
                k_block, v_block = kv[:, :, :, theirs]
                grads = core.partial_grads(
                    q[:, :, mine],
                    k_block,
                    v_block,
                    q_at,
                    k_at,
                    lse=lse[:, :, mine],
                    dy=dy[:, :, mine],
                    dot=dot[:, :, mine],
                )
                dq[:, :, mine] += grads[0]
                dkv[0, :, :, theirs] += grads[1]
                dkv[1, :, :, theirs] += grads[2]
            # The gradients follow their keys round, one hop behind, and so end at home.
            home = comm.shift_start(dkv if home is None else dkv.add_(home.wait()), context.axis)
        assert home is not None
        dk, dv = home.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _visits(kv: Tensor, context: Context, length: int) -> Iterator[tuple[Tensor, list[range]]]:
    """Each rank's keys and values in turn, mine first, and their spans; the next come meanwhile."""
    axis = context.axis
    for hop in range(axis.size):
        coming = comm.shift_start(kv, axis) if hop + 1 < axis.size else None
        yield kv, context.spans(length, (axis.idx - hop) % axis.size)
        if coming is not None:
            kv = coming.wait()


def blocks(
    q_spans: list[range], k_spans: list[range], window: int | None, like: Tensor
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows and positions of the pairs of spans in which some query sees some key."""
    for mine, q_span in _rows(q_spans):
        for theirs, k_span in _rows(k_spans):
            ahead = q_span[-1] >= k_span[0]
            near = window is None or q_span[0] - k_span[-1] < window
            if ahead and near:
                yield mine, theirs, _at([q_span], like), _at([k_span], like)


def _rows(spans: list[range]) -> Iterator[tuple[slice, range]]:
    start = 0
    for span in spans:
        yield slice(start, start + len(span)), span
        start += len(span)


def merged(y: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over both sets of keys; none in either gives zeros and -inf."""
    both = torch.logaddexp(lse, more_lse)
    old, new = (torch.exp(each - finite(both)).unsqueeze(-1) for each in (lse, more_lse))
    return old * y + new * more, both


FORMS = {"ring": _ring, "gather": _gather, "ulysses": _ulysses}
