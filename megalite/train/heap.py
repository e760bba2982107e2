"""Memory that a step frees is kept by the process for the next step, instead of going back.

A step on CPU frees and asks for the same hundreds of megabytes again and again. glibc by itself
gives large blocks back to the kernel at once, and the kernel clears each page of them anew: about
four percent of the CPU seconds of one process's step at gpt-10m (docs/peers.md). But kept memory
falls into pieces, and a process then holds more than its tensors: with ZeRO 2 and 3, which gather
and drop what they compute with, up to twice as much (tools/bench_memory.py), so not there. Nor on
CUDA, where torch's own allocator keeps its memory.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), as malloc.h numbers them."""
KEEP_ALL, KEEP_UNDER = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, blocks under a gigabyte; False where this is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, KEEP_ALL) and mallopt(M_MMAP_THRESHOLD, KEEP_UNDER))
