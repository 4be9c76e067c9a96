"""Which servers failed, how often in a row, and when they may be tried again. Pure; times are in seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from deploy.cluster.tiers import Tier

_FIRST_PAUSE_SECONDS: Final = 1.0
_MAX_PAUSE_SECONDS: Final = 60.0
_MAX_DOUBLINGS: Final = 6

Slot = tuple[Tier, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """The latest of a slot. ``count``: in a row."""

    count: int
    retry_at: float
    reason: str


class Failures:
    """By slot, whatever the life of its server."""

    def __init__(self) -> None:
        self._failures: dict[Slot, Failure] = {}

    def note(self, slot: Slot, reason: str, now: float, *, is_first: bool) -> int:
        """Count one; ``is_first``: it had been well for long. Returns how many there were in a row."""
        before = self._failures.get(slot)
        count = 1 if before is None or is_first else before.count + 1
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(count - 1, _MAX_DOUBLINGS), _MAX_PAUSE_SECONDS)
        self._failures[slot] = Failure(count, now + pause, reason)
        return count

    def may_retry(self, slot: Slot, now: float) -> bool:
        """Whether its pause is over."""
        failure = self._failures.get(slot)
        return failure is None or now >= failure.retry_at

    def __iter__(self) -> Iterator[tuple[Slot, Failure]]:
        return iter(self._failures.items())
