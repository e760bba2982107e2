"""Encoding with all cores: forked processes that speak bytes over pipes.

Batches go round the workers in turn and come back in the same turn, so results keep the order of
the documents and at most one batch a worker is on its way. No worker writes a file or knows of
another.
"""

from __future__ import annotations

import os
import signal
import struct
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import IO

import numpy as np

from megalite.core.errors import DataError, RunError
from megalite.data.tokenizer import Tokenizer, replace_surrogates

BATCH_BYTES = 1 << 20
COUNT = struct.Struct("<Q")
DONE, FAILED = b"\0", b"\1"


def encode_many(
    tokenizer: Tokenizer, documents: Iterable[str | bytes], workers: int
) -> Generator[np.ndarray, None, None]:
    """The ids of each document in order, as int32 arrays.

    Raises RunError when a worker dies, and DataError as `Tokenizer.encode` does.
    """
    if workers <= 1 or not hasattr(os, "fork"):
        for document in documents:
            yield np.array(tokenizer.encode(document), dtype=np.int32)
        return
    team: list[_Worker] = []
    busy: deque[_Worker] = deque()
    try:
        for batch in _batches(documents):
            if len(team) < workers:
                worker = _Worker(tokenizer, len(team), team)
                team.append(worker)
            else:
                worker = busy.popleft()
                yield from worker.receive()
            worker.send(batch)
            busy.append(worker)
        while busy:
            yield from busy.popleft().receive()
    finally:
        for worker in team:
            worker.stop()


def _batches(documents: Iterable[str | bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        if isinstance(document, str):
            document = replace_surrogates(document).encode()
        batch.append(document)
        size += len(batch[-1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Worker:
    """The parent's end of one process."""

    def __init__(self, tokenizer: Tokenizer, idx: int, others: Sequence[_Worker]):
        self.idx = idx
        work_out, work_in = os.pipe()
        result_out, result_in = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # The child never returns: what stands above it on the stack belongs to the parent.
            status = 1
            try:
                theirs = [pipe.fileno() for other in others for pipe in other.pipes]
                for end in (work_in, result_out, *theirs):
                    os.close(end)
                _serve(tokenizer, os.fdopen(work_out, "rb"), os.fdopen(result_in, "wb"))
                status = 0
            finally:
                os._exit(status)
        os.close(work_out)
        os.close(result_in)
        self.pipes: tuple[IO[bytes], IO[bytes]]
        self.pipes = os.fdopen(work_in, "wb"), os.fdopen(result_out, "rb")

    def send(self, batch: list[bytes]) -> None:
        try:
            _write(self.pipes[0], batch)
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> list[np.ndarray]:
        state = self.pipes[1].read(1)
        parts = _read(self.pipes[1]) if state else None
        if parts is None:
            raise self._death()
        if state == FAILED:
            raise DataError(parts[0].decode())
        return [np.frombuffer(part, dtype=np.int32) for part in parts]

    def stop(self) -> None:
        """End the process and forget it; it holds nothing that could be lost."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        for pipe in self.pipes:
            # What was still to be sent has no reader any more.
            with suppress(BrokenPipeError):
                pipe.close()

    def _death(self) -> RunError:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        fix = "out of memory? try --workers 1"
        return RunError(f"tokenizer worker {self.idx} died with {cause} ({fix})")


def _serve(tokenizer: Tokenizer, work: IO[bytes], results: IO[bytes]) -> None:
    """The child's loop: a batch in, its ids out, until the parent closes the pipe."""
    while (batch := _read(work)) is not None:
        try:
            ids = (np.array(tokenizer.encode(text), dtype=np.int32) for text in batch)
            state, parts = DONE, [array.tobytes() for array in ids]
        except DataError as error:
            state, parts = FAILED, [str(error).encode()]
        results.write(state)
        _write(results, parts)


def _write(pipe: IO[bytes], parts: list[bytes]) -> None:
    pipe.write(COUNT.pack(len(parts)))
    pipe.write(np.array([len(part) for part in parts], dtype=np.int64).tobytes())
    pipe.write(b"".join(parts))
    pipe.flush()


def _read(pipe: IO[bytes]) -> list[bytes] | None:
    """The parts of one message, or None when the other side is gone."""
    head = pipe.read(COUNT.size)
    if len(head) < COUNT.size:
        return None
    (count,) = COUNT.unpack(head)
    sizes = pipe.read(8 * count)
    if len(sizes) < 8 * count:
        return None
    ends = np.cumsum(np.frombuffer(sizes, dtype=np.int64)).tolist()
    data = pipe.read(ends[-1] if ends else 0)
    if ends and len(data) < ends[-1]:
        return None
    return [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
