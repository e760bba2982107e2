"""A pipeline schedule of your own: one function in a file of yours, nothing of megalite touched.

See it, as a chart or (with --out s.svg) as a picture; then train with it:

    python tools/draw_schedule.py --schedule examples/my_schedule.py:my_schedule \
        --pp 4 --microbatches 8 --text
    examples/launch.sh 2 pretrain --pp 2 --schedule examples/my_schedule.py:my_schedule

A schedule is, for each pipeline rank, the ordered list of what it does. An action is (op, stage,
microbatch), and the ops are

    F  forward                  sends its output to the next stage
    B  backward                 sends the gradient of its input to the stage before
    I  the input half of B      sends that gradient as early as can be
    W  the weight half of B     sends nothing: it can wait until the rank has nothing else to do
    R  reduce the stage's gradients over the data parallel ranks, once all are there

You choose the order and nothing else. Transfers follow from it: a rank that needs what is not yet
there waits for it. Before any process starts, megalite proves that your order can run to the end,
or refuses it with the actions at which ranks would wait for each other.

This one is 1F1B with its weight gradients held back: on rank r, W lags r microbatches behind I. So
gradients reach the first rank sooner, each rank has work for the time in which 1F1B waits, and no
rank holds more than the pp microbatches that the first rank of 1F1B holds anyway.
"""

from megalite.schedule.action import Action, Op, Schedule
from megalite.schedule.listing import with_reductions


def my_schedule(pp: int, num_microbatches: int, vpp: int) -> Schedule:
    """1F1B with W on rank r lagging r microbatches behind I.

    Every rank calls it with the same numbers and must get the same. It is asked for other numbers
    of microbatches than a training step has, too: one for a sample, a few to finish an evaluation.
    """
    if vpp != 1:
        raise ValueError(f"this schedule has one stage a rank, got --vpp {vpp} (use --vpp 1)")
    n, order = num_microbatches, []
    for rank in range(pp):
        stage, lag, warmup = rank, rank, pp - rank
        actions = [Action(Op.F, stage, m) for m in range(min(warmup, n))]
        for m in range(n):
            actions.append(Action(Op.I, stage, m))
            if m >= lag:
                actions.append(Action(Op.W, stage, m - lag))
            if m + warmup < n:
                actions.append(Action(Op.F, stage, m + warmup))
        actions += [Action(Op.W, stage, m) for m in range(max(n - lag, 0), n)]
        order.append(actions)
    placement = tuple(range(pp))  # the rank of each stage; with more stages, a rank is named again
    # This adds each stage's R where it is early and safe. You may place it yourself.
    return Schedule("lagging-w", n, placement, with_reductions(order, placement))
