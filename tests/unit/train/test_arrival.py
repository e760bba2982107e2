"""A step's scalars as numbers of the host, and how long steps took that were launched ahead."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megalite.core.comm import Pending
from megalite.train.arrival import Arrival
from megalite.train.loop import Reduced
from megalite.train.step_log import StepLog

CPU = torch.device("cpu")


def pending(*numbers: float) -> Pending:
    return Pending((), None, lambda: torch.tensor(numbers, dtype=torch.float64))


def test_numbers_are_those_of_the_step():
    found = Reduced(expected=8, sums=pending(9.0, 12.0, 1.0, 4.0, 6.0, 3.0, 0.5))
    read = Arrival(found, CPU, prefers=True).read()
    assert read == {
        "loss": 3.0, "norm": 6.0, "stop": 1.0, "tokens": 6.0, "preferred": 0.75, "margin": 0.125
    }  # fmt: skip
    assert set(Arrival(found, CPU, prefers=False).read()) == {"loss", "norm", "stop", "tokens"}


def test_tokens_counted_before_the_sums_do_not_wait_for_them():
    def never() -> torch.Tensor:
        raise AssertionError("waited for the sums of all ranks")

    found = Reduced(expected=8, sums=Pending((), None, never), counted=pending(4.0, 6.0))
    arrival = Arrival(found, CPU, prefers=False)
    assert arrival.tokens == 6 and arrival.at is not None


def test_step_launched_ahead_takes_the_time_since_the_one_before_had_ended():
    run, times = SimpleNamespace(_arrived=0.0), []
    for began, at in ((5.0, 15.0), (6.0, 19.0), (25.0, 26.0)):
        taken = SimpleNamespace(began=began, arrival=SimpleNamespace(at=at))
        times.append(StepLog._seconds(run, taken))
    assert times == [10.0, 4.0, 1.0]
