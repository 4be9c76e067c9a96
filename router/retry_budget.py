"""How much work of one tier may be done twice: a share of the recent requests, so that retries never feed an overload.

Pure: the caller tells the time. What a lost server had is sent elsewhere without asking here: it was paid for by nobody
else, and throttling it would fail requests for which there is room.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

WINDOW_SECONDS: Final = 10
HEDGE_SHARE: Final = 0.1
"""Second attempts that are only meant to be faster stop at this share of the requests of the window ..."""
RETRY_SHARE: Final = 0.2
"""... and those without which a request fails at this one (RELIABILITY.md section 4: 10 %, hard limit 20 %)."""
FLOOR: Final = 10
"""So many a window always: a share of few requests is less than one."""


@dataclass(slots=True)
class _Second:
    at: int
    num_requests: int = 0
    num_extra: int = 0


class RetryBudget:
    """Counts one tier's requests and extra attempts over the last ``WINDOW_SECONDS``."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque()

    def note_request(self, now: float) -> None:
        """A request came."""
        self._second(now).num_requests += 1

    def try_hedge(self, now: float) -> bool:
        """Take one extra attempt that is merely useful. False when there is none left."""
        return self._try_spend(HEDGE_SHARE, now)

    def try_retry(self, now: float) -> bool:
        """Take one extra attempt without which a request fails. False when there is none left."""
        return self._try_spend(RETRY_SHARE, now)

    def _try_spend(self, share: float, now: float) -> bool:
        second = self._second(now)
        num_requests = sum(each.num_requests for each in self._seconds)
        num_extra = sum(each.num_extra for each in self._seconds)
        if num_extra >= max(FLOOR, share * num_requests):
            return False
        second.num_extra += 1
        return True

    def _second(self, now: float) -> _Second:
        """The present one, after forgetting what is too old."""
        at = int(now)
        while self._seconds and self._seconds[0].at <= at - WINDOW_SECONDS:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
        return self._seconds[-1]
