import random

import pytest

from megalite.schedule.action import ALL_MICROBATCHES, Action, Op, Schedule
from megalite.schedule.check import buffers, check
from megalite.schedule.generators import SCHEDULES, list_schedule
from megalite.schedule.simulate import bubble, own_span_bubble, peak_live, simulate

PAIRS = [(pp, n) for pp in (1, 2, 3, 4, 6, 8) for n in (1, 2, 4, 8, 12)]


def textbook_1f1b(pp: int, n: int) -> tuple[tuple[Action, ...], ...]:
    """Warmup of pp - r - 1 forwards, then one forward and one backward in turn, then cooldown."""
    ranks = []
    for r in range(pp):
        warmup = min(pp - r - 1, n)
        actions = [Action(Op.F, r, m) for m in range(warmup)]
        for m in range(n - warmup):
            actions += [Action(Op.F, r, warmup + m), Action(Op.B, r, m)]
        actions += [Action(Op.B, r, m) for m in range(n - warmup, n)]
        ranks.append((*actions, Action(Op.R, r, ALL_MICROBATCHES)))
    return tuple(ranks)


@pytest.mark.parametrize(("pp", "n"), PAIRS)
def test_1f1b_meets_the_textbook_order(pp, n):
    assert SCHEDULES["1f1b"](pp, n, 1).actions == textbook_1f1b(pp, n)


@pytest.mark.parametrize(("pp", "n"), PAIRS)
def test_gpipe_does_all_forwards_before_any_backward(pp, n):
    for r, actions in enumerate(SCHEDULES["gpipe"](pp, n, 1).actions):
        forwards = [Action(Op.F, r, m) for m in range(n)]
        backwards = [Action(Op.B, r, m) for m in range(n)]
        assert actions == (*forwards, *backwards, Action(Op.R, r, ALL_MICROBATCHES))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_makespan_at_4_ranks_and_8_microbatches_is_33(name):
    assert simulate(SCHEDULES[name](4, 8, 1)).makespan == 33


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("pp", range(1, 9))
def test_bubble_of_one_stage_a_rank_is_the_formula(name, pp):
    for n in range(pp, 3 * pp + 2):
        timeline = simulate(SCHEDULES[name](pp, n, 1))
        assert bubble(timeline) == pytest.approx((pp - 1) / (n + pp - 1), abs=1e-12)


@pytest.mark.parametrize("vpp", [2, 3])
@pytest.mark.parametrize("pp", range(1, 9))
def test_bubble_of_interleaved_is_the_formula_where_pp_divides(pp, vpp):
    for n in range(pp, 6 * pp + 1, pp):
        timeline = simulate(SCHEDULES["interleaved"](pp, n, vpp))
        assert bubble(timeline) == pytest.approx((pp - 1) / (vpp * n + pp - 1), abs=1e-12)


@pytest.mark.parametrize(("pp", "n"), PAIRS)
def test_1f1b_holds_no_more_microbatches_than_ranks_that_follow(pp, n):
    assert peak_live(SCHEDULES["1f1b"](pp, n, 1)) == tuple(min(n, pp - r) for r in range(pp))


def test_any_size_is_legal_and_needs_one_receive_an_edge():
    rng = random.Random(20)
    for _ in range(400):
        name = rng.choice(("gpipe", "1f1b", "interleaved"))
        pp, n = rng.randint(1, 12), rng.randint(1, 30)
        vpp = rng.randint(2, 5) if name == "interleaved" else 1
        schedule = SCHEDULES[name](pp, n, vpp)
        check(schedule, tied=(0, schedule.num_stages - 1))
        assert set(buffers(schedule).values()) <= {1}
        assert schedule.num_stages == pp * vpp


def test_interleaved_takes_microbatches_in_groups_of_pp_and_a_shorter_last_one():
    actions = SCHEDULES["interleaved"](2, 3, 2).actions[0]
    forwards = [str(a) for a in actions if a.op is Op.F]
    assert forwards == ["F0@0", "F1@0", "F0@2", "F1@2", "F2@0", "F2@2"]


def test_reduction_follows_the_stages_last_gradient_at_once():
    for schedule in (SCHEDULES["1f1b"](4, 6, 1), SCHEDULES["interleaved"](4, 8, 3)):
        for stage in range(schedule.num_stages - 1):
            actions = schedule.actions[schedule.placement[stage]]
            at = actions.index(Action(Op.R, stage, ALL_MICROBATCHES))
            assert actions[at - 1] == Action(Op.B, stage, schedule.num_microbatches - 1)


def test_last_stages_reduction_ends_its_rank_so_that_a_tied_table_cannot_block():
    schedule = SCHEDULES["interleaved"](4, 8, 3)
    assert schedule.actions[3][-1] == Action(Op.R, 11, ALL_MICROBATCHES)
    alone = SCHEDULES["interleaved"](1, 2, 2).actions[0]
    assert [str(a) for a in alone if a.op is Op.R] == ["R@1", "R@0"]


def zero_bubble(name: str, pp: int, n: int) -> Schedule:
    """The two split schedules of Qi et al. 2023 (arXiv 2401.10241), in the scheduler's terms."""
    if name == "h1":
        prefer, cap, hold = (Op.F, Op.I, Op.W), lambda r: pp - r, lambda r: pp
    else:
        prefer, cap, hold = (Op.I, Op.F, Op.W), lambda r: 2 * (pp - r) - 1, lambda r: 2 * pp - 1
    return list_schedule(name, n, placement=tuple(range(pp)), prefer=prefer, cap=cap, hold=hold)


def test_list_scheduler_with_split_backward_meets_the_zero_bubble_bound():
    schedule = zero_bubble("h1", 4, 8)
    check(schedule, tied=(0, 3))
    assert simulate(schedule).makespan == 3 * 8 + 4 - 1
    assert peak_live(schedule) == (4, 4, 4, 4)


def test_list_scheduler_with_more_memory_leaves_no_bubble_in_any_ranks_own_span():
    schedule = zero_bubble("h2", 4, 8)
    check(schedule, tied=(0, 3))
    assert own_span_bubble(simulate(schedule)) == pytest.approx(0, abs=1e-12)
    assert max(peak_live(schedule)) == 2 * 4 - 1


def test_list_scheduler_refuses_caps_that_stop_all_progress():
    with pytest.raises(ValueError, match=r"stuck: no rank may go on with 4 actions left"):
        list_schedule("stuck", 2, placement=(0,), prefer=(Op.B, Op.F), cap=lambda rank: 0)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_chunks_are_refused_where_a_rank_has_one_stage(name):
    with pytest.raises(ValueError, match=rf"^{name} .* --vpp 2 \(use --schedule interleaved"):
        SCHEDULES[name](4, 8, 2)


def test_interleaved_without_chunks_is_refused():
    with pytest.raises(ValueError, match=r"--vpp 1 \(use --vpp 2, or --schedule 1f1b\)"):
        SCHEDULES["interleaved"](4, 8, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_microbatches_are_refused_with_the_flags_that_give_some(name):
    with pytest.raises(ValueError, match="got 0 .raise --global-batch-size"):
        SCHEDULES[name](2, 0, 2 if name == "interleaved" else 1)
