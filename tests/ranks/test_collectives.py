"""core/comm.py and the cut loss on real gloo ranks; one rank and fake axes: tests/unit/core."""

import pytest

JOBS = "tests.ranks.collective_jobs:"


@pytest.mark.parametrize("world", [2, 4])
def test_autograd_pairs_are_adjoint(world, run_ranks):
    run_ranks(JOBS + "check_pairs_are_adjoint", world)


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_equal_arithmetic_on_all_tensors(world, run_ranks):
    run_ranks(JOBS + "check_collectives", world)


@pytest.mark.parametrize("world", [2, 3])
def test_sums_may_be_sent_in_half_the_bytes(world, run_ranks):
    run_ranks(JOBS + "check_narrow_sums", world)


def test_log_says_what_was_asked_what_went_out_where_from_and_when_it_ended(run_ranks):
    for seen in run_ranks(JOBS + "logged", 2):
        assert seen == [
            ["all_reduce", "all_reduce", "tp", 48, "collective_jobs.py", False, True],
            ["all_gather", "all_gather", "tp", 96, "collective_jobs.py", False, True],
            ["reduce_scatter", "all_to_all", "tp", 48, "collective_jobs.py", False, True],
        ]


@pytest.mark.parametrize(
    ("world", "vocab", "width"), [(2, 12, 6), (2, 11, 6), (4, 9, 3), (4, 5, 2)]
)
def test_cut_cross_entropy_equals_torch_with_padding_and_masks(world, vocab, width, run_ranks):
    run_ranks(JOBS + "check_cross_entropy", world, vocab=vocab, width=width)


@pytest.mark.parametrize("overlap", [True, False])
def test_held_collective_ends_when_it_may_and_at_once_without_overlap(overlap, run_ranks):
    for seen in run_ranks(JOBS + "held", 2, overlap=overlap, seconds=0.05):
        assert seen == [not overlap, True, True]
