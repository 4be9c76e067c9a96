"""Where the rows of images lie in a prompt, and how far it can run with the rows that have come.

A video has a span for each frame, so nothing that is asked in every step walks over all of them. Pure Python.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Placeholders for neighbouring rows of one image: ``num_tokens`` placeholders <-> as many embedding rows."""

    image_index: int
    start: int  # token position of the first placeholder
    num_tokens: int
    mm_hash: bytes  # equal where equal rows mean equal content
    first_row: int = 0  # of the image, which the first placeholder stands for

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def end_row(self) -> int:
        return self.first_row + self.num_tokens

    def row_at(self, position: int) -> int:
        """The row of the image that the token at ``position`` stands for."""
        return self.first_row + position - self.start


class ImageSpans:
    """The spans of one prompt in order of position. Spans of one image are in order of rows, too.

    Some that follow each other and belong to one image are a run: whether all their rows have come is asked once.
    """

    def __init__(self, spans: Iterable[ImageSpan] = ()) -> None:
        self._spans = tuple(spans)
        self._ends = [span.end for span in self._spans]
        self._end_rows = [span.end_row for span in self._spans]
        self._run_ends = self._find_runs()

    def __iter__(self) -> Iterator[ImageSpan]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def overlapping(self, start: int, end: int) -> Iterator[ImageSpan]:
        """Spans with placeholders among tokens ``[start, end)``."""
        for index in range(bisect_right(self._ends, start), len(self._spans)):
            span = self._spans[index]
            if span.start >= end:
                return
            yield span

    def until(self, end: int) -> Iterator[ImageSpan]:
        """What lies before the token at ``end``."""
        for span in self.overlapping(0, end):
            yield span if span.end <= end else replace(span, num_tokens=end - span.start)

    def whole_end(self, end: int, block_size: int) -> int:
        """Where the last image ends that lies before ``end`` with all its spans; 0: there is none. Up to there, and in
        the rest of that block, all images do."""
        last_ends = {span.image_index: span.end for span in self._spans}
        while True:
            whole = max((span.end for span in self._spans if last_ends[span.image_index] <= end), default=0)
            blocks_end = -(-whole // block_size) * block_size
            broken = [span.start for span in self.overlapping(0, blocks_end) if last_ends[span.image_index] > end]
            if not broken:
                return whole
            end = min(broken[0], whole - 1)

    def first_missing(self, position: int, num_ready: Callable[[int], int]) -> int | None:
        """Position of the first placeholder at or after ``position`` whose row has not come; None: all have.

        ``num_ready``: rows of an image, by its index, that have come without a gap from the first on.
        """
        index = bisect_right(self._ends, position)
        while index < len(self._spans):
            num_rows, run_end = num_ready(self._spans[index].image_index), self._run_ends[index]
            index = bisect_right(self._end_rows, num_rows, index, run_end)
            if index < run_end:
                span = self._spans[index]
                return max(position, span.start + max(0, num_rows - span.first_row))
        return None

    def _find_runs(self) -> list[int]:
        """Of each span, the index behind the last one of its run."""
        run_ends = [len(self._spans)] * len(self._spans)
        for index in range(len(self._spans) - 2, -1, -1):
            is_last = self._spans[index].image_index != self._spans[index + 1].image_index
            run_ends[index] = index + 1 if is_last else run_ends[index + 1]
        return run_ends
