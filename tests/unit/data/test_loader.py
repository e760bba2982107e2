"""Which samples a step takes: each once an epoch, in an order that no layout changes."""

import time
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from megalite.core import rng
from megalite.core.call import IGNORE
from megalite.core.errors import DataError
from megalite.core.mesh import Mesh
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.loader import Loader, Synthetic, TokenSource, Windows, _scramble, permuted

S = 4
NUM_WINDOWS = 23


class Numbered(TokenSource):
    """Window i is [i, i, ...]: a batch says which windows it is made of."""

    def __init__(self, length=NUM_WINDOWS):
        self.length = length

    def __len__(self):
        return self.length

    def window(self, idx):
        assert 0 <= idx < self.length
        return np.full(S + 1, idx)


def loaders(dp=1, micro=2, accum=3, source=None, seed=5, **how):
    """The loader of each data rank."""
    return [
        Loader(
            Numbered() if source is None else source,
            Mesh({"dp": dp}, rank=rank, kind="fake" if dp > 1 else "single"),
            seed=seed,
            micro_batch_size=micro,
            num_microbatches=accum,
            device=torch.device("cpu"),
            sequence_parallel=True,
            **how,
        )
        for rank in range(dp)
    ]


def windows_by_sample(calls):
    """{number of the sample: its window}, from the batches of all ranks."""
    found = {}
    for call in calls:
        for sample, column in zip(call.samples.tolist(), call.tokens.T.tolist(), strict=True):
            assert sample not in found
            found[sample] = column[0]
    return found


def step(consumed, **layout):
    return windows_by_sample(chain(*(one.step(consumed) for one in loaders(**layout))))


@pytest.mark.parametrize("n", [*range(1, 301), 1000, 4096, 4097, 10_007])
def test_permuted_is_a_permutation(n):
    for key in (0, -1, 2**63 - 1, rng.key(1, "epoch", 0)):
        assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))
        if n > 4096:
            break


@pytest.mark.parametrize("n", [23, 300, 1000])
def test_permuted_leaves_no_order(n):
    """Over many keys, old and new order are alike as chance has it, with spread 1 / sqrt(n)."""
    orders = [[permuted(i, n, rng.key(1, "epoch", e)) for i in range(n)] for e in range(40)]
    left = np.array([np.corrcoef(order, range(n))[0, 1] for order in orders]) * n**0.5
    assert np.abs(left).max() < 3.6 and 0.7 < left.std() < 1.4
    neighbours = [(np.abs(np.diff(order)) == 1).mean() * n for order in orders]
    assert 1 < np.mean(neighbours) < 3  # 2 by chance
    assert 0.5 < np.mean([(np.array(o) == np.arange(n)).sum() for o in orders]) < 1.5  # 1 by chance


def test_scramble_equals_the_hash_of_rng():
    draw = np.random.default_rng(3)
    values = [0, 1, -1, 2**63 - 1, -(2**63), *draw.integers(-(2**63), 2**63 - 1, 200).tolist()]
    theirs = rng.mix(torch.tensor(values)).tolist()
    assert [_scramble(x) for x in values] == [y % 2**64 for y in theirs]


LAYOUTS = [(1, 1, 12), (1, 4, 3), (2, 2, 3), (2, 6, 1), (3, 4, 1), (4, 1, 3), (6, 2, 1)]


@pytest.mark.parametrize("dp, micro, accum", LAYOUTS)
@pytest.mark.parametrize("consumed", [0, 12, 17, 36])
def test_samples_of_a_step_do_not_depend_on_the_layout(dp, micro, accum, consumed):
    reference = step(consumed, dp=1, micro=12, accum=1)
    assert sorted(reference) == list(range(consumed, consumed + 12))
    assert step(consumed, dp=dp, micro=micro, accum=accum) == reference


def test_microbatches_go_before_ranks():
    first, second = loaders(dp=2, micro=2, accum=2)
    assert [c.samples.tolist() for c in first.step(8)] == [[8, 9], [12, 13]]
    assert [c.samples.tolist() for c in second.step(8)] == [[10, 11], [14, 15]]


def test_epoch_has_every_window_once_and_the_next_another_order():
    size = 5
    taken = {}
    for consumed in range(0, 2 * NUM_WINDOWS, size):  # steps that lie across the end of an epoch
        taken |= step(consumed, micro=size, accum=1)
    order = [taken[k] for k in range(2 * NUM_WINDOWS)]
    first, second = order[:NUM_WINDOWS], order[NUM_WINDOWS:]
    assert sorted(first) == sorted(second) == list(range(NUM_WINDOWS))
    assert first != second


def test_seed_changes_the_order():
    assert step(0, micro=20, accum=1, seed=1) != step(0, micro=20, accum=1, seed=2)


def test_state_is_one_integer():
    (walked,) = loaders()
    for consumed in range(0, 60, 6):
        walked.step(consumed)
    (fresh,) = loaders()
    theirs, ours = walked.step(60), fresh.step(60)
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.samples, b.samples)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("dp, micro, accum", LAYOUTS)
def test_ordered_gives_the_held_out_windows_once_and_masks_the_rest(dp, micro, accum):
    at_once = dp * micro * accum
    seen = Counter()
    for first in range(0, NUM_WINDOWS, at_once):
        for one in loaders(dp=dp, micro=micro, accum=accum):
            for call in one.ordered(first, min(at_once, NUM_WINDOWS - first)):
                assert (call.tokens >= 0).all()
                for labels in call.labels.T.tolist():
                    assert len(set(labels)) == 1  # a window counts whole or not at all
                    seen[labels[0]] += 1
    assert {k: n for k, n in seen.items() if k != IGNORE} == dict.fromkeys(range(NUM_WINDOWS), 1)
    assert seen[IGNORE] == -NUM_WINDOWS % at_once


@pytest.mark.parametrize("form", ["ring", "ulysses"])
def test_context_ranks_share_out_each_sample_token_by_token(form):
    source = Windows(np.arange(12 * 5 + 1), seq_len=12)

    def loader(rank, sizes):
        kind = "fake" if sizes else "single"
        return Loader(
            source,
            Mesh(sizes, rank=rank, kind=kind),
            seed=5,
            micro_batch_size=2,
            num_microbatches=4,
            device=torch.device("cpu"),
            sequence_parallel=True,
            cp_form=form,
        )

    one, ranks = loader(0, {}), [loader(rank, {"cp": 3, "tp": 2}) for rank in range(6)]
    for of in (lambda it: it.step(16), lambda it: it.ordered(0, 5)):
        for whole, *parts in zip(of(one), *map(of, ranks), strict=True):
            for tp_idx in range(2):
                share = parts[tp_idx::2]
                places = torch.cat([part.positions for part in share])
                assert sorted(places.tolist()) == list(range(12))
                for part in share:
                    assert torch.equal(part.samples, whole.samples)
                    assert torch.equal(part.tokens, whole.tokens[part.positions])
                    assert torch.equal(part.labels, whole.labels[part.positions])


def test_ordered_stops_at_the_count_that_is_asked():
    (one,) = loaders(micro=2, accum=2)
    labels = torch.cat([call.labels[0] for call in one.ordered(4, 3)])
    assert labels.tolist() == [4, 5, 6, IGNORE]


def test_windows_tile_the_stream_and_labels_follow_tokens():
    windows = Windows(np.arange(23), seq_len=S)
    assert len(windows) == 5 and len(Windows(np.arange(21), S)) == 5
    assert len(Windows(np.arange(20), S)) == 4
    assert [windows.window(i).tolist() for i in (0, 4)] == [[0, 1, 2, 3, 4], [16, 17, 18, 19, 20]]
    (one,) = loaders(source=windows, micro=2, accum=1)
    (call,) = one.step(0)
    assert torch.equal(call.labels, call.tokens + 1)
    assert call.tokens.dtype == call.labels.dtype == torch.int64
    assert call.tokens.shape == (S, 2) and call.tokens.is_contiguous()


def slow_starts(seq_len, idx, begins):
    """The start of the document of each input of a window, token by token."""
    first = idx * seq_len
    return [max([at - first for at in begins if first < at <= t] + [0])
            for t in range(first, first + seq_len)]  # fmt: skip


BEGINS = (0, 3, 4, 8, 9, 19, 24)
"""Documents of 3, 1, 4, 1, 10, 5 and the rest: at a window's edge, over two edges, within one."""


def test_windows_find_documents_across_their_edges():
    begins = np.array(BEGINS)
    source = Windows(np.arange(29), S, lambda a, b: begins[(a <= begins) & (begins < b)])
    found = [source.starts(i).tolist() for i in range(len(source))]
    assert found == [slow_starts(S, i, BEGINS) for i in range(7)]
    assert found[:3] == [[0, 0, 0, 3], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert found[3] == [0, 0, 0, 0], "begun in the window before"


def test_loader_gives_each_sample_its_documents_or_none(tmp_path):
    with IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
        for first, end in pairwise((*BEGINS, 29)):
            writer.add_document(range(first, end))
    data = IndexedDataset(tmp_path / "x")
    source = Windows(data.tokens, S, data.document_starts)
    (plain,) = loaders(source=source, micro=5, accum=2)
    (one,) = loaders(source=source, micro=5, accum=2, reset_attention_mask=True)
    for calls in (one.step(5), one.ordered(0, 7)):
        for call in calls:
            for starts, tokens, labels in zip(
                call.starts.T, call.tokens.T, call.labels.T, strict=True
            ):
                window = tokens[0].item() // S
                counts = (labels != IGNORE).any()
                assert starts.tolist() == (slow_starts(S, window, BEGINS) if counts else [0] * S)
    for ours, call in zip(one.step(5), plain.step(5), strict=True):
        assert call.starts is None and torch.equal(call.labels, ours.labels)
        assert torch.equal(call.tokens, ours.tokens), "documents change no token and no label"


def test_synthetic_documents_have_all_lengths_and_follow_from_the_number():
    source = Synthetic(300, 64, seed=7)
    lengths = Counter()
    for idx in range(200):
        starts = source.starts(idx)
        assert starts[0] == 0 and (starts <= np.arange(64)).all()
        assert np.array_equal(starts, Synthetic(300, 64, seed=7).starts(idx))
        edges = np.flatnonzero(np.diff(starts)) + 1
        assert np.array_equal(starts[edges], edges)
        lengths.update(np.diff([0, *edges, 64]).tolist())
    assert 4 < lengths.total() / 200 < 6
    assert lengths[1] > 0 and lengths[64] > 0
    assert not np.array_equal(source.starts(3), source.starts(4))


def test_data_without_a_window_is_refused():
    with pytest.raises(DataError, match="fewer tokens than one sample needs"):
        loaders(source=Windows(np.arange(S), S))


def test_synthetic_is_a_function_of_seed_and_number():
    source, again = Synthetic(300, 64, seed=7), Synthetic(300, 64, seed=7)
    again.window(3)
    assert np.array_equal(source.window(11), again.window(11))
    assert not np.array_equal(source.window(11), source.window(12))
    assert not np.array_equal(source.window(11), Synthetic(300, 64, seed=8).window(11))


@pytest.mark.parametrize("vocab", [1, 2, 61, 5000])
def test_synthetic_tokens_are_in_the_vocabulary(vocab):
    window = Synthetic(vocab, 128, seed=1).window(0)
    assert window.shape == (129,) and window.min() >= 0 and window.max() < vocab


def test_synthetic_follows_its_chain():
    """After each token come at most four, the likeliest seven times in ten: about 0.8 nats."""
    source = Synthetic(1000, 4000, seed=2)
    after = {}
    for i in range(5):
        window = source.window(i).tolist()
        for a, b in zip(window, window[1:], strict=False):
            after.setdefault(a, Counter())[b] += 1
    assert len(after) <= 256 and max(map(len, after.values())) <= 4
    total = sum(c.total() for c in after.values())
    top = sum(max(c.values()) for c in after.values()) / total
    entropy = -sum(n * np.log(n / c.total()) for c in after.values() for n in c.values()) / total
    assert 0.68 < top < 0.75 and 0.7 < entropy < 0.9


def test_synthetic_is_cheap_beside_a_step():
    source = Synthetic(2048, 512, seed=1)
    began = time.process_time()
    for i in range(100):
        source.window(i)
    # A training step spends milliseconds on a sample of 512 tokens of even the smallest model.
    assert (time.process_time() - began) / 100 < 1e-3
