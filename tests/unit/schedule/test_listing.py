import pytest

from megalite.schedule.action import ALL_MICROBATCHES, Action, Op
from megalite.schedule.listing import list_schedule, with_reductions
from megalite.schedule.simulate import peak_live


def test_preferred_op_goes_first_where_both_are_ready():
    forwards, backwards = (
        list_schedule("one", 2, placement=(0,), prefer=prefer, cap=lambda rank: 2).actions[0]
        for prefer in ((Op.F, Op.B), (Op.B, Op.F))
    )
    assert " ".join(map(str, forwards)) == "F0@0 F1@0 B0@0 B1@0 R@0"
    assert " ".join(map(str, backwards)) == "F0@0 B0@0 F1@0 B1@0 R@0"


def test_hold_bounds_the_microbatches_whose_weight_gradients_wait():
    prefer = (Op.F, Op.I, Op.W)
    for hold in (1, 2, 5):
        schedule = list_schedule(
            "held",
            8,
            placement=(0, 1),
            prefer=prefer,
            cap=lambda rank: 8,
            hold=lambda rank, hold=hold: hold,
        )
        assert max(peak_live(schedule)) == hold


def test_list_scheduler_refuses_caps_that_stop_all_progress():
    with pytest.raises(ValueError, match=r"stuck: no rank may go on with 4 actions left"):
        list_schedule("stuck", 2, placement=(0,), prefer=(Op.B, Op.F), cap=lambda rank: 0)


def test_last_stages_reduction_waits_for_the_end_only_where_stage_0_lives_elsewhere():
    backwards = [Action(Op.B, 1, 0), Action(Op.B, 0, 0)]
    here = with_reductions([backwards], (0, 0))
    assert " ".join(map(str, here[0])) == "B0@1 R@1 B0@0 R@0"
    order = [[Action(Op.B, 0, 0)], [Action(Op.B, 1, 0), Action(Op.F, 1, 0)]]
    apart = with_reductions(order, (0, 1))
    assert apart[1][-1] == Action(Op.R, 1, ALL_MICROBATCHES)
    assert apart[1][1] == order[1][1]
