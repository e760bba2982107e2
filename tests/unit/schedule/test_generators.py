import random
import sys
from collections.abc import Callable

import pytest

from megalite.schedule.action import ALL_MICROBATCHES, Action, Op, Schedule
from megalite.schedule.generators import CHUNKED, SCHEDULES
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


def test_interleaved_takes_microbatches_in_groups_of_pp_and_a_shorter_last_one():
    actions = SCHEDULES["interleaved"](2, 3, 2).actions[0]
    forwards = [str(a) for a in actions if a.op is Op.F]
    assert forwards == ["F0@0", "F1@0", "F0@2", "F1@2", "F2@0", "F2@2"]


def test_reduction_follows_the_stages_last_gradient_at_once():
    for name, n, vpp, last in (
        ("1f1b", 6, 1, Op.B),
        ("interleaved", 8, 3, Op.B),
        ("zb-h2", 6, 1, Op.W),
        ("zb-v", 8, 2, Op.W),
    ):
        schedule = SCHEDULES[name](4, n, vpp)
        for stage in range(schedule.num_stages - 1):
            actions = schedule.actions[schedule.placement[stage]]
            at = actions.index(Action(Op.R, stage, ALL_MICROBATCHES))
            assert actions[at - 1] == Action(last, stage, n - 1)


def test_last_stages_reduction_ends_its_rank_so_that_a_tied_table_cannot_block():
    schedule = SCHEDULES["interleaved"](4, 8, 3)
    assert schedule.actions[3][-1] == Action(Op.R, 11, ALL_MICROBATCHES)
    assert SCHEDULES["zb-h1"](4, 8, 1).actions[3][-1] == Action(Op.R, 3, ALL_MICROBATCHES)
    alone = SCHEDULES["interleaved"](1, 2, 2).actions[0]
    assert [str(a) for a in alone if a.op is Op.R] == ["R@1", "R@0"]


def test_zb_h1_meets_the_paper_bound():
    schedule = SCHEDULES["zb-h1"](4, 8, 1)
    assert simulate(schedule).makespan == 3 * 8 + 4 - 1
    assert peak_live(schedule) == (4, 4, 4, 4)


def test_zb_h2_leaves_no_bubble_in_any_ranks_own_span_for_twice_the_memory():
    schedule = SCHEDULES["zb-h2"](4, 8, 1)
    assert own_span_bubble(simulate(schedule)) == pytest.approx(0, abs=1e-12)
    assert max(peak_live(schedule)) == 2 * 4 - 1


def test_zb_v_leaves_no_bubble_in_any_ranks_own_span_in_the_memory_of_1f1b():
    schedule = SCHEDULES["zb-v"](4, 8, 2)
    assert schedule.placement == (0, 1, 2, 3, 3, 2, 1, 0)
    assert own_span_bubble(simulate(schedule)) == pytest.approx(0, abs=1e-12)
    # Of stages half as large as those of 1f1b, whose first rank holds 4.
    assert peak_live(schedule) == (8, 8, 8, 8)


def test_zb_v_is_the_pattern_of_the_paper_on_two_ranks():
    rows = [" ".join(map(str, rank)) for rank in SCHEDULES["zb-v"](2, 3, 2).actions]
    assert rows == [
        "F0@0 F1@0 F2@0 F0@3 I0@3 W0@3 F1@3 I1@3 W1@3 I0@0 W0@0 F2@3 I2@3 W2@3 R@3 "
        "I1@0 W1@0 I2@0 W2@0 R@0",
        "F0@1 F0@2 F1@1 F1@2 I0@2 W0@2 F2@1 I0@1 W0@1 F2@2 I1@2 W1@2 "
        "I1@1 I2@2 I2@1 W1@1 W2@2 R@2 W2@1 R@1",
    ]


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2", "zb-v"])
def test_zero_bubble_is_no_slower_than_1f1b_where_halves_and_transfers_cost_what_they_like(name):
    rng = random.Random(11)
    for _ in range(30):
        pp, n, vpp = rng.randint(2, 6), rng.randint(1, 16), 2 if name == "zb-v" else 1
        i, w, comm = rng.uniform(0.8, 1.4), rng.uniform(0.6, 1.1), rng.choice((0.0, 0.05, 0.2))
        whole = {Op.F: 1.0, Op.B: i + w}
        halves = {Op.F: 1.0 / vpp, Op.I: i / vpp, Op.W: w / vpp}
        base = simulate(SCHEDULES["1f1b"](pp, n, 1), whole, comm=comm).makespan
        ours = simulate(SCHEDULES[name](pp, n, vpp), halves, comm=comm).makespan
        assert ours <= base + 1e-9, (pp, n, i, w, comm)


def lines_run(make: Callable[[int, int, int], Schedule], pp: int, n: int, vpp: int) -> int:
    """Lines of Python that making a schedule runs through."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        make(pp, n, vpp)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("name", SCHEDULES)
def test_work_of_a_generator_grows_with_its_actions(name):
    vpp = 2 if name in CHUNKED else 1
    few, many = (lines_run(SCHEDULES[name], 4 * k, 16 * k, vpp) for k in (1, 3))
    assert many < 1.3 * 9 * few


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
def test_chunks_are_refused_where_a_rank_has_one_stage(name):
    with pytest.raises(ValueError, match=rf"^{name} .* --vpp 2 \(use --schedule interleaved"):
        SCHEDULES[name](4, 8, 2)


def test_interleaved_without_chunks_is_refused():
    with pytest.raises(ValueError, match=r"--vpp 1 \(use --vpp 2, or --schedule 1f1b\)"):
        SCHEDULES["interleaved"](4, 8, 1)


@pytest.mark.parametrize("vpp", [1, 3])
def test_zb_v_with_other_than_two_chunks_is_refused(vpp):
    with pytest.raises(ValueError, match=rf"zb-v .* got --vpp {vpp} \(use --vpp 2\)"):
        SCHEDULES["zb-v"](4, 8, vpp)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_microbatches_are_refused_with_the_flags_that_give_some(name):
    with pytest.raises(ValueError, match="got 0 .raise --global-batch-size"):
        SCHEDULES[name](2, 0, 2 if name in CHUNKED else 1)
