"""Space in a buffer of fixed size, first come, first served. Knows offsets and lengths only, not the memory itself."""

import asyncio
from collections import deque
from typing import Final

from common.service.errors import TransportFailed

ALIGNMENT: Final = 64
"""Every region begins at a multiple: a cache line."""


class Staging:
    """Regions of ``num_bytes`` bytes, none overlapping another.

    A region of the whole size is granted as soon as all others are back, so nobody waits forever.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes: Final = _rounded(num_bytes)
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)]  # start, length; by start, never adjacent
        self._waiters: deque[tuple[int, asyncio.Future[int]]] = deque()

    @property
    def num_free_bytes(self) -> int:
        return sum(length for _, length in self._free)

    async def acquire(self, num_bytes: int) -> int:
        """Wait for ``num_bytes`` in one piece; returns where they begin. Raises TransportFailed: it was closed."""
        assert 0 <= num_bytes <= self.num_bytes
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append((num_bytes, granted))
        self._grant()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release(granted.result(), num_bytes)  # granted in that very moment
            self._grant()  # a smaller region behind this one may fit
            raise

    def release(self, start: int, num_bytes: int) -> None:
        """Give a region back: what ``acquire`` returned, and what it was asked for."""
        if length := _rounded(num_bytes):
            self._insert(start, length)
            self._grant()

    def close(self, failure: str) -> None:
        """Fail whoever waits."""
        while self._waiters:
            _, granted = self._waiters.popleft()
            if not granted.done():
                granted.set_exception(TransportFailed(failure))

    def _grant(self) -> None:
        while self._waiters:
            num_bytes, granted = self._waiters[0]
            if not granted.done():
                start = self._take(_rounded(num_bytes))
                if start is None:
                    return
                granted.set_result(start)
            self._waiters.popleft()

    def _take(self, length: int) -> int | None:
        """First fit."""
        if length == 0:
            return 0
        for index, (start, available) in enumerate(self._free):
            if available >= length:
                self._free[index : index + 1] = [(start + length, available - length)] if available > length else []
                return start
        return None

    def _insert(self, start: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for piece in sorted([*self._free, (start, length)]):
            if merged and sum(merged[-1]) == piece[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + piece[1])
            else:
                merged.append(piece)
        self._free = merged


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
