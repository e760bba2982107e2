import dataclasses
import random

import pytest

from megalite.schedule.action import Action, Op, Schedule, edge_order, received
from megalite.schedule.check import DEFAULT_CAP, buffers, check, walk
from megalite.schedule.generators import SCHEDULES


def parse(text: str) -> Action:
    """The Action that prints as `text`."""
    which, stage = text[1:].split("@")
    return Action(Op(text[0]), int(stage), int(which) if which else -1)


def written(name: str, num_microbatches: int, placement: tuple[int, ...], *ranks: str) -> Schedule:
    """A schedule given as one line of action names a rank."""
    actions = tuple(tuple(map(parse, rank.split())) for rank in ranks)
    return Schedule(name, num_microbatches, placement, actions)


def refusal(schedule: Schedule, **options) -> str:
    """The text with which `schedule` is refused."""
    with pytest.raises(ValueError) as caught:
        check(schedule, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def with_rank(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> Schedule:
    """`schedule` with another list for one rank."""
    lists = list(schedule.actions)
    lists[rank] = actions
    return dataclasses.replace(schedule, actions=tuple(lists))


def test_swapped_order_is_refused_naming_where_each_rank_waits():
    crossed = written(
        "mine",
        2,
        (0, 1),
        "F0@0 B0@0 F1@0 B1@0 R@0",
        "F0@1 F1@1 B0@1 B1@1 R@1",
    )
    assert refusal(crossed) == (
        "mine: deadlock: rank 0 waits at B0@0 for B0@1 of rank 1; "
        "rank 1 waits at F1@1 for F1@0 of rank 0"
    )


def test_deadlock_names_every_stuck_rank_and_no_other():
    # Rank 2 starves behind the other two; rank 3 has stage 0, and ends before they meet.
    cross = written(
        "four",
        2,
        (3, 0, 1, 2),
        "F0@1 B0@1 F1@1 B1@1 R@1",
        "F0@2 F1@2 B0@2 B1@2 R@2",
        "F0@3 B0@3 F1@3 B1@3 R@3",
        "F0@0 F1@0 B0@0 B1@0 R@0",
    )
    assert refusal(cross) == (
        "four: deadlock: rank 0 waits at B0@1 for B0@2 of rank 1; "
        "rank 1 waits at F1@2 for F1@1 of rank 0; "
        "rank 2 waits at F1@3 for F1@2 of rank 1; "
        "rank 3 waits at B0@0 for B0@1 of rank 0"
    )


def test_finished_ranks_are_not_named_in_a_deadlock():
    schedule = written(
        "part",
        1,
        (0, 1, 2),
        "F0@0",
        "F0@1 B0@1",
        "F0@2 B0@2",
    )
    # Not complete, but the walk itself must say that rank 0 is through.
    with pytest.raises(ValueError) as caught:
        list(walk(with_rank(schedule, 2, (parse("B0@2"),))))
    assert str(caught.value) == (
        "part: deadlock: rank 1 waits at B0@1 for B0@2 of rank 2; "
        "rank 2 waits at B0@2 for F0@2 of rank 2"
    )


def test_missing_action_is_refused():
    whole = SCHEDULES["1f1b"](2, 4, 1)
    for action in whole.actions[1]:
        kept = tuple(a for a in whole.actions[1] if a != action)
        assert refusal(with_rank(whole, 1, kept)) == f"1f1b: {action} missing"


def test_doubled_action_is_refused():
    whole = SCHEDULES["1f1b"](2, 4, 1)
    for action in whole.actions[1]:
        doubled = (*whole.actions[1], action)
        assert refusal(with_rank(whole, 1, doubled)) == f"1f1b: rank 1 does {action} 2 times"


def test_action_on_a_rank_that_has_not_its_stage_is_refused():
    whole = SCHEDULES["gpipe"](2, 1, 1)
    moved = with_rank(whole, 0, (*whole.actions[0], parse("F0@1")))
    moved = with_rank(moved, 1, tuple(a for a in moved.actions[1] if a != parse("F0@1")))
    assert refusal(moved) == "gpipe: F0@1 is on rank 0, but its stage lives on rank 1"


@pytest.mark.parametrize("stranger", ["F4@0", "F0@2", "W0@0", "R0@0"])
def test_action_outside_the_schedule_is_refused(stranger):
    whole = SCHEDULES["1f1b"](2, 4, 1)
    text = refusal(with_rank(whole, 0, (parse(stranger), *whole.actions[0])))
    assert text.startswith("1f1b: rank 0 has ")
    if stranger != "W0@0":
        assert text == (
            f"1f1b: rank 0 has {stranger}, which is none of the actions B, F, R of "
            "4 microbatches on 2 stages"
        )


def test_rank_without_a_stage_is_refused():
    whole = SCHEDULES["1f1b"](2, 2, 1)
    idle = dataclasses.replace(whole, actions=(*whole.actions, ()))
    assert "each rank holds a stage or more" in refusal(idle)


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        ("B0@0 F0@0 R@0", "rank 0 does B0@0 before F0@0"),
        ("F0@0 R@0 B0@0", "rank 0 does R@0 before B0@0"),
        ("F0@0 W0@0 I0@0 R@0", "rank 0 does W0@0 before I0@0"),
        ("F0@0 I0@0 R@0 W0@0", "rank 0 does R@0 before W0@0"),
    ],
)
def test_order_within_a_rank_is_checked(actions, text):
    assert refusal(written("one", 1, (0,), actions)) == f"one: {text}"


def test_random_swaps_on_one_rank_are_refused_or_still_run():
    # A swap never makes a wrong schedule pass: what passes is executed here by a naive scan.
    rng = random.Random(5)
    refused = 0
    for _ in range(300):
        whole = SCHEDULES["1f1b"](3, 4, 1)
        rank = rng.randrange(3)
        actions = list(whole.actions[rank])
        i, j = rng.sample(range(len(actions)), 2)
        actions[i], actions[j] = actions[j], actions[i]
        swapped = with_rank(whole, rank, tuple(actions))
        try:
            check(swapped, cap=100)
            legal = True
        except ValueError:
            legal = False
        assert legal == runs_to_the_end(swapped)
        refused += not legal
    assert 0 < refused < 300


def runs_to_the_end(schedule: Schedule) -> bool:
    """Try every rank's next action over and over, by the rules of a pipeline spelled out."""
    last, n = schedule.num_stages - 1, schedule.num_microbatches
    done: set[tuple[str, int, int]] = set()
    at = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            if at[rank] == len(actions):
                continue
            op, stage, m = actions[at[rank]]
            ready = {
                "F": stage == 0 or ("F", stage - 1, m) in done,
                "B": ("F", stage, m) in done and (stage == last or ("B", stage + 1, m) in done),
                "R": all(("B", stage, i) in done for i in range(n)),
            }[op.value]
            if ready:
                done.add((op.value, stage, m))
                at[rank] += 1
                moved = True
    return all(at[r] == len(actions) for r, actions in enumerate(schedule.actions))


def reversed_backward(n: int) -> Schedule:
    """Rank 1 sends gradients first to last, rank 0 uses them last to first."""
    return written(
        "reversed",
        n,
        (0, 1),
        " ".join([f"F{m}@0" for m in range(n)] + [f"B{m}@0" for m in reversed(range(n))] + ["R@0"]),
        " ".join([f"F{m}@1" for m in range(n)] + [f"B{m}@1" for m in range(n)] + ["R@1"]),
    )


def test_buffers_count_what_lies_unused_while_a_later_message_is_awaited():
    assert buffers(reversed_backward(5)) == {(0, 1): 1, (1, 0): 5}


def test_buffers_are_just_enough_for_a_receiver_that_posts_no_more():
    rng = random.Random(3)
    for _ in range(200):
        whole = SCHEDULES["gpipe"](2, 6, 1)
        backward = [parse(f"B{m}@0") for m in rng.sample(range(6), 6)]
        actions = (*whole.actions[0][:6], *backward, parse("R@0"))
        schedule = with_rank(whole, 0, actions)
        enough = buffers(schedule)[1, 0]
        assert receives_all(schedule, enough)
        assert not receives_all(schedule, enough - 1)


def receives_all(schedule: Schedule, posted: int) -> bool:
    """Whether rank 0 gets through with at most `posted` receives from rank 1 open or unused."""
    arriving = list(edge_order(schedule)[1, 0])
    held: set = set()
    for action in schedule.actions[0]:
        into = received(action, schedule)
        if into is None:
            continue
        while into[1] not in held:
            if len(held) == posted:
                return False
            held.add(arriving.pop(0))
        held.remove(into[1])
    return True


def test_buffers_over_the_cap_are_refused_naming_the_edge():
    check(reversed_backward(DEFAULT_CAP))
    text = refusal(reversed_backward(DEFAULT_CAP + 1))
    assert text.startswith("reversed: rank 0 uses what rank 1 sends so far out of order that 5 ")
    check(reversed_backward(9), cap=9)


EARLY = (
    "early",
    1,
    (0, 1, 0, 1),
    "F0@0 F0@2 B0@2 R@2 B0@0 R@0",
    "F0@1 F0@3 B0@3 R@3 B0@1 R@1",
)


def test_tied_reductions_are_one_collective_and_part_of_the_cycle_check():
    # Rank 1 would wait at the last stage's R for a stage 0 that still needs rank 1's B0@1.
    schedule = written(*EARLY)
    check(schedule)
    assert refusal(schedule, tied=(0, 3)) == (
        "early: deadlock: rank 0 waits at B0@0 for B0@1 of rank 1; "
        "rank 1 waits at R@3 for R@0 of rank 0"
    )


def test_tied_stages_on_one_rank_need_no_collective():
    check(written(*EARLY), tied=(0, 2))


def test_tied_stages_on_one_rank_share_what_the_first_reduces():
    # W0@1 adds to the same table after R@0 has sent it on its way.
    early = written("shared", 1, (0, 0), "F0@0 F0@1 I0@1 I0@0 W0@0 R@0 W0@1 R@1")
    check(early)
    assert refusal(early, tied=(0, 1)) == "shared: rank 0 does R@0 before W0@1"
    late = written("shared", 1, (0, 0), "F0@0 F0@1 I0@1 I0@0 W0@0 W0@1 R@0 R@1")
    check(late, tied=(0, 1))
