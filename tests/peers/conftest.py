"""A server for the peers that talk to one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ranks.serving import Client, make_run, serving


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> Any:
    """The run directory of the server's model."""
    return make_run(tmp_path_factory.mktemp("peers") / "tiny", run_ranks)


@pytest.fixture(scope="module")
def server(run: Any, ranks: Any) -> Iterator[Client]:
    """A server of an untrained model, with a token."""
    with serving(run, ranks, token="t" * 40, slots=4) as client:
        yield client
