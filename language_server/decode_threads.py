"""How many CPU threads the next step should use: where all it does is generate, learnt from the steps themselves.

The best number grows with the batch and with what its sequences have to look back on, so each size of batch has its
own, and now and then a step tries the next smaller or larger one. While a vision server works on the same cores the
number stays what was measured at the start: what it does to us says nothing of what we do to it. Reads no clock.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

_NUM_SAMPLES: Final = 5
_MIN_SAMPLES: Final = 3
_STEPS_BETWEEN_TRIALS: Final = 32


def fewest_good(seconds: Mapping[int, float], tolerance: float) -> int:
    """The smallest number of threads whose time is within a tolerance of the best."""
    best = min(seconds.values())
    return min(num_threads for num_threads, time in seconds.items() if time <= tolerance * best)


@dataclass(slots=True)
class _Batch:
    """What is known of batches of about one size."""

    best: int  # place in the candidates
    num_steps: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=dict)  # by place

    def samples(self, place: int) -> deque[float]:
        return self.seconds.setdefault(place, deque(maxlen=_NUM_SAMPLES))

    def is_known(self, place: int) -> bool:
        return len(self.samples(place)) >= _MIN_SAMPLES


class DecodeThreads:
    """
    Args:
        candidates: numbers of threads, ascending.
        alone: of them, the one to begin with.
        shared: number of threads beside a vision server at work.
        tolerance: how many times the best time a smaller number may take.
        shared_prompts: number of threads beside a vision server when prompts run; None: all.
    """

    def __init__(
        self, candidates: Sequence[int], alone: int, shared: int, tolerance: float, shared_prompts: int | None = None
    ) -> None:
        self.alone = alone
        self.shared = shared
        self.shared_prompts = shared_prompts
        self._candidates = candidates
        self._tolerance = tolerance
        self._batches: dict[int, _Batch] = {}  # by number of sequences, in powers of two

    def of_step(self, num_sequences: int, is_shared: bool) -> int:
        """For a step in which about so many sequences generate."""
        return self.shared if is_shared else self._candidates[self._next_place(self._batch(num_sequences))]

    def of_prompts(self, is_shared: bool) -> int | None:
        """For a step with prompts in it; None: all there are."""
        return self.shared_prompts if is_shared else None

    def observe(self, num_sequences: int, num_threads: int, seconds: float) -> None:
        """What a step took in which nothing but these sequences ran, and no vision server beside it."""
        if num_threads not in self._candidates:
            return
        batch = self._batch(num_sequences)
        batch.samples(self._candidates.index(num_threads)).append(seconds)
        near = [place for place in (*self._neighbours(batch), batch.best) if batch.is_known(place)]
        if batch.best in near:
            times = {self._candidates[place]: median(batch.seconds[place]) for place in near}
            batch.best = self._candidates.index(fewest_good(times, self._tolerance))

    def _batch(self, num_sequences: int) -> _Batch:
        size = num_sequences.bit_length()
        if size not in self._batches:
            self._batches[size] = _Batch(self._candidates.index(self.alone))
        return self._batches[size]

    def _neighbours(self, batch: _Batch) -> list[int]:
        return [place for place in (batch.best - 1, batch.best + 1) if 0 <= place < len(self._candidates)]

    def _next_place(self, batch: _Batch) -> int:
        batch.num_steps += 1
        neighbours = self._neighbours(batch)
        unknown = [place for place in neighbours if not batch.is_known(place)]
        if unknown and batch.is_known(batch.best):
            return unknown[0] if batch.num_steps % 2 else batch.best
        if neighbours and batch.num_steps % _STEPS_BETWEEN_TRIALS == 0:
            return neighbours[batch.num_steps // _STEPS_BETWEEN_TRIALS % len(neighbours)]
        return batch.best
