"""What all tests share: ranks on this machine, forked from one warm process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks.client import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--every-row`: the whole oracle."""
    parser.addoption("--every-row", action="store_true", help="run every row of the oracle")


def pytest_report_header(config: pytest.Config) -> str:
    """Say which form of the oracle this is."""
    every = config.getoption("every_row")
    return "oracle: every row" if every else "oracle: everyday rows (--every-row runs all of them)"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one a core, but few, as a test may start eight ranks."""
    return min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The warm process; it starts with the first test that needs ranks."""
    warm = Ranks()
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def run_ranks(ranks: Ranks) -> Callable[..., list[Any]]:
    """`run_ranks(target, world, timeout=60, **kwargs)`: each rank's result, in rank order.

    `target` is "module:function", called as function(rank, world, **kwargs) on every rank. Raises
    AssertionError with the tracebacks of the ranks that failed.
    """

    def run(target: str, world: int, timeout: float = 60, **kwargs: Any) -> list[Any]:
        return ranks.results(target, world, kwargs=kwargs, timeout=timeout)

    return run
