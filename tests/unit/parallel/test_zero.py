"""When a bucket's reduction starts, on one rank. What it sums over real ranks: the oracle."""

import pytest
import torch
from torch import nn

from megalite.core.mesh import Mesh
from megalite.core.params import constant, initialize, new_param
from megalite.core.shard import whole
from megalite.core.unit import Unit, plainly
from megalite.parallel.zero import Zero

ALL_IN_ONE = 1e9


def zero_of(*names, stage=1, mesh=None, bucket_bytes=ALL_IN_ONE):
    mesh = mesh or Mesh({})
    module = Stage({name: new_param(whole(64), mesh.axes, init=constant(1.0)) for name in names})
    zero = Zero(
        {0: module}, mesh, stage=stage, bucket_bytes=bucket_bytes, device=torch.device("cpu")
    )
    initialize(module, 1)
    return module, zero


class Stage(nn.ParameterDict):
    """A unit of each parameter, which multiplies by it."""

    run_unit = staticmethod(plainly)

    def units(self):
        return [Unit(name, lambda x, call, w=w: w * x, (w,)) for name, w in self.items()]


def reductions(zero):
    return [e.op for e in zero.mesh.log.entries]


def test_reduction_starts_with_the_last_contribution_of_the_step():
    module, zero = zero_of("a", "b", mesh=Mesh({"dp": 2}, kind="fake"))
    zero.begin(2)
    for _ in range(2):
        assert reductions(zero) == []
        module.a.sum().backward()
        module.b.sum().backward()
    assert reductions(zero) == ["reduce_scatter"]
    zero.reduce(0)  # nothing is left for R
    zero.finish()
    assert reductions(zero) == ["reduce_scatter"]


def test_r_starts_what_an_unused_parameter_held_back():
    module, zero = zero_of("a", "unused", mesh=Mesh({"dp": 2}, kind="fake"), stage=0)
    zero.begin(1)
    module.a.sum().backward()
    assert reductions(zero) == []
    zero.reduce(7)  # another stage's R
    assert reductions(zero) == []
    zero.reduce(0)
    zero.finish()
    assert reductions(zero) == ["all_reduce"]


def test_finish_without_r_is_refused():
    _, zero = zero_of("a")
    zero.begin(1)
    with pytest.raises(AssertionError, match="R was not run"):
        zero.finish()


def test_contribution_beyond_those_counted_is_refused():
    module, zero = zero_of("a")
    zero.begin(1)
    module.a.sum().backward()
    with pytest.raises(AssertionError, match="more often"):
        module.a.sum().backward()


def test_begin_clears_the_gradients_of_the_step_before():
    module, zero = zero_of("a")
    for _ in range(2):
        zero.begin(1)
        module.a.sum().backward()
        zero.finish()
        assert module.a.grad.tolist() == [1.0] * 64


def test_ranks_update_their_range_in_stage_1_and_everything_in_stage_0():
    mesh = Mesh({"dp": 4}, rank=2, kind="fake")
    for stage, updated in ((0, (0, 256)), (1, (128, 192))):
        _, zero = zero_of("a", "b", "c", stage=stage, mesh=mesh)
        (bucket,) = zero.buckets
        assert zero.my_range(bucket) == (128, 192) and bucket.updated == updated
        assert bucket.grads.numel() == updated[1] - updated[0]


def test_stage_2_holds_whole_gradients_of_two_microbatches_at_most():
    mesh = Mesh({"dp": 4}, rank=1, kind="fake")
    module, zero = zero_of("a", "b", stage=2, mesh=mesh)
    (bucket,) = zero.buckets
    zero.begin(5)
    for microbatch in range(5):
        zero.enter(microbatch)
        module.a.sum().backward()
        module.b.sum().backward()
    zero.reduce(0)
    zero.finish()
    assert module.a.grad is None and bucket.whole_grads is None
    assert bucket.grads.numel() == bucket.layout.size // 4
    assert reductions(zero) == ["reduce_scatter"] * 5
    assert len(zero._spare[bucket.layout.size]) == 2


def test_stage_2_on_one_rank_sums_what_stage_0_sums():
    found = []
    for stage in (0, 2):
        module, zero = zero_of("a", "b", stage=stage)
        zero.begin(3)
        for microbatch in range(3):
            zero.enter(microbatch)
            ((microbatch + 1) * module.a * module.b).sum().backward()
        zero.reduce(0)
        zero.finish()
        found.append(zero.buckets[0].grads.clone())
    assert torch.equal(*found)


def under_way(zero):
    return [b.layout.slots[0].name for b in zero.buckets if b.gathering is not None]


@pytest.mark.parametrize("stage", [1, 2])
def test_gather_after_an_update_ends_where_its_unit_runs(stage):
    mesh = Mesh({"dp": 2}, kind="fake")
    module, zero = zero_of("a", "b", "c", stage=stage, mesh=mesh, bucket_bytes=1)
    assert under_way(zero) == []
    zero.gather_params()
    assert reductions(zero) == ["all_gather"] * 3 and under_way(zero) == ["c", "b", "a"]
    x = torch.ones(64)
    for unit, left in zip(module.units(), (["c", "b"], ["c"], []), strict=True):
        module.run_unit(unit, x, None)
        assert under_way(zero) == left
    assert reductions(zero) == ["all_gather"] * 3


def test_whole_params_waits_for_the_gathers_after_an_update():
    _, zero = zero_of("a", "b", mesh=Mesh({"dp": 2}, kind="fake"))
    zero.gather_params()
    with zero.whole_params():
        assert under_way(zero) == []
