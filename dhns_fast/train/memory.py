"""How the process keeps memory that training frees."""

from __future__ import annotations

import ctypes
import os

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to keep blocks that are freed. It maps large ones anew each time, and the kernel clears them page by
    page: on a CPU that was half of an epoch of DistMult (MKG-Y, D 1024: 1.38 s, 0.74 s without; bench/bench_plain.py at
    size reference). Whoever has set the allocator in the environment is left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
