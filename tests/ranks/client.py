"""The ranks of a test: those of megalite/train/ranks.py, a failure of which fails the test.

A test takes the fixture `run_ranks` and calls `run_ranks("tests.ranks.jobs:name", 4, batch=2)`.
"""

from __future__ import annotations

from typing import Any

from megalite.core.errors import RunError
from megalite.train import ranks


class Ranks(ranks.Ranks):
    """Prints what the ranks printed; raises AssertionError with their tracebacks."""

    def results(
        self, target: str, world: int, *, kwargs: dict, timeout: float, grace: float = 5.0
    ) -> list[Any]:
        """What `target` ("module:function") returned on each rank, in rank order."""
        try:
            answer = self.run(target, world, kwargs=kwargs, timeout=timeout, grace=grace)
        except RunError as error:
            raise AssertionError(str(error)) from None
        if answer.output:
            print(answer.output)
        return answer.results
