"""Who may come in: a bound on waiting requests per class, and on the bytes that all requests hold.

Pure counters, no queue of its own: requests wait inside the servers, and this bounds how many may. Text-only requests
have their own share, so that a flood of images cannot lock them out.
"""

from collections.abc import Mapping
from typing import Literal

from common.service import metrics
from common.service.errors import Overloaded

RequestClass = Literal["text", "image"]
RETRY_AFTER_SECONDS = 1.0


class Admission:
    """Bounds what this router has taken on. ``enter`` and ``hold`` either succeed at once or raise ``Overloaded``."""

    def __init__(self, max_waiting: Mapping[RequestClass, int], max_held_bytes: int) -> None:
        self._max_waiting = max_waiting
        self._max_held_bytes = max_held_bytes
        self._waiting: dict[RequestClass, int] = dict.fromkeys(max_waiting, 0)
        self._running = 0
        self._held_bytes = 0

    @property
    def num_waiting(self) -> int:
        return sum(self._waiting.values())

    @property
    def num_running(self) -> int:
        """Requests between ``enter`` and ``leave``, waiting ones included."""
        return self._running

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def enter(self, kind: RequestClass) -> "Slot":
        """Take a place. Raises Overloaded when the class has too many requests waiting for their first token."""
        if self._waiting[kind] >= self._max_waiting[kind]:
            raise _refuse(kind, "queue_full")
        self._waiting[kind] += 1
        self._running += 1
        return Slot(self, kind)

    def hold(self, num_bytes: int) -> "HeldBytes":
        """Take memory for one request body. Raises Overloaded when all bodies together would be too large."""
        held = HeldBytes(self)
        held.grow(num_bytes)
        return held

    def _first_token(self, kind: RequestClass) -> None:
        self._waiting[kind] -= 1

    def _left(self) -> None:
        self._running -= 1

    def _grow(self, num_bytes: int) -> None:
        # A request of its own never fails for its size alone: the cap on one body is another rule.
        if self._held_bytes and self._held_bytes + num_bytes > self._max_held_bytes:
            raise _refuse("image", "bytes")
        self._held_bytes += num_bytes

    def _shrink(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes


class Slot:
    """The place of one request, from admission to its end. Use as a context manager."""

    def __init__(self, admission: Admission, kind: RequestClass) -> None:
        self._admission = admission
        self._kind = kind
        self._is_waiting = True

    def first_token(self) -> None:
        """The request waits no longer; safe to call again."""
        if self._is_waiting:
            self._is_waiting = False
            self._admission._first_token(self._kind)

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *_: object) -> None:
        self.first_token()
        self._admission._left()


class HeldBytes:
    """Memory of one request body. Use as a context manager."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """More of the body has come. Raises Overloaded."""
        self._admission._grow(num_bytes)
        self._num_bytes += num_bytes

    def __enter__(self) -> "HeldBytes":
        return self

    def __exit__(self, *_: object) -> None:
        self._admission._shrink(self._num_bytes)
        self._num_bytes = 0


def _refuse(kind: RequestClass, reason: str) -> Overloaded:
    metrics.ADMISSION_REJECTIONS.labels(kind, reason).inc()
    return Overloaded("too many requests are waiting, please come again", retry_after=RETRY_AFTER_SECONDS)
