"""Tokens generated per second over the last moments. Pure: the caller brings count and time."""

from collections import deque
from typing import Final

WINDOW_SECONDS: Final = 5.0
_MIN_GAP_SECONDS: Final = 0.5


class TokenRate:
    """Asked by any number of readers, each as often as it likes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def observe(self, now: float, num_tokens: int) -> float:
        """The rate, when ``num_tokens`` were generated since the start; 0 while idle and before the second look."""
        if not self._seen or now - self._seen[-1][0] >= _MIN_GAP_SECONDS:
            self._seen.append((now, num_tokens))
        # One look from before the window stays: the rate is over the whole window.
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        return (num_tokens - before) / (now - since) if now > since else 0.0
