"""Shared memory without a name: the kernel frees a segment with the last process that maps it, however that ends.

A segment has a fixed size from the start, sealed, so that nobody who maps it can be killed by another who shrinks it.
Segments are used again: pages that the kernel must first clear cost more than the transfer.
"""

import fcntl
import functools
import itertools
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from common.service import metrics
from common.transport.sender import TransportLimits

Bytes = npt.NDArray[np.uint8]

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PAGE_BYTES: Final = mmap.PAGESIZE
MAX_IDLE: Final = 64
"""Segments of one connection that may wait to be used again: each is a descriptor at both ends."""


def keep_bytes(limits: TransportLimits) -> int:
    """Segments of one connection that may be with the receiver before it copies: more than are in flight, so that it
    does not copy only because one is released a moment late."""
    return limits.max_inflight_bytes + limits.max_inflight_bytes // 2


def pool_bytes(limits: TransportLimits) -> int:
    """Bound of one connection's segments: those that are kept, and what is in flight, rounded up by an eighth."""
    return keep_bytes(limits) + limits.max_inflight_bytes + limits.max_inflight_bytes // 8 + 2**20


@functools.cache
def maker() -> ThreadPoolExecutor:
    """The thread in which segments are made: the kernel clears their pages first, which would hold up the loop."""
    return ThreadPoolExecutor(1, thread_name_prefix="shared memory")


def round_up(num_bytes: int) -> int:
    """Size of the segment for a payload: few different ones, at most an eighth too large, so that they fit again."""
    step = max(_PAGE_BYTES, 1 << max(0, (num_bytes - 1).bit_length() - 4))
    return -(-num_bytes // step) * step


def create(num_bytes: int) -> tuple[int, mmap.mmap]:
    """A new segment: a descriptor to hand on, and its memory, all of it there. Raises OSError: it cannot be had."""
    descriptor = os.memfd_create("dvd-features", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # fails where a first touch would kill
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor, _map(descriptor, num_bytes)
    except BaseException:
        os.close(descriptor)
        raise


def adopt(descriptor: int, max_bytes: int) -> mmap.mmap:
    """The memory of a segment that another process made; closes the descriptor.

    Raises:
        OSError: it is no sealed segment, larger than ``max_bytes``, or cannot be mapped.
    """
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise PermissionError(0, "a segment that is not sealed")
        num_bytes = os.fstat(descriptor).st_size
        if not 0 < num_bytes <= max_bytes:
            raise OSError(0, f"a segment of {num_bytes} bytes")
        return _map(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def part_of(memory: mmap.mmap, num_bytes: int) -> Bytes:
    """The beginning of a segment; keeps it mapped."""
    return np.frombuffer(memory, np.uint8, num_bytes)


@dataclass(eq=False, slots=True)
class Segment:
    """One that this side makes before it is first written."""

    number: int
    num_bytes: int
    _memory: mmap.mmap | None = None
    _descriptor: int = -1

    @property
    def is_there(self) -> bool:
        return self._memory is not None

    def make(self) -> None:
        """Have the memory, if it is not there. On any thread. Raises OSError: no memory, no descriptor."""
        if self._memory is None:
            self._descriptor, self._memory = create(self.num_bytes)

    def write(self, payload: memoryview, start: int, stop: int) -> None:
        """Copy these bytes of ``payload`` to their place; the memory must be there."""
        assert self._memory is not None
        np.copyto(part_of(self._memory, stop)[start:], np.frombuffer(payload, np.uint8)[start:stop])

    def take_descriptor(self) -> int:
        """For the peer: the descriptor the first time, then -1."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def drop(self) -> None:
        """Let go of it. A thread that makes it goes on; whoever waits for that thread drops it once more."""
        self._memory = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SegmentPool:
    """The segments of one connection, and which of them are idle. Does not look into them.

    Args:
        max_bytes: of all. Idle ones give way, those first that were idle the longest.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._segments: set[Segment] = set()
        self._idle: list[Segment] = []  # longest idle first
        self._numbers = itertools.count(1)
        self.num_bytes = 0

    def take(self, payload_bytes: int) -> tuple[Segment, list[Segment]]:
        """A segment for a payload, and those that gave way to it, for the caller to drop.

        Raises:
            MemoryError: too much is in use.
        """
        num_bytes = round_up(payload_bytes)
        for segment in reversed(self._idle):  # the warmest
            if segment.num_bytes == num_bytes:
                self._idle.remove(segment)
                return segment, []
        evicted = []
        while self._idle and self.num_bytes + num_bytes > self._max_bytes:
            evicted.append(self._evict())
        if self.num_bytes + num_bytes > self._max_bytes:
            raise MemoryError("every segment is in use")
        segment = Segment(next(self._numbers), num_bytes)
        self._segments.add(segment)
        self.num_bytes += num_bytes
        return segment, evicted

    def give_back(self, segment: Segment) -> list[Segment]:
        """It may be written again. Returns those that are too many now, for the caller to drop."""
        self._idle.append(segment)
        return [self._evict()] if len(self._idle) > MAX_IDLE else []

    def remove(self, segment: Segment) -> None:
        """Forget one that is in use."""
        self._segments.remove(segment)
        self.num_bytes -= segment.num_bytes

    def close(self) -> None:
        """Drop all."""
        for segment in self._segments:
            segment.drop()
        self._segments.clear()
        self._idle.clear()
        self.num_bytes = 0

    def _evict(self) -> Segment:
        segment = self._idle.pop(0)
        self.remove(segment)
        return segment


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(descriptor, num_bytes)
    _MAPPED.add(memory)
    return memory


_MAPPED: Final[weakref.WeakSet[mmap.mmap]] = weakref.WeakSet()
metrics.TRANSFER_SHM_SEGMENTS.set_function(lambda: len(_MAPPED))
