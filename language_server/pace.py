"""How many prompt tokens may run in one step beside sequences that generate, so that their next tokens are not late.

Learns from how long steps took: what a step costs without a prompt, and what each prompt token adds. On a GPU that
allows thousands of tokens, on two cores a hundred. Pure: times come in, no clock is read.
"""

from collections import deque
from statistics import median
from typing import Final

MIN_PREFILL_TOKENS: Final = 96
"""Fewer cost more by being a step's second kind of work than by their number (docs/decisions.md), and a prompt must get
on whatever it costs."""
_GRANULE: Final = 16
_NUM_SAMPLES: Final = 16
_MIN_TOKEN_SECONDS: Final = 1e-7
_MIN_SAMPLE_TOKENS: Final = 16
"""The cost of a token cannot be read off a step with fewer."""


class PrefillPace:
    """Medians over recent steps: a step that the operating system held up teaches nothing.

    Args:
        max_stretch: how many times as long as without prompts a step may take while sequences generate; above 1.
    """

    def __init__(self, max_stretch: float) -> None:
        self._max_stretch = max_stretch
        self._decode_seconds: deque[float] = deque(maxlen=_NUM_SAMPLES)
        self._token_seconds: deque[float] = deque(maxlen=_NUM_SAMPLES)

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """A step took ``seconds``."""
        if num_prefill_tokens == 0:
            if num_decodes:
                self._decode_seconds.append(seconds)
            return
        if num_prefill_tokens < _MIN_SAMPLE_TOKENS:
            return
        base = median(self._decode_seconds) if num_decodes and self._decode_seconds else 0.0
        # A step that was quicker than one without prompts shows only that prompts are cheap.
        self._token_seconds.append(max((seconds - base) / num_prefill_tokens, _MIN_TOKEN_SECONDS))

    @property
    def max_prefill_tokens(self) -> int | None:
        """Bound on the prompt tokens of a step in which sequences generate; None while nothing is known."""
        if not self._decode_seconds or not self._token_seconds:
            return None
        spare_seconds = (self._max_stretch - 1) * median(self._decode_seconds)
        num_tokens = int(spare_seconds / median(self._token_seconds))
        return max(MIN_PREFILL_TOKENS, num_tokens // _GRANULE * _GRANULE)
