"""A phase along its time axis: requests in flight, and what ended in each interval. Pure."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.samples import PhaseResult, Sample

_WIDTHS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_MAX_BINS: Final = 240
_WANTED_BINS: Final = 40


@dataclass(frozen=True, slots=True)
class Timeline:
    """Intervals of ``width`` seconds; the first starts ``start`` seconds after the window opened (negative: warm-up).

    ``in_flight`` is the mean over each interval and counts every request, also those that failed later.
    """

    width: float
    start: float
    in_flight: list[float]
    completed_per_s: list[float]
    failed_per_s: list[float]
    output_tokens_per_s: list[float]

    @property
    def edges(self) -> list[float]:
        """Seconds, one more than there are intervals."""
        return [self.start + index * self.width for index in range(len(self.in_flight) + 1)]


def timeline(result: PhaseResult, samples: list[Sample]) -> Timeline:
    """From the first request to the last answer."""
    begins = np.array([s.sent_at for s in samples]) - result.opened_at
    ends = np.array([s.ended_at for s in samples]) - result.opened_at
    first, last = float(begins.min(initial=0.0)), float(ends.max(initial=result.seconds))
    width = next((each for each in _WIDTHS if (last - first) / each <= _WANTED_BINS), _WIDTHS[-1])
    width = max(width, (last - first) / _MAX_BINS)
    start = np.floor(first / width) * width
    num_bins = max(1, int(np.ceil((last - start) / width)))
    edges = start + width * np.arange(num_bins + 1)
    good = np.array([s.is_ok for s in samples], bool)
    tokens = np.array([at for s in samples for at in s.token_times]) - result.opened_at

    def per_second(times: np.ndarray) -> list[float]:
        return [round(float(count) / width, 3) for count in np.histogram(times, edges)[0]]

    return Timeline(
        width=width,
        start=float(start),
        in_flight=[round(float(value), 3) for value in _overlap(begins, ends, edges) / width],
        completed_per_s=per_second(ends[good]),
        failed_per_s=per_second(ends[~good]),
        output_tokens_per_s=per_second(tokens),
    )


def _overlap(begins: np.ndarray, ends: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Seconds of all intervals [begin, end] that fall between each two neighbouring edges."""

    def until(at: np.ndarray) -> np.ndarray:
        """Seconds of all intervals before each of ``at``: what began, less what had ended."""
        return np.array([np.clip(edge - begins, 0, None).sum() - np.clip(edge - ends, 0, None).sum() for edge in at])

    return np.diff(until(edges))
