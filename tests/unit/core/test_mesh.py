"""Coordinates, lines and factors of the rank grid; a fake mesh against the list of all lines."""

import time

import pytest
import torch.distributed as dist

from megalite.core.mesh import AXES, Mesh

SIZES = [
    {"tp": 4},
    {"pp": 3},
    {"dp": 5},
    {"tp": 2, "pp": 2, "dp": 2},
    {"tp": 3, "cp": 2, "dp": 2, "pp": 2},
    {"tp": 4, "cp": 2, "dp": 3, "pp": 5},
]


def world_of(sizes):
    world = 1
    for n in sizes.values():
        world *= n
    return world


def test_tensor_parallel_ranks_are_neighbours_and_stages_far_apart():
    mesh = Mesh({"tp": 2, "cp": 2, "dp": 2, "pp": 2}, rank=5, kind="fake")
    assert mesh.coords == {"pp": 0, "dp": 1, "cp": 0, "tp": 1}
    assert [mesh.axis(n).ranks for n in AXES] == [(5, 13), (1, 5), (5, 7), (4, 5)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fake_axis_of_every_rank_is_the_line_it_stands_on(sizes):
    world = world_of(sizes)
    names = [("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), AXES]
    every = Mesh(sizes, kind="fake")
    for rank in range(world):
        mesh = Mesh(sizes, rank=rank, kind="fake")
        for which in names:
            axis = mesh.axis(*which)
            (line,) = [line for line in every.lines(*which) if rank in line]
            assert axis.ranks == line and axis.ranks[axis.idx] == rank
            assert axis.size == len(line)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lines_of_an_axis_cut_the_world_into_equal_parts(sizes):
    mesh = Mesh(sizes, kind="fake")
    for which in (("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), AXES):
        lines = mesh.lines(*which)
        assert sorted(r for line in lines for r in line) == list(range(mesh.world_size))
        assert len({len(line) for line in lines}) == 1


def test_factored_axis_puts_replicas_of_a_head_side_by_side():
    found = {}
    for rank in range(6):
        axes = Mesh({"tp": 6}, rank=rank, kind="fake", factors={"tp": 2}).axes
        found[rank] = axes["tp.kv"].ranks, axes["tp.rep"].ranks
        kv, rep = axes["tp.kv"], axes["tp.rep"]
        assert kv.idx * rep.size + rep.idx == axes["tp"].idx == rank
    assert found[4] == ((1, 4), (3, 4, 5)) and found[0] == ((0, 3), (0, 1, 2))


def test_factor_names_are_found_by_whoever_holds_the_axis():
    tp = Mesh({"tp": 4}, kind="fake", factors={"tp": 2}).axis("tp")
    assert set(tp.named) == {"tp", "tp.kv", "tp.rep"}


def test_tie_joins_the_first_and_last_pipeline_rank_of_a_line():
    mesh = Mesh({"pp": 3, "tp": 2}, rank=5, kind="fake")
    assert mesh.tie is not None and mesh.tie.ranks == (1, 5)
    one = Mesh({"tp": 2}, rank=1, kind="fake").tie
    assert one is not None and one.ranks == (1,)


def test_pipeline_rank_keeps_the_other_coordinates():
    mesh = Mesh({"pp": 3, "dp": 2, "tp": 2}, rank=6, kind="fake")
    assert [mesh.pipeline_rank(p) for p in range(3)] == [2, 6, 10]


def test_fake_world_of_16384_is_quick_and_makes_no_process_group():
    began = time.process_time()
    mesh = Mesh({"tp": 8, "pp": 16, "dp": 128}, rank=9999, kind="fake", factors={"tp": 2})
    assert time.process_time() - began < 0.8
    assert mesh.world_size == 16384 and mesh.world.is_fake and not dist.is_initialized()
    assert all(axis.group is None for axis in (*mesh.axes.values(), mesh.world))


def test_mesh_refuses_a_rank_outside_and_a_single_mesh_of_many():
    with pytest.raises(AssertionError):
        Mesh({"tp": 2}, rank=2, kind="fake")
    with pytest.raises(AssertionError):
        Mesh({"tp": 2})


def test_combined_axis_that_was_not_made_is_a_key_error():
    with pytest.raises(KeyError):
        Mesh({}).axis("tp", "dp")
