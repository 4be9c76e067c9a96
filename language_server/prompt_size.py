"""What a prompt is made of, in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from common.service import metrics
from protos.language_pb2 import ImageRef


@dataclass(frozen=True, slots=True)
class PromptSize:
    num_tokens: int = 0
    num_image_tokens: int = 0  # of them, rows of images
    num_video_tokens: int = 0  # of them, rows of videos
    num_saved_tokens: int = 0  # that it would have more, had no tile been compressed

    @classmethod
    def of(cls, num_tokens: int, images: Sequence[ImageRef], num_rows: Sequence[int]) -> Self:
        """``num_rows``: of each image, as they have come."""
        num_video_tokens = sum(rows for rows, image in zip(num_rows, images, strict=True) if image.is_video)
        num_saved_tokens = sum(image.max_num_tokens for image in images) - sum(num_rows)
        return cls(num_tokens, sum(num_rows) - num_video_tokens, num_video_tokens, num_saved_tokens)

    def count(self) -> None:
        """In the metrics."""
        num_text_tokens = self.num_tokens - self.num_image_tokens - self.num_video_tokens
        metrics.LANGUAGE_PROMPT_TOKENS.labels("text").inc(num_text_tokens)
        metrics.LANGUAGE_PROMPT_TOKENS.labels("image").inc(self.num_image_tokens)
        metrics.LANGUAGE_PROMPT_TOKENS.labels("video").inc(self.num_video_tokens)
        metrics.LANGUAGE_VIR_SAVED_TOKENS.inc(self.num_saved_tokens)
