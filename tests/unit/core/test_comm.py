"""Collectives with nobody to talk to: one rank, and a fake axis. Real ranks: tests/ranks."""

import pytest
import torch

from megalite.core import comm
from megalite.core.log import CollectiveLog
from megalite.core.mesh import Axis

ALONE = Axis("tp")
PAIRS = (comm.replicate, comm.reduce, comm.gather, comm.scatter_sum, comm.all_to_all)


def fake_axis(n=4):
    return Axis("tp", n, 1, tuple(range(n)), CollectiveLog())


@pytest.mark.parametrize("pair", PAIRS, ids=lambda f: f.__name__)
def test_autograd_pair_on_one_rank_is_the_identity(pair):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = pair(x, ALONE)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y, x, torch.arange(12.0, dtype=torch.float64).view(4, 3))
    assert grad.flatten().tolist() == list(range(12))


def test_collectives_of_one_rank_are_the_identity_and_are_not_logged():
    axis, x = Axis("tp", log=CollectiveLog()), torch.randn(4, 3)
    for y in (
        comm.all_reduce(x, axis),
        comm.all_gather(x, axis),
        comm.all_gather(x, axis, dim=1),
        comm.reduce_scatter(x, axis),
        comm.all_to_all(x, axis),
        comm.shift_start(x, axis).wait(),
        comm.broadcast(x, axis),
    ):
        assert y is x or torch.equal(y, x)
    assert comm.any_true(True, axis) and not comm.any_true(False, axis)
    assert axis.log.total == 0


def test_all_gather_of_one_rank_fills_the_given_output():
    out = torch.zeros(3)
    assert comm.all_gather_start(torch.ones(3), ALONE, out=out).wait() is out
    assert out.tolist() == [1, 1, 1]


def test_fake_axis_answers_with_the_shapes_of_a_real_one():
    axis, x = fake_axis(), torch.zeros(8, 6)
    assert comm.all_reduce(x, axis).shape == (8, 6)
    assert comm.all_gather(x, axis).shape == (32, 6)
    assert comm.all_gather(x, axis, dim=1).shape == (8, 24)
    assert comm.reduce_scatter(x, axis).shape == (2, 6)
    assert comm.broadcast(x, axis).shape == (8, 6)
    assert comm.all_to_all(x, axis).shape == (8, 6)
    assert comm.shift_start(x, axis).wait().shape == (8, 6)
    assert comm.any_true(True, axis)


def test_fake_axis_logs_every_call_as_done():
    axis, x = fake_axis(), torch.zeros(8, 6)
    comm.all_reduce(x, axis)
    comm.all_gather(x, axis)
    comm.reduce_scatter(x, axis)
    comm.broadcast(x, axis)
    comm.all_to_all(x, axis)
    comm.shift_start(x, axis).wait()
    seen = [(e.seq, e.op, e.axis, e.size, e.nbytes, e.completed) for e in axis.log.entries]
    assert seen == [
        (0, "all_reduce", "tp", 4, 192, True),
        (1, "all_gather", "tp", 4, 768, True),
        (2, "reduce_scatter", "tp", 4, 192, True),
        (3, "broadcast", "tp", 4, 192, True),
        (4, "all_to_all", "tp", 4, 192, True),
        (5, "shift", "tp", 4, 192, True),
    ]


def test_log_names_the_line_that_asked_not_comm():
    axis = fake_axis()
    comm.reduce_scatter(torch.zeros(4), axis)
    assert "test_comm.py:" in axis.log.entries[0].site


def test_log_keeps_the_newest_and_counts_all():
    log = CollectiveLog(keep=3)
    for _ in range(5):
        log.issue("send", "send", "pp:0-1", 2, 8)
    assert log.total == 5 and [e.seq for e in log.entries] == [2, 3, 4]
    assert [e.seq for e in log.since(4)] == [4]


@pytest.mark.parametrize("cut", [comm.reduce_scatter, comm.all_to_all], ids=lambda f: f.__name__)
def test_cutting_collective_refuses_rows_that_do_not_divide(cut):
    with pytest.raises(AssertionError):
        cut(torch.zeros(6), fake_axis())
