"""Many processes give what one gives, in order, and their end is never a hang."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from megalite.core.errors import DataError, RunError
from megalite.data import workers
from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import Vocabulary
from megalite.data.workers import encode_many
from tests.unit.data.samples import make_text, make_tokenizer

DOCUMENTS = [make_text(seed, num_lines=seed % 7) for seed in range(60)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH_BYTES", 1000)


class Forked(list[int]):
    """Ids of the processes the workers' file started, in order."""

    def alive(self) -> list[int]:
        """Those that run, or have ended and nobody has waited for."""
        return [pid for pid in self if self._is_known(pid)]

    @staticmethod
    def _is_known(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> Forked:
    started = Forked()
    fork = os.fork

    def record() -> int:
        pid = fork()
        started.append(pid)
        return pid

    monkeypatch.setattr(workers.os, "fork", record)
    return started


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ids_and_order_do_not_depend_on_workers(forked: Forked, num_workers: int) -> None:
    documents = [*DOCUMENTS, "", b"\xff\xfe", "x" * 200_000, "half \ud83d"]
    tokenizer = make_tokenizer()
    found = list(encode_many(tokenizer, documents, num_workers))
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in documents]
    assert all(ids.dtype == np.int32 for ids in found)
    assert len(forked) == (num_workers if num_workers > 1 else 0)
    assert not forked.alive()


def test_no_documents_start_no_worker(forked: Forked) -> None:
    assert list(encode_many(make_tokenizer(), [], 4)) == []
    assert not forked


def test_documents_are_taken_as_they_are_needed(forked: Forked) -> None:
    taken = 0

    def count() -> Iterator[str]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield "x" * 1000

    results = encode_many(make_tokenizer(), count(), 2)
    next(results)
    assert taken == 3  # one batch with each worker, and one in hand
    assert len(forked.alive()) == 2
    results.close()
    assert not forked.alive()


@pytest.mark.parametrize("at_batch", [0, 5])
def test_dead_worker_is_named(forked: Forked, at_batch: int) -> None:

    def kill_then_go_on() -> Iterator[str]:
        for k in range(20):
            if k == at_batch + 2:
                for pid in forked:
                    os.kill(pid, signal.SIGKILL)
            yield "x" * 1000

    with pytest.raises(RunError, match="^tokenizer worker [01] died with signal SIGKILL .out of"):
        list(encode_many(make_tokenizer(), kill_then_go_on(), 2))
    assert not forked.alive()


def test_worker_that_fails_inside_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> list[int]:
        raise MemoryError

    monkeypatch.setattr(Tokenizer, "encode", fail)
    with pytest.raises(RunError, match="^tokenizer worker 0 died with exit code 1 .out of memory"):
        list(encode_many(make_tokenizer(), DOCUMENTS, 2))


def test_error_of_the_tokenizer_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.data.tokenizer.PATTERN_SECONDS", 0.2)
    known = make_tokenizer().vocabulary
    slow = Vocabulary(r"(?:a|aa|a\w?)+b", known.tokens, known.merges, known.special)
    with pytest.raises(DataError, match="takes too long on a text of 60 characters"):
        list(encode_many(Tokenizer(slow), ["fine", "a" * 60], 2))


def test_error_of_the_documents_ends_the_workers(forked: Forked) -> None:

    def fail_late() -> Iterator[str]:
        yield from DOCUMENTS
        raise DataError("x.jsonl:7: bad")

    with pytest.raises(DataError, match="^x.jsonl:7: bad$"):
        list(encode_many(make_tokenizer(), fail_late(), 2))
    assert not forked.alive()
