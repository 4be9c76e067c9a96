"""What the allocators of a server are told: Python's about what stays, the C library's about what comes again."""

import ctypes
import gc
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BYTES: Final = 256 * 2**20
_MAPPED_FROM_BYTES: Final = 64 * 2**20
"""Above the largest frame."""


def keep_freed_memory() -> None:
    """Let freed memory of the size of features and activations be used again instead of going back to the kernel.

    The kernel clears each page of what it hands out again: without this, ZeroMQ takes three times as long over a
    message of 34 MB. One arena, because the heaps of the others are handed back whatever the thresholds say. Sets
    parameters of mallopt(3), for the whole process; another C library than glibc keeps its ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def freeze_heap() -> None:
    """Keep what start-up made out of every later collection: with torch and transformers imported, a full one would
    hold up all threads for 0.2 s, about as often as requests have made a quarter as many objects."""
    gc.collect()
    gc.freeze()
