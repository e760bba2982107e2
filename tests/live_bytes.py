"""Counts the bytes of every tensor storage alive in a process: the truth a formula is held to.

    with LiveBytes() as live:
        engine = build_engine(...)
        live.mark()
        train_step(engine, calls, lr=0.0)
    live.peak

Every storage that an operator makes is seen when it is made, and after `mark` is asked for its size
at each operator, until it is gone: one that is emptied in place counts nothing. What an operator
allocates and frees inside itself is not seen, as by any allocator's view of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak` is the most bytes alive at once since `mark`, `at_peak` the sizes of its storages."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[StorageWeakRef, int] = {}
        self._marked = False
        self.peak = 0
        self.at_peak: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in (*tree_leaves((args, kwargs)), *tree_leaves(out)):
            if isinstance(x, Tensor):
                self._alive.setdefault(StorageWeakRef(x.untyped_storage()), 0)
        if self._marked:
            self._look()
        return out

    def _look(self) -> None:
        total = 0
        for ref in list(self._alive):
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self._alive[ref]
            else:
                self._alive[ref] = storage.nbytes()
                total += storage.nbytes()
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self._alive)

    def mark(self) -> int:
        """Begin to look for a peak from now on; gives the bytes alive now."""
        self._marked, self.peak = True, 0
        self._look()
        return self.peak

    def peak_of(self, tensors) -> int:
        """Bytes that the storages of these tensors held at the peak."""
        refs = {StorageWeakRef(t.untyped_storage()) for t in tensors}
        return sum(size for ref, size in self.at_peak.items() if ref in refs)
