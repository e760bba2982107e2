"""Gloo for tensors on a GPU: many ranks can share one, which NCCL refuses, to try any layout.

A process group of torch's whose transfers go through copies on the host. It is there for
correctness: each copy waits for the GPU. comm.py and p2p.py see a group like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

BACKEND = "host"
"""The name that init_process_group knows it by, once `register` has run."""
_Group: Any = dist.ProcessGroup  # whose stubs have more forms of each method than are called
_Gloo: Any = dist.ProcessGroupGloo


def register() -> None:
    """Make the backend known to torch; again is free."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, HostGroup, devices=["cpu", "cuda"])


def on_host(x: Tensor) -> Tensor:
    """What stands in for `x`: `x` itself if it is there already."""
    return x.cpu()


class _Work(dist.Work):
    """A transfer under way; its results reach the GPU when it is waited for."""

    def __init__(self, work: Any, held: Sequence[Tensor], results: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self._work, self._held, self._results = work, held, results

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._work.wait()
        for result, host in self._results:
            if host is not result:
                result.copy_(host)
        self._results = []
        return True

    def is_completed(self) -> bool:
        return self._work.is_completed()


class HostGroup(_Group):
    """The collectives that megalite uses, of tensors anywhere."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo = _Gloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        """What `torch.distributed.get_backend` gives."""
        return BACKEND

    def _into(self, name: str, result: Tensor, *args: Any) -> _Work:
        """Run gloo's method of a result, whose numbers it need not read, and tensors it reads."""
        host = on_host(result)
        given = [on_host(x) if isinstance(x, Tensor) else x for x in args]
        return _Work(getattr(self._gloo, name)(host, *given), given, [(result, host)])

    def _of_list(self, name: str, tensors: list[Tensor], *args: Any) -> _Work:
        """Run gloo's method of a list that it reads, overwrites, or both."""
        hosts = [on_host(x) for x in tensors]
        results = [] if name == "send" else list(zip(tensors, hosts, strict=True))
        return _Work(getattr(self._gloo, name)(hosts, *args), hosts, results)

    def allreduce(self, tensors: list[Tensor], options: Any) -> _Work:
        return self._of_list("allreduce", tensors, options)

    def broadcast(self, tensors: list[Tensor], options: Any) -> _Work:
        return self._of_list("broadcast", tensors, options)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> _Work:
        return self._of_list("send", tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> _Work:
        return self._of_list("recv", tensors, source, tag)

    def all_gather_single(self, whole: Tensor, x: Tensor, options: Any) -> _Work:
        return self._into("_allgather_base", whole, x, options)

    def all_to_all_single(
        self, result: Tensor, x: Tensor, given: list[int], taken: list[int], options: Any
    ) -> _Work:
        return self._into("alltoall_base", result, x, given, taken, options)

    # torch 2.11 and 2.12 ask for them by these names.
    _allgather_base = all_gather_single
    alltoall_base = all_to_all_single

    def barrier(self, opts: Any) -> Any:
        return self._gloo.barrier(opts)
