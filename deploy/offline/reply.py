"""What is answered: the text, why it ended, what it cost, and a stream that ends in such a reply."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from deploy.client import Answer

_Piece = TypeVar("_Piece")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. Those of images and those found in the prefix cache are part of ``prompt_tokens``, those of reasoning of
    ``completion_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as seen from here, from the first try to ask. ``server`` is the server's own account in milliseconds
    (API.md section 4), empty where it runs without ``--enable-per-request-metrics``."""

    time_to_first_token: float | None
    total: float
    server: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer. ``finish_reason`` is ``stop``, or ``length`` where it was cut; ``reasoning`` what the model
    thought before it, empty if nothing."""

    text: str
    reasoning: str
    finish_reason: str | None
    usage: Usage
    timing: Timing


class Stopwatch:
    """Times one answer."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self._first_at: float | None = None

    @property
    def has_first_token(self) -> bool:
        return self._first_at is not None

    def token(self) -> None:
        """A piece of the answer is there."""
        if self._first_at is None:
            self._first_at = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    def timing(self, server: dict[str, Any]) -> Timing:
        """At the end of the answer."""
        first = None if self._first_at is None else self._first_at - self._started_at
        return Timing(first, self.elapsed(), server)


def reply_of(answer: Answer, watch: Stopwatch) -> Reply:
    """Counts that a server does not tell are 0."""
    details = answer.usage.get("prompt_tokens_details") or {}
    completion_details = answer.usage.get("completion_tokens_details") or {}
    usage = Usage(
        prompt_tokens=answer.usage.get("prompt_tokens") or 0,
        completion_tokens=answer.usage.get("completion_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
        image_tokens=(details.get("multimodal_tokens") or {}).get("image") or 0,
        reasoning_tokens=completion_details.get("reasoning_tokens") or 0,
    )
    return Reply(answer.text, answer.reasoning, answer.finish_reason, usage, watch.timing(answer.metrics))


class Pieces(Iterator[_Piece]):
    """Whatever comes piece by piece from a generator, and can be closed before its end."""

    _pieces: Generator[_Piece, None, Any]

    def __next__(self) -> _Piece:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop here."""
        self._pieces.close()


class Stream(Pieces[str]):
    """The pieces of one answer as they come, thoughts as ``Thought``; afterwards ``reply`` holds the whole.

    Asks when the first piece is wanted. Closed early, also by leaving a ``with`` block, it cancels the answer, and
    ``reply`` stays None.
    """

    def __init__(self, pieces: Generator[str, None, Reply]) -> None:
        self._pieces = pieces
        self.reply: Reply | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.reply = self.reply or end.value
            raise

    def finish(self) -> Reply:
        """Wait for the end."""
        for _ in self:
            pass
        assert self.reply is not None  # a stream ends with a reply or an error
        return self.reply
