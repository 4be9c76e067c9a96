"""How many prompt tokens may run in one step beside sequences that generate, so that their next tokens are not late.

Prompts with images get less of it: they are long, come late and in pieces anyway, and must not be felt by those who
only read and write text.

Learns from how long steps took: what a step costs without a prompt, and what each prompt token adds. On a GPU that
allows thousands of tokens, on two cores a hundred. Where every step has a prompt in it, one now and then goes without,
to show what it costs: that changes with the number of sequences. Pure: times come in, no clock is read.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Final

MIN_PREFILL_TOKENS: Final = 96
"""Fewer cost more by being a step's second kind of work than by their number (docs/decisions.md), and a prompt must get
on whatever it costs."""
MIN_IMAGE_PREFILL_TOKENS: Final = 64
"""Of prompts with images: beside a vision server a step takes twice as long as these tokens do alone."""
_GRANULE: Final = 16
DEFAULT_STRETCH: Final = 1.5
DEFAULT_TEXT_STRETCH: Final = 2.5
_NUM_TOKEN_SAMPLES: Final = 16
_NUM_DECODE_SAMPLES: Final = 5  # few, so that it follows soon
_MAX_STEPS_WITH_PROMPTS: Final = 16
"""In a row; then one without."""
_MIN_TOKEN_SECONDS: Final = 1e-7
_MIN_SAMPLE_TOKENS: Final = 16
"""The cost of a token cannot be read off a step with fewer."""


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """Most prompt tokens of one step in which sequences generate; None: as many as the step holds.

    Tokens of text prompts count towards ``image_tokens`` too: those with images get what is left of it.
    """

    text_tokens: int | None = None
    image_tokens: int | None = None


NO_LIMITS: Final = PrefillLimits()


class PrefillPace:
    """Medians over recent steps: a step that the operating system held up teaches nothing.

    Args:
        max_stretch: how many times as long as without prompts a step may take while sequences generate; above 1.
        max_text_stretch: the same for prompts without images.
    """

    def __init__(self, max_stretch: float = DEFAULT_STRETCH, max_text_stretch: float = DEFAULT_TEXT_STRETCH) -> None:
        self._max_stretch = max_stretch
        self._max_text_stretch = max_text_stretch
        self._decode_seconds: deque[float] = deque(maxlen=_NUM_DECODE_SAMPLES)
        self._token_seconds: deque[float] = deque(maxlen=_NUM_TOKEN_SAMPLES)
        self._num_steps_with_prompts = 0  # beside sequences that generate, in a row

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """A step took ``seconds``."""
        self._num_steps_with_prompts += 1
        if not num_decodes or not num_prefill_tokens:
            self._num_steps_with_prompts = 0
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
    def limits(self) -> PrefillLimits:
        """Of the next step; none while nothing is known."""
        if not self._decode_seconds or not self._token_seconds:
            return NO_LIMITS
        if self._num_steps_with_prompts >= _MAX_STEPS_WITH_PROMPTS:
            return PrefillLimits(0, 0)
        return PrefillLimits(
            max(MIN_PREFILL_TOKENS, self._num_tokens(self._max_text_stretch)),
            max(MIN_IMAGE_PREFILL_TOKENS, self._num_tokens(self._max_stretch)),
        )

    def _num_tokens(self, max_stretch: float) -> int:
        spare_seconds = (max_stretch - 1) * median(self._decode_seconds)
        num_tokens = int(spare_seconds / median(self._token_seconds))
        return num_tokens // _GRANULE * _GRANULE
