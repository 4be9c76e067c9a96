"""Checking a payload piece by piece while later pieces are still being written. Knows nothing of sockets or frames."""

from typing import Final

import numpy as np

from protos.frame import checksum

PIECE_BYTES: Final = 4 * 2**20
"""What an event loop may copy or check at a time: two tenths of a millisecond, which is what it costs to have a thread
do it and say so. Handed from thread to thread, a frame of 2.6 MB took twice as long."""


class PiecewiseCheck:
    """CRC32C of a payload that is being written.

    Args:
        memory: the payload.
        source: where it is written, if it must be copied from there to ``memory`` first.
    """

    def __init__(self, memory: memoryview, source: memoryview | None = None) -> None:
        self.memory = memory
        self.crc = 0
        self._source = source
        self._num_ready = 0
        self._num_checked = 0

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to check."""
        return self._num_checked < self._num_ready

    @property
    def is_complete(self) -> bool:
        return self._num_checked == len(self.memory)

    def grow(self, num_ready: int) -> bool:
        """So many bytes are written. False if that cannot be: fewer than before, or more than there are."""
        if not self._num_ready <= num_ready <= len(self.memory):
            return False
        self._num_ready = num_ready
        return True

    def step(self) -> None:
        """Check the next piece of what is ready."""
        start, stop = self._num_checked, min(self._num_checked + PIECE_BYTES, self._num_ready)
        part = self.memory[start:stop]
        if self._source is not None:
            np.copyto(np.frombuffer(part, np.uint8), np.frombuffer(self._source[start:stop], np.uint8))
        self.crc = checksum(part, self.crc)
        self._num_checked = stop
