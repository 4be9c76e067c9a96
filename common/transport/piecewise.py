"""Checking a payload piece by piece while later pieces are still being written, on several threads.

The CRC32C of the whole is put together from those of the pieces. Knows nothing of sockets or frames.
"""

import functools
import threading
from typing import Final

import numpy as np

from protos.frame import checksum

PIECE_BYTES: Final = 4 * 2**20
"""Large enough that saying so costs nothing, small enough that the check finds it in the cache."""
_POLYNOMIAL: Final = 0x82F63B78
"""Of CRC32C, reflected: the highest bit of a word is x^0."""


class PiecewiseCheck:
    """CRC32C of a payload that is being written. ``grow`` and ``crc`` are for one thread, ``run`` for any.

    Args:
        memory: the payload.
        source: where it is written, if it must be copied from there to ``memory`` first.
    """

    def __init__(self, memory: memoryview, source: memoryview | None = None) -> None:
        self.memory = memory
        self._source = source
        self._num_ready = 0
        self._num_taken = 0
        self._num_checked = 0
        self._crcs: dict[int, tuple[int, int]] = {}  # by start: bytes, CRC32C
        self._lock = threading.Lock()

    @property
    def is_waiting(self) -> bool:
        """Whether there is a piece that nobody has taken."""
        return self._num_taken < self._num_ready

    @property
    def is_complete(self) -> bool:
        return self._num_checked == len(self.memory)

    def grow(self, num_ready: int) -> bool:
        """So many bytes are written. False if that cannot be: fewer than before, or more than there are."""
        if not self._num_ready <= num_ready <= len(self.memory):
            return False
        self._num_ready = num_ready
        return True

    def run(self) -> None:
        """Check what is ready, until there is nothing more. The interpreter's lock is free meanwhile."""
        while (piece := self._take()) is not None:
            start, stop = piece
            part = self.memory[start:stop]
            if self._source is not None:
                np.copyto(np.frombuffer(part, np.uint8), np.frombuffer(self._source[start:stop], np.uint8))
            crc = checksum(part)
            with self._lock:
                self._crcs[start] = len(part), crc
                self._num_checked += len(part)

    def crc(self) -> int:
        """Of all of it; it must be complete."""
        assert self.is_complete
        whole = 0
        for start in sorted(self._crcs):
            num_bytes, crc = self._crcs[start]
            whole = _times(_power_of_x(8 * num_bytes), whole) ^ crc
        return whole

    def _take(self) -> tuple[int, int] | None:
        with self._lock:
            start, stop = self._num_taken, min(self._num_taken + PIECE_BYTES, self._num_ready)
            self._num_taken = stop
        return (start, stop) if start < stop else None


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) of degree < 32, modulo that of CRC32C."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=256)
def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the polynomial: appending that many zero bits to a message multiplies its CRC by it."""
    power, square = 1 << 31, 1 << 30  # x^0, x^1
    while exponent:
        if exponent & 1:
            power = _times(square, power)
        square = _times(square, square)
        exponent >>= 1
    return power
