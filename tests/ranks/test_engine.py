"""The pipeline engine on schedules written by hand, a fork's plain layer, and freed outputs."""

import pytest

JOBS = "tests.ranks.engine_jobs:"
OUTPUT_BYTES = 6 * 2 * 12 * 8
"""[s, b, h] in float64."""


@pytest.mark.parametrize("world", [1, 2])
def test_backward_split_into_i_and_w_gives_the_gradients_of_1f1b(world, run_ranks):
    run_ranks(JOBS + "check_split_backward", world)


PLAIN = [(1, "none"), (2, "selective"), (3, "none"), (3, "selective"), (3, "full")]


@pytest.mark.parametrize("zero, recompute", PLAIN)
def test_fork_with_plain_linears_trains_to_the_same_numbers(zero, recompute, run_ranks):
    run_ranks(JOBS + "check_plain_layer", 2, zero=zero, recompute=recompute)


def test_storage_of_a_sent_output_is_freed(run_ranks):
    first, _ = run_ranks(JOBS + "output_bytes", 2, ends_in_tanh=False)
    assert first == [0, 0, 0]


def test_storage_of_an_output_behind_a_gate_is_freed(run_ranks):
    gated = {"zero": 3, "recompute": "full"}
    first, _ = run_ranks(JOBS + "output_bytes_of_layout", 2, **gated)
    assert first == [0, 0, 0]


def test_stage_that_ends_in_tanh_keeps_its_output_and_its_gradients(run_ranks):
    first, _ = run_ranks(JOBS + "output_bytes", 2, ends_in_tanh=True)
    assert first == [OUTPUT_BYTES] * 3


@pytest.mark.parametrize("layout", [{}, {"schedule": "zb-h1"}])
def test_sent_messages_are_let_go_while_the_step_runs(layout, run_ranks):
    few, many = (run_ranks(JOBS + "most_under_way", 2, microbatches=n, **layout) for n in (4, 12))
    assert few == many and max(many) <= 3


@pytest.mark.parametrize("overlap", [True, False])
def test_held_transfer_arrives_late_and_changes_no_number(overlap, run_ranks):
    seconds = 0.02
    first, last = run_ranks(JOBS + "held_transfers", 2, seconds=seconds, overlap=overlap)
    assert first["held"] == first["free"] and first["held"] == last["free"]
    for sender, receiver in ((first, last), (last, first)):  # ranks of a host share a clock
        pairs = list(zip(sender["sent"], receiver["received"], strict=True))
        assert len(pairs) == 2 * 3 and all(late - sent >= seconds for sent, late in pairs)
