"""Memory for payloads that is used again: pages that the kernel must first clear cost more than the transfer.

Fresh memory took in 2 GB/s where the same memory, warm, took 20; huge pages make the first use as fast as half of that.
A block comes back by itself, from whatever thread, when the last reference to it is gone. Knows nothing of what is
written into it.
"""

import contextlib
import mmap
import weakref
from typing import Final

import numpy as np

_HUGE_PAGE_BYTES: Final = 2**21
_MAX_WASTE: Final = 1.25


class WarmMemory:
    """Blocks that were in use before. ``take`` is for one thread.

    Args:
        max_idle_bytes: kept for the next payload; what comes back beyond it goes to the system.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[mmap.mmap] = []  # longest idle first; appended to by any thread, in the middle of anything
        self._is_closed = False

    @property
    def idle_bytes(self) -> int:
        return sum(map(len, self._idle))

    def take(self, num_bytes: int) -> memoryview | None:
        """``num_bytes`` > 0 of memory with anything in it; None if the system has no more maps for this process."""
        block = self._find(num_bytes)
        if block is None:
            try:
                block = _map(num_bytes)
            except OSError:
                return None
        lent = np.frombuffer(block, np.uint8, num_bytes)
        weakref.finalize(lent, self._give_back, block).atexit = False
        return lent.data

    def close(self) -> None:
        """Keep nothing; what is lent lives as long as it is used."""
        self._is_closed = True
        self._idle.clear()

    def _find(self, num_bytes: int) -> mmap.mmap | None:
        fitting = [block for block in self._idle if num_bytes <= len(block) <= _MAX_WASTE * num_bytes]
        if not fitting:
            return None
        block = min(fitting, key=len)
        try:
            self._idle.remove(block)
        except ValueError:  # just dropped by another thread, to make room
            return None
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        """May run in the middle of any other method, as a collection does, so nothing here waits for a lock."""
        if self._is_closed:
            return
        self._idle.append(block)
        while self.idle_bytes > self._max_idle_bytes:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._idle.pop(0)


def _map(num_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
