"""Servers that live, say they are ready, and fail or crawl nevertheless: out for a while, then on trial. Pure.

The caller tells the time, and uses a server in spite of its circuit where a tier has no other.
"""

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Final, Literal

CircuitState = Literal["closed", "half_open", "open"]
Reason = Literal["failures", "latency"]

MAX_FAILURES: Final = 5
"""In a row; Envoy's ``consecutive_5xx``."""
FIRST_EJECTION_SECONDS: Final = 5.0
MAX_EJECTION_SECONDS: Final = 60.0
"""An ejection lasts twice as long as the last one, up to this."""
NUM_TRIALS: Final = 2
"""Successes, one after the other, before a server is trusted again."""
SLOW_FACTOR: Final = 5.0
"""So many times the tier's time for a tile is an outlier ..."""
SLOW_SECONDS: Final = 0.1
"""... if it is worth mentioning at all."""
_MIN_SAMPLES: Final = 10
_MAX_SAMPLES: Final = 32


class Circuit:
    """Whether one server is trusted: closed; open (ejected); half open (one request at a time, on trial)."""

    def __init__(self) -> None:
        self.state: CircuitState = "closed"
        self._num_failures = 0
        self._num_ejections = 0
        self._num_successes = 0
        self._open_until = 0.0
        self._num_on_trial = 0

    def allows(self, now: float) -> bool:
        """Whether the server may get the next request."""
        if self.state == "open" and now >= self._open_until:
            self.state = "half_open"
            self._num_successes = 0
        return self.state == "closed" or (self.state == "half_open" and self._num_on_trial == 0)

    def begin(self) -> None:
        """A request is sent; ``end`` will follow."""
        self._num_on_trial += 1

    def end(self, is_success: bool | None, now: float) -> bool:
        """A request has ended: None says nothing about the server. True when this ejected it."""
        self._num_on_trial -= 1
        if is_success is None:
            return False
        if is_success:
            self._succeed()
            return False
        self._num_failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._num_failures >= MAX_FAILURES):
            self.eject(now)
            return True
        return False

    def eject(self, now: float) -> None:
        """Out, for twice as long as the last time."""
        seconds = min(FIRST_EJECTION_SECONDS * 2**self._num_ejections, MAX_EJECTION_SECONDS)
        self.state = "open"
        self._open_until = now + seconds
        self._num_ejections = min(self._num_ejections + 1, 10)
        self._num_failures = 0

    def reset(self) -> None:
        """Another process at the same address: it has done nothing wrong yet."""
        self.state = "closed"
        self._num_failures = self._num_ejections = 0

    def _succeed(self) -> None:
        self._num_failures = 0
        self._num_successes += 1
        if self.state == "half_open" and self._num_successes >= NUM_TRIALS:
            self.state = "closed"
        elif self.state == "closed" and self._num_successes % 100 == 0:
            self._num_ejections = max(0, self._num_ejections - 1)


class Speed:
    """How long one server takes for a tile, apart from queueing, lately."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self.seconds_per_tile: float | None = None  # the median, once there are enough samples

    def observe(self, num_tiles: int, seconds: float) -> float:
        """An image of so many tiles was done; returns the seconds for a tile. A fixed part counts as one more tile."""
        sample = seconds / (num_tiles + 1)
        self._samples.append(sample)
        if len(self._samples) >= _MIN_SAMPLES:
            self.seconds_per_tile = median(self._samples)
        return sample

    def reset(self) -> None:
        """What it did before it was ejected says nothing of how it is now."""
        self._samples.clear()
        self.seconds_per_tile = None


def is_slow(seconds_per_tile: float | None, others: Iterable[float | None]) -> bool:
    """Whether a server is far slower than the others of its tier. Not known of a tier without others."""
    known = [seconds for seconds in others if seconds is not None]
    if seconds_per_tile is None or not known:
        return False
    return seconds_per_tile > SLOW_SECONDS and seconds_per_tile > SLOW_FACTOR * median(known)
