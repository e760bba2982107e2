"""The cut of a call over context ranks: rows, labels, positions, and padding."""

import pytest
import torch

from megalite.core.call import IGNORE, Context, make_call
from megalite.core.mesh import Axis

FORMS = ("ring", "gather", "ulysses")


def parts(length, cp, form, tp=1):
    """The calls of all context ranks over tokens 100, 101, ... with the next token as label."""
    tokens = 100 + torch.arange(length)[:, None].expand(length, 3)
    cut = Axis("tp", tp) if tp > 1 else None
    samples = torch.arange(3)
    return [
        make_call(
            tokens, tokens + 1, samples, seq_cut=cut, context=Context(Axis("cp", cp, i), form)
        )
        for i in range(cp)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_context_ranks_hold_every_row_once_with_its_own_label(cp, form):
    calls = parts(24, cp, form)
    assert sorted(p for call in calls for p in call.positions.tolist()) == list(range(24))
    for call in calls:
        assert call.seq_len == 24 // cp and call.whole_len == 24 and call.batch == 3
        assert torch.equal(call.tokens, 100 + call.positions[:, None].expand(-1, 3))
        assert torch.equal(call.labels, call.tokens + 1)


@pytest.mark.parametrize(
    "form, tp, padded", [("ring", 1, 12), ("ring", 3, 12), ("ulysses", 1, 10), ("ulysses", 3, 12)]
)
def test_length_that_does_not_divide_is_padded_with_labels_that_do_not_count(form, tp, padded):
    calls = parts(10, 2, form, tp)
    assert all(call.whole_len == padded for call in calls)
    counted = torch.cat([c.positions[c.labels[:, 0] != IGNORE] for c in calls])
    assert sorted(counted.tolist()) == list(range(10))


@pytest.mark.parametrize("form", FORMS)
def test_places_count_from_the_start_of_each_document(form):
    starts = torch.tensor([[0, 0], [0, 1], [0, 2], [3, 2], [4, 2], [4, 2]])
    tokens = torch.zeros(6, 2, dtype=torch.int64)
    whole = make_call(tokens, None, torch.arange(2), seq_cut=None, starts=starts)
    assert whole.places.T.tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 2, 3]]
    for idx in range(2):
        context = Context(Axis("cp", 2, idx), form)
        for tp_idx in range(2):
            call = make_call(
                tokens,
                None,
                torch.arange(2),
                seq_cut=Axis("tp", 2, tp_idx),
                context=context,
                starts=starts,
            )
            real = call.row_positions < 6
            assert torch.equal(call.row_places[real], whole.places[call.row_positions[real]])
            padding = call.row_positions[~real] - 6
            assert torch.equal(call.row_places[~real], padding[:, None].expand(-1, 2))


def test_places_of_one_document_are_its_positions():
    call = parts(24, 3, "ring")[1]
    assert torch.equal(call.places, call.positions[:, None])


def test_rows_of_sequence_parallelism_are_cut_within_the_context_rank():
    for tp_idx, wanted in enumerate([[2, 3], [12, 13]]):
        call = make_call(
            torch.zeros(16, 1, dtype=torch.int64),
            None,
            torch.arange(1),
            seq_cut=Axis("tp", 2, tp_idx),
            context=Context(Axis("cp", 4, 1), "ring"),
        )
        assert call.row_positions.tolist() == wanted and call.rows == 2


def test_context_of_one_rank_is_none():
    call = parts(7, 1, "ring")[0]
    assert call.context is None and call.whole_len == call.seq_len == 7
