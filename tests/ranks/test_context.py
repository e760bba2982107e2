"""The three forms of attention over a cut sequence equal one process, forward and backward."""

import pytest

JOBS = "tests.ranks.context_jobs:"
FORMS = ("ring", "gather", "ulysses")
HOW = {
    "causal": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "soft cap": {"soft_cap": 1.5},
    "dropout": {"p": 0.3},
    "all": {"window": 7, "soft_cap": 2.0, "p": 0.2},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_attention_over_two_ranks_equals_one_process(form, how, run_ranks):
    asked = {"form": form, "length": 16, "heads": 4, "kv_heads": 2, "how": HOW[how]}
    run_ranks(JOBS + "check_forms", 2, **asked)


@pytest.mark.parametrize("how", ["causal", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_within_documents_equals_one_process(form, how, run_ranks):
    starts = [0] * 4 + [4] + [5] * 6 + [11] * 5
    asked = {"form": form, "length": 16, "heads": 4, "kv_heads": 2, "how": HOW[how]}
    run_ranks(JOBS + "check_forms", 2, starts=starts, **asked)


@pytest.mark.parametrize(
    "world, length, heads, kv_heads", [(3, 12, 6, 2), (3, 18, 6, 3), (4, 16, 8, 1), (4, 24, 12, 6)]
)
@pytest.mark.parametrize("form", FORMS)
def test_attention_over_more_ranks_equals_one_process(
    form, world, length, heads, kv_heads, run_ranks
):
    asked = {"form": form, "length": length, "heads": heads, "kv_heads": kv_heads}
    run_ranks(JOBS + "check_forms", world, how={"window": 9}, **asked)


def test_ring_in_bfloat16_merges_in_float32(run_ranks):
    run_ranks(JOBS + "check_ring_in_bfloat16", 2)


@pytest.mark.parametrize("world", [2, 3])
def test_shift_and_all_to_all_move_what_they_say(world, run_ranks):
    run_ranks(JOBS + "check_shift_and_all_to_all", world)
