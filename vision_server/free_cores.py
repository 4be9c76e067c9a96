"""How many cores are really there for us: on a CPU that a language server shares, fewer than we have threads.

Threads that are put off their cores again and again come back to cold caches, and cost those who put them off the same.
Pure: times come in, no clock is read.
"""

from typing import Final

_ENOUGH: Final = 0.6
"""Of the cores asked for: who got so much has them for itself, give or take what else a machine does."""
_ROUNDS_UNTIL_NEXT_LOOK: Final = 3


class FreeCores:
    """Learns from rounds of work: how many threads they used, how long they took, how much processor time they got."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._num_free = num_threads
        self._rounds_left = 0

    def num_threads(self, *, may_look: bool = True) -> int:
        """That the next round should use. All of them now and then, to see whether the others have gone; not in a round
        where that would cost much, unless there is no other."""
        return self._num_free if self._rounds_left > 0 or not may_look else self._num_threads

    def observe(self, num_threads: int, seconds: float, processor_seconds: float) -> None:
        """A round is over."""
        self._rounds_left = max(0, self._rounds_left - 1)
        if num_threads < self._num_threads or seconds <= 0:
            return
        num_cores = processor_seconds / seconds
        if num_cores >= _ENOUGH * num_threads:
            self._num_free = self._num_threads
        else:
            self._num_free = max(1, int(num_cores))
            self._rounds_left = _ROUNDS_UNTIL_NEXT_LOOK
