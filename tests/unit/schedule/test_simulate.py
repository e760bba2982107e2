import pytest

from megalite.schedule import check as check_module
from megalite.schedule.action import Action, Message, Op, Schedule, forward_only
from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import (
    bubble,
    own_span_bubble,
    peak_live,
    simulate,
    text_chart,
)


def test_one_microbatch_takes_the_sum_of_its_path():
    timeline = simulate(SCHEDULES["1f1b"](3, 1, 1), {Op.F: 1.0, Op.B: 2.5})
    assert timeline.makespan == 3 * (1.0 + 2.5)
    assert timeline.spans[Action(Op.F, 2, 0)] == (2.0, 3.0)
    assert timeline.spans[Action(Op.B, 0, 0)] == (8.0, 10.5)


def test_cost_may_depend_on_the_stage():
    schedule = SCHEDULES["gpipe"](2, 3, 1)
    seconds = {Op.F: (1.0, 4.0), Op.B: (2.0, 8.0), Op.R: (0.0, 0.5)}
    timeline = simulate(schedule, lambda a: seconds[a.op][a.stage])
    # Stage 1 is the slow one: it starts at 1, works 3 x (4 + 8), then stage 0 does one backward.
    assert timeline.makespan == 1 + 3 * 12 + 2
    assert timeline.busy(1) == 36.5


def test_comm_is_paid_once_a_border_in_each_direction():
    schedule = SCHEDULES["1f1b"](4, 1, 1)
    assert simulate(schedule, comm=0.25).makespan == 4 * 3 + 6 * 0.25


def test_comm_is_not_paid_between_stages_of_one_rank():
    assert simulate(SCHEDULES["interleaved"](1, 3, 2), comm=9.0).makespan == 3 * 2 * 3


def test_comm_may_depend_on_the_ranks_and_the_message():
    asked = []

    def seconds(source: int, target: int, message: Message) -> float:
        asked.append((source, target, message))
        return 1.0 if message.kind == "act" else 10.0

    assert simulate(SCHEDULES["1f1b"](2, 1, 1), comm=seconds).makespan == 2 * 3 + 11
    assert asked == [(0, 1, Message("act", 1, 0)), (1, 0, Message("grad", 0, 0))]


def test_missing_cost_is_named():
    with pytest.raises(ValueError, match="1f1b: no cost is given for B"):
        simulate(SCHEDULES["1f1b"](2, 2, 1), {Op.F: 1.0})


def test_a_deadlock_raises_instead_of_giving_times():
    schedule = Schedule("bad", 1, (0,), ((Action(Op.B, 0, 0), Action(Op.F, 0, 0)),))
    with pytest.raises(ValueError, match="bad: deadlock: rank 0 waits at B0@0 for F0@0 of rank 0"):
        simulate(schedule)


def test_timeline_of_a_rank_is_its_list_without_overlap():
    schedule = SCHEDULES["interleaved"](3, 7, 2)
    timeline = simulate(schedule, comm=0.125)
    for rank, actions in enumerate(schedule.actions):
        rows = timeline.of_rank(rank)
        assert [action for action, _, _ in rows] == list(actions)
        assert all(before[2] <= after[1] for before, after in zip(rows, rows[1:], strict=False))


def test_bubble_counts_all_waiting_and_own_span_only_what_lies_inside():
    timeline = simulate(SCHEDULES["1f1b"](2, 1, 1))
    # F F B B over two ranks in 6: rank 0 works 3 of 6, rank 1 works 3 of its own 3.
    assert bubble(timeline) == pytest.approx(0.5)
    assert own_span_bubble(timeline) == pytest.approx(0.5)
    alone = simulate(forward_only(SCHEDULES["1f1b"](2, 1, 1)))
    assert bubble(alone) == pytest.approx(0.5)
    assert own_span_bubble(alone) == 0.0


def test_peak_live_counts_each_chunk():
    # Warmup of 2 (pp - 1 - r) + pp (v - 1) forwards, and one more before the first backward.
    assert peak_live(SCHEDULES["interleaved"](4, 8, 2)) == (11, 9, 7, 5)


@pytest.mark.parametrize(
    ("name", "pp", "n", "vpp"),
    [("1f1b", 64, 512, 1), ("gpipe", 16, 128, 1), ("interleaved", 16, 64, 4)],
)
def test_simulation_visits_each_action_at_most_twice(monkeypatch, name, pp, n, vpp):
    schedule = SCHEDULES[name](pp, n, vpp)
    visits = 0
    real = check_module.needs

    def counting(action, schedule):
        nonlocal visits
        visits += 1
        return real(action, schedule)

    monkeypatch.setattr(check_module, "needs", counting)
    timeline = simulate(schedule)
    total = sum(map(len, schedule.actions))
    assert len(timeline.spans) == total
    # Once when it runs, and once before that if its rank had to wait for another rank there.
    assert total <= visits <= 2 * total


def test_text_chart_puts_every_action_where_it_happens():
    assert text_chart(simulate(SCHEDULES["1f1b"](2, 3, 1))).splitlines() == [
        "rank 0 |F0|F1|......B0---|F2|B1---|...B2---|",
        "rank 1 |...F0|B0---|F1|B1---|F2|B2---|......",
    ]


def test_text_chart_names_the_chunk_where_a_rank_has_more_than_one():
    row = text_chart(simulate(SCHEDULES["interleaved"](1, 1, 2)))
    assert row == "rank 0 |F0.0|F0.1|B0.1-----|B0.0-----|"
