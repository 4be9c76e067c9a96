"""When an encode has taken so long that a second server should try: the latest times of the tier, by number of tiles.

Pure: times are in seconds, and the caller measures them. gRPC's C core has no hedging of its own.
"""

from collections import deque
from typing import Final

MIN_SAMPLES: Final = 20
"""A 95th percentile of fewer is their maximum."""
_MAX_SAMPLES: Final = 256


class EncodeTimes:
    """A sliding window of encode times for each class of images: 1 tile, 2 to 3, 4 to 7, and so on.

    Args:
        quantile: of the times after which a second attempt is worth it; 0: never.
    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._classes: dict[int, deque[float]] = {}

    def observe(self, num_tiles: int, seconds: float) -> None:
        """An image was encoded, or a slower attempt was given up after so long."""
        self._classes.setdefault(num_tiles.bit_length(), deque(maxlen=_MAX_SAMPLES)).append(seconds)

    def patience(self, num_tiles: int) -> float | None:
        """Seconds to wait before a second attempt; None: do not make one."""
        times = self._classes.get(num_tiles.bit_length(), ())
        if self._quantile == 0 or len(times) < MIN_SAMPLES:
            return None
        return sorted(times)[min(int(self._quantile * len(times)), len(times) - 1)]
