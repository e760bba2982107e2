"""Each conversation is in one window, whole, apart from the others, and its answer is learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite.core.call import IGNORE
from megalite.core.errors import DataError
from megalite.core.mesh import Mesh
from megalite.data.chat import Rendered
from megalite.data.loader import Loader
from megalite.data.packing import Conversations, best_fit

S = 9


def rendered(name: int, asked: int, said: int) -> Rendered:
    """Tokens name * 100, name * 100 + 1, ...; the last `said` of them are learned."""
    ids = [100 * name + i for i in range(asked + said)]
    return Rendered(ids, [False] * asked + [True] * said)


ALL = [rendered(1, 2, 2), rendered(2, 4, 3), rendered(3, 1, 2), rendered(4, 3, 3)]


def test_windows_are_filled_by_the_best_fit():
    packed = Conversations(ALL, S, pack=True)
    assert [packed.window(i).tolist() for i in range(len(packed))] == [
        [*range(200, 207), *range(300, 303)],
        [*range(400, 406), *range(100, 104)],
    ]
    assert packed.starts(0).tolist() == [0] * 7 + [7] * 2
    assert packed.starts(1).tolist() == [0] * 6 + [6] * 3
    # A label is the next token: the first of the learned ones is that of the last asked.
    assert packed.learned(0).tolist() == [False] * 3 + [True] * 3 + [False] + [True] * 2
    assert packed.lengths is None and packed.cut == packed.dropped == 0


def test_what_fills_a_window_up_is_apart_and_not_learned():
    packed = Conversations(ALL[:1], S, pack=True)
    assert packed.window(0).tolist() == [100, 101, 102, 103, 0, 0, 0, 0, 0, 0]
    assert packed.starts(0).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 4]
    assert packed.learned(0).tolist() == [False, True, True] + [False] * 6


def test_unpacked_windows_are_one_conversation_each_the_longest_first():
    alone = Conversations(ALL, S, pack=False)
    assert [alone.window(i)[0] for i in range(4)] == [200, 400, 100, 300]
    assert alone.lengths.tolist() == [6, 5, 3, 2]
    assert [len(alone.window(i)) - 1 for i in range(4)] == alone.lengths.tolist()
    assert [len(alone.learned(i)) for i in range(4)] == alone.lengths.tolist()
    assert alone.starts(2).tolist() == [0, 0, 0]


def test_what_is_too_long_is_cut_and_dropped_without_an_answer():
    made = Conversations([rendered(1, 8, 9), rendered(2, 12, 3)], S, pack=True)
    assert (made.cut, made.dropped, len(made)) == (2, 1, 1)
    assert made.window(0).tolist() == [*range(100, 110)]
    assert made.learned(0).tolist() == [False] * 7 + [True] * 2
    with pytest.raises(DataError, match="no conversation has an answer within --seq-len 9"):
        Conversations([rendered(2, 12, 3)], S, pack=True)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_overflows_no_box_and_wastes_less_than_half(sizes):
    boxes = best_fit(sizes, sorted(range(len(sizes)), key=lambda i: -sizes[i]), 50)
    assert sorted(i for box in boxes for i in box) == list(range(len(sizes)))
    fill = [sum(sizes[i] for i in box) for box in boxes]
    assert all(fullness <= 50 for fullness in fill)
    # Two boxes of which either could take what is in the other: there are none.
    assert all(a + b > 50 for k, a in enumerate(fill) for b in fill[:k])


def loader(source, dp, rank, micro, accum, **how):
    return Loader(
        source,
        Mesh({"dp": dp}, rank=rank, kind="fake" if dp > 1 else "single"),
        seed=5,
        micro_batch_size=micro,
        num_microbatches=accum,
        device=torch.device("cpu"),
        sequence_parallel=True,
        **how,
    )


def labels_by_sample(source, dp, micro, accum, consumed):
    """{sample: its labels that count, after its inputs}, and the shapes of all microbatches."""
    found, shapes = {}, []
    for rank in range(dp):
        for call in loader(source, dp, rank, micro, accum).step(consumed):
            shapes.append(tuple(call.tokens.shape))
            columns = zip(call.samples.tolist(), call.tokens.T, call.labels.T, strict=True)
            for sample, tokens, labels in columns:
                counts = labels != IGNORE
                assert sample not in found
                found[sample] = (tokens[counts].tolist(), labels[counts].tolist())
    return found, shapes


@pytest.mark.parametrize("consumed", [0, 12, 30])
def test_step_has_the_same_samples_whatever_the_layout_and_pads_little(consumed):
    talks = [rendered(i, 1 + i % 4, 1 + i % 5) for i in range(1, 24)]
    source = Conversations(talks, S, pack=False)
    reference, _ = labels_by_sample(source, 1, 1, 12, consumed)
    assert sorted(reference) == list(range(consumed, consumed + 12))
    assert all(len(inputs) >= 1 for inputs, _ in reference.values())
    for dp, micro, accum in ((1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 1, 3)):
        found, shapes = labels_by_sample(source, dp, micro, accum, consumed)
        assert found == reference
        lengths = [length for length, _ in shapes]
        # Each rank goes from long to short: its first microbatch holds its longest.
        assert lengths[0] == max(lengths) and len(shapes) == dp * accum


def test_documents_of_the_call_are_the_conversations():
    packed = Conversations(ALL, S, pack=True)
    (call,) = loader(packed, 1, 0, 2, 1, reset_attention_mask=True).step(0)
    by_first = {int(call.tokens[0, b]): call.starts[:, b].tolist() for b in range(2)}
    assert by_first == {200: packed.starts(0).tolist(), 400: packed.starts(1).tolist()}
