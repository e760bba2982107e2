from megalite.schedule.action import (
    ALL_MICROBATCHES,
    Action,
    Message,
    Op,
    Schedule,
    at_first_backward,
    edge_order,
    first_microbatches,
    forward_only,
    needs,
    received,
    sent,
)
from megalite.schedule.check import check
from megalite.schedule.generators import SCHEDULES


def split_pair() -> Schedule:
    """Two stages on two ranks, one microbatch, backward in halves."""
    return Schedule(
        "split",
        1,
        (0, 1),
        (
            (Action(Op.F, 0, 0), Action(Op.I, 0, 0), Action(Op.W, 0, 0), Action(Op.R, 0, -1)),
            (Action(Op.F, 1, 0), Action(Op.I, 1, 0), Action(Op.W, 1, 0), Action(Op.R, 1, -1)),
        ),
    )


def test_action_prints_op_microbatch_and_stage():
    assert str(Action(Op.B, 1, 3)) == "B3@1"
    assert str(Action(Op.R, 2, ALL_MICROBATCHES)) == "R@2"
    assert str(Action(Op.R, 2, 5)) == "R5@2"


def test_needs_of_a_forward_is_the_forward_before_it():
    schedule = SCHEDULES["1f1b"](2, 2, 1)
    assert needs(Action(Op.F, 0, 1), schedule) == ()
    assert needs(Action(Op.F, 1, 1), schedule) == (Action(Op.F, 0, 1),)


def test_needs_of_a_backward_is_its_forward_and_the_backward_after_it():
    schedule = SCHEDULES["1f1b"](2, 2, 1)
    assert needs(Action(Op.B, 1, 0), schedule) == (Action(Op.F, 1, 0),)
    assert needs(Action(Op.B, 0, 0), schedule) == (Action(Op.F, 0, 0), Action(Op.B, 1, 0))


def test_needs_of_split_halves_follow_the_input_gradient():
    schedule = split_pair()
    assert needs(Action(Op.I, 0, 0), schedule) == (Action(Op.F, 0, 0), Action(Op.I, 1, 0))
    assert needs(Action(Op.W, 0, 0), schedule) == (Action(Op.I, 0, 0),)
    assert needs(Action(Op.R, 0, -1), schedule) == (Action(Op.W, 0, 0),)


def test_needs_of_a_reduction_is_every_microbatch_or_the_one_it_names():
    schedule = SCHEDULES["gpipe"](2, 3, 1)
    assert needs(Action(Op.R, 1, ALL_MICROBATCHES), schedule) == tuple(
        Action(Op.B, 1, m) for m in range(3)
    )
    assert needs(Action(Op.R, 1, 2), schedule) == (Action(Op.B, 1, 2),)


def test_edge_order_is_the_order_of_the_senders_actions():
    # Rank 0 sends F0 F1 F2, rank 1 does F0 B0 F1 B1 F2 B2.
    assert edge_order(SCHEDULES["1f1b"](2, 3, 1)) == {
        (0, 1): tuple(Message("act", 1, m) for m in range(3)),
        (1, 0): tuple(Message("grad", 0, m) for m in range(3)),
    }


def test_edge_order_mixes_both_kinds_where_chunks_return_to_the_first_rank():
    schedule = SCHEDULES["interleaved"](2, 2, 2)
    backward_edge = edge_order(schedule)[1, 0]
    # Rank 1 does F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1.
    assert backward_edge == (
        Message("act", 2, 0),
        Message("act", 2, 1),
        Message("grad", 2, 0),
        Message("grad", 2, 1),
        Message("grad", 0, 0),
        Message("grad", 0, 1),
    )


def test_edge_order_leaves_out_messages_within_a_rank():
    assert edge_order(SCHEDULES["interleaved"](1, 4, 3)) == {}


def test_sent_and_received_are_two_views_of_each_message():
    schedule = SCHEDULES["interleaved"](3, 7, 2)
    sends, receives = set(), set()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if out := sent(action, schedule):
                sends.add((rank, *out))
            if into := received(action, schedule):
                receives.add((into[0], rank, into[1]))
    # 7 microbatches over the 5 borders of 6 stages, there and back.
    assert len(sends) == 7 * 5 * 2
    assert sends == receives


def test_stages_of_a_rank_are_its_chunks_in_order():
    assert SCHEDULES["interleaved"](3, 3, 2).stages_of(1) == (1, 4)


def test_forward_only_is_a_legal_schedule_of_forwards():
    for schedule in (SCHEDULES["1f1b"](4, 6, 1), SCHEDULES["interleaved"](2, 5, 3), split_pair()):
        kept = forward_only(schedule)
        check(kept, tied=(0, kept.num_stages - 1))
        assert not kept.splits_backward
        assert {a.op for rank in kept.actions for a in rank} == {Op.F}
        assert {m.kind for messages in edge_order(kept).values() for m in messages} == {"act"}


def test_first_microbatches_are_a_legal_schedule_of_fewer():
    for name, vpp in (("1f1b", 1), ("interleaved", 2), ("zb-h2", 1), ("zb-v", 2)):
        whole = SCHEDULES[name](3, 8, vpp)
        for n in range(1, 9):
            kept = first_microbatches(whole, n)
            assert kept.num_microbatches == n
            check(kept, tied=(0, kept.num_stages - 1))
        assert kept == whole


def test_cut_at_the_first_backward_leaves_forwards_that_wait_for_nothing_after_it():
    for name, vpp in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h2", 1), ("zb-v", 2)):
        for pp, n in ((2, 1), (3, 3), (4, 9)):
            whole = SCHEDULES[name](pp, n, vpp)
            head, tail = at_first_backward(whole)
            done = {action for rank in head.actions for action in rank}
            assert all(done.issuperset(needs(action, whole)) for action in done)
            for kept, rest, both in zip(head.actions, tail.actions, whole.actions, strict=True):
                assert kept + rest == both
                assert {action.op for action in kept} <= {Op.F}
                # It goes on to the first backward, or to a forward that one before needs.
                assert rest[0].op is not Op.F or not done.issuperset(needs(rest[0], whole))
    ahead = [len(rank) for rank in at_first_backward(SCHEDULES["zb-h2"](4, 9, 1))[0].actions]
    assert ahead == [7, 5, 3, 1]
