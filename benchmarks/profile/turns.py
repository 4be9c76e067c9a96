"""What is measured and for how long: pieces of work that take turns, round after round."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

_SHARE_OF_ONE: Final = 0.25
"""Of the seconds that all sizes have together, what one of them may take in a round."""

Key = TypeVar("Key")
Work = Callable[[], float]
"""Does it once, and says how many seconds that took."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to measure, as far as it can be afforded."""

    tiles: Sequence[int]
    lengths: Sequence[int]
    prompts: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]


@dataclass(frozen=True, slots=True)
class Effort:
    """``seconds`` for each kind of work, and at least ``rounds``."""

    seconds: float
    rounds: int

    @property
    def limit(self) -> float:
        """Seconds that one piece of work may take."""
        return _SHARE_OF_ONE * self.seconds


def take_turns(
    work: Mapping[Key, Work], seconds: float, min_rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, list[float]]:
    """What every round said of each. Everything must be warm.

    As many whole rounds as begin within ``seconds``, and at least ``min_rounds``; every other one in the other
    direction, so that nothing always comes after the same neighbour.
    """
    times: dict[Key, list[float]] = {key: [] for key in work}
    ends_at, number = clock() + seconds, 0
    while number < min_rounds or clock() < ends_at:
        for key in work if number % 2 == 0 else reversed(list(work)):
            times[key].append(work[key]())
        number += 1
    return times


def affordable(sizes: Sequence[int], work: Callable[[int], float], limit: float) -> list[int]:
    """Rising sizes, each done once to warm up, as far as the first that takes more than ``limit`` seconds.

    At least one: the smallest, whatever it takes.
    """
    kept: list[int] = []
    for size in sorted(set(sizes)):
        took = work(size)
        if kept and took > limit:
            break
        kept.append(size)
        if took > limit:
            break
    return kept
