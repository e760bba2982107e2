"""What is run again is right, is run once more only, and is not kept meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.recompute import Parts, again
from tests.live_bytes import LiveBytes

ROWS, SIZE = 64, 32
BYTES = ROWS * SIZE * 8


class Norm(torch.nn.Module):
    """One that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return F.layer_norm(x, (SIZE,), self.weight)


def inputs() -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, SIZE, generator=chance, dtype=torch.float64) for n in (ROWS, SIZE))
    return x.requires_grad_(), w.requires_grad_()


def gradients(names: tuple[str, ...], chained: bool = False) -> tuple[list[Tensor], list[Norm]]:
    x, w = inputs()
    norms = [Norm(), Norm()]
    with Parts(names) as parts:
        y = parts.run("norm", norms[0], (x,))
        if chained:
            y = parts.run("norm", norms[1], (y,))
        y = F.linear(y, w) + x
    y.square().sum().backward()
    used = norms if chained else norms[:1]
    return [x.grad, w.grad, *(n.weight.grad for n in used)], norms


def test_gradients_are_those_of_what_was_kept():
    for chained in (False, True):
        plain, _ = gradients((), chained)
        ours, norms = gradients(("norm",), chained)
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
        assert [n.runs for n in norms] == [2, 2 if chained else 0]


def test_output_of_a_part_is_not_kept_for_the_linear_that_reads_it():
    held = []
    for names in ((), ("norm",)):
        x, w = inputs()
        norm = Norm()
        with LiveBytes() as live:
            before = live.mark()
            with Parts(names) as parts:
                y = F.linear(parts.run("norm", norm, (x,)), w)
            held.append(live.mark() - before)
        assert y.grad_fn is not None
    statistics = 2 * ROWS * 8
    assert held[0] - held[1] == BYTES + statistics


def test_second_run_is_gone_after_backward():
    x, w = inputs()
    norm = Norm()
    with LiveBytes() as live:
        x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)
        norm.weight.grad = torch.zeros_like(norm.weight)
        before = live.mark()
        with Parts(("norm",)) as parts:
            y = F.linear(parts.run("norm", norm, (x,)), w)
        y.backward(torch.ones_like(y))
        assert live.mark() - before == BYTES  # y itself


def test_late_reader_has_the_output_made_again():
    # A product with a detached copy is no consumer to autograd: its backward may come after the
    # norm's own.
    found = []
    for names in ((), ("norm",)):
        x, w = inputs()
        with Parts(names) as parts:
            y = parts.run("norm", Norm(), (x,))
            gate = y.detach() * w.sum(1).mean()
        (y.sum() + gate.square().sum()).backward()
        found.append((x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_storage_made_later_is_never_taken_for_a_part():
    # The part's output dies inside the layer, and its memory is used for another tensor.
    found = []
    for names in ((), ("norm",)):
        x, w = inputs()
        with Parts(names) as parts:
            parts.run("norm", Norm(), (x,))
            y = F.linear(x * 2.0, w)
        y.square().sum().backward()
        found.append((x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_output_that_is_written_to_is_kept_as_it_is():
    found = []
    for names in ((), ("norm",)):
        x, w = inputs()
        with Parts(names) as parts:
            y = F.linear(parts.run("norm", Norm(), (x,)).mul_(3.0), w)
        y.square().sum().backward()
        found.append((x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_input_that_is_written_to_is_refused():
    x, w = inputs()
    stream = x * 1.0
    with Parts(("norm",)) as parts:
        y = F.linear(parts.run("norm", Norm(), (stream,)), w)
        stream.add_(1.0)
    with pytest.raises(AssertionError, match="written to since"):
        y.square().sum().backward()


def test_whole_function_keeps_its_input_alone():
    x, w = inputs()
    norm = Norm()
    again(lambda x: F.linear(norm(x), w), x).square().sum().backward()
    ours = [x.grad, w.grad, norm.weight.grad]
    x, w = inputs()
    norm = Norm()
    F.linear(norm(x), w).square().sum().backward()
    theirs = [x.grad, w.grad, norm.weight.grad]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
