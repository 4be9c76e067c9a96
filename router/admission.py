"""Who may come in: bounds on the requests of each class that wait, their tokens, their wait, and the bytes of all.

Pure counters, no queue of its own: requests wait inside the servers, and this bounds how many may. Text-only requests
have their own share of everything, so that a flood of images cannot lock them out. Whoever is refused is told at once,
and when to come again.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Final, Literal

from common.service import metrics
from common.service.errors import Overloaded

RequestClass = Literal["text", "image"]

_MEMORY: Final = 32
"""Served requests whose mean says how fast it goes; those before hardly count."""
_MIN_EVIDENCE: Final = 2
"""Fewer first tokens do not say how fast it goes."""
_ALWAYS_ADMITTED: Final = 16
"""Requests that may wait however long it takes: where one takes a minute, a queue is no sign of overload."""
_IMAGE_SHARE: Final = 0.75
"""Of what the servers let wait. The other places at language servers are for text; vision servers are not filled
evenly, and what one of them refuses is refused late."""
_RETRY_SECONDS: Final = (1.0, 60.0)
_JITTER: Final = 0.25
SMALL_BODY_BYTES: Final = 64 * 1024
"""Text, as a rule. The last part of the memory is for such bodies."""
_SMALL_BODIES_SHARE: Final = 0.125


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on what this router has taken on.

    Args:
        max_waiting: requests of each class that wait for their first token.
        max_held_bytes: of all bodies and images.
        max_tokens: prompt tokens of the waiting requests of one class.
        max_wait: seconds a request may have to wait, as far as can be told.
    """

    max_waiting: Mapping[RequestClass, int]
    max_held_bytes: int
    max_tokens: int = 2**62
    max_wait: float = inf


@dataclass(frozen=True, slots=True)
class Places:
    """What all usable servers let wait; 0: not known.

    Args:
        requests: at the language servers.
        tiles: at the vision servers.
    """

    requests: int = 0
    tiles: int = 0


def share(places: int, num_sharers: int) -> int:
    """What one of several router processes may take of what is there for all; 0 only of nothing."""
    return -(-places // num_sharers)


class Admission:
    """``enter``, ``hold`` and what they return either succeed at once or raise ``Overloaded``.

    Args:
        places: what the servers let wait now.
        clock: in seconds, monotonic.
        chance: a random number between 0 and 1.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        places: Callable[[], Places] = Places,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._limits = limits
        self._places = places
        self._chance = chance
        self._queues = {kind: _Queue(clock) for kind in limits.max_waiting}
        self._running = 0
        self._held_bytes = 0

    @property
    def num_waiting(self) -> int:
        return sum(queue.num_waiting for queue in self._queues.values())

    @property
    def num_running(self) -> int:
        """Requests between ``enter`` and ``leave``, waiting ones included."""
        return self._running

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def enter(self, kind: RequestClass, seconds_left: float = inf) -> "Slot":
        """Take a place. Raises Overloaded when too many of its class wait for their first token, or it would come late.

        Args:
            seconds_left: until the request's deadline.
        """
        queue = self._queues[kind]
        if queue.num_waiting >= self._max_waiting(kind):
            raise self._refuse(kind, "queue_full")
        wait = queue.expected_wait()
        if wait > seconds_left:
            raise self._refuse(kind, "deadline")
        if wait > self._limits.max_wait and queue.num_waiting >= _ALWAYS_ADMITTED:
            raise self._refuse(kind, "wait")
        queue.join()
        self._running += 1
        return Slot(self, kind)

    def hold(self, num_bytes: int) -> "HeldBytes":
        """Take memory for one request body. Raises Overloaded when all bodies together would be too large."""
        held = HeldBytes(self)
        held.grow(num_bytes)
        return held

    def _max_waiting(self, kind: RequestClass) -> int:
        places = self._places().requests
        if kind == "image" and places:
            return min(self._limits.max_waiting[kind], max(1, int(_IMAGE_SHARE * places)))
        return self._limits.max_waiting[kind]

    def _weigh(self, kind: RequestClass, num_tokens: int, num_tiles: int) -> None:
        queue, places = self._queues[kind], self._places().tiles
        if queue.num_tokens and queue.num_tokens + num_tokens > self._limits.max_tokens:
            raise self._refuse(kind, "tokens")
        if places and queue.num_tiles and queue.num_tiles + num_tiles > _IMAGE_SHARE * places:
            raise self._refuse(kind, "tiles")
        queue.num_tokens += num_tokens
        queue.num_tiles += num_tiles

    def _stop_waiting(self, kind: RequestClass, num_tokens: int, num_tiles: int, *, is_served: bool) -> None:
        queue = self._queues[kind]
        queue.leave(is_served=is_served)
        queue.num_tokens -= num_tokens
        queue.num_tiles -= num_tiles

    def _left(self) -> None:
        self._running -= 1

    def _grow(self, num_bytes: int, num_own_bytes: int) -> None:
        # A request of its own never fails for its size alone: the cap on one body is another rule.
        is_small = num_own_bytes + num_bytes <= SMALL_BODY_BYTES
        limit = self._limits.max_held_bytes * (1 if is_small else 1 - _SMALL_BODIES_SHARE)
        if self._held_bytes > num_own_bytes and self._held_bytes + num_bytes > limit:
            raise self._refuse("text" if is_small else "image", "bytes")
        self._held_bytes += num_bytes

    def _shrink(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes

    def _refuse(self, kind: RequestClass, reason: str) -> Overloaded:
        """Come again when those who wait now have been served, as far as can be told, and not all at once."""
        metrics.ADMISSION_REJECTIONS.labels(kind, reason).inc()
        shortest, longest = _RETRY_SECONDS
        seconds = min(longest, max(shortest, self._queues[kind].expected_wait()))
        jitter = 1 + _JITTER * (2 * self._chance() - 1)
        return Overloaded("too many requests are waiting, please come again", retry_after=seconds * jitter)


@dataclass(slots=True)
class _Queue:
    """Those of one class who wait for their first token, and how fast they are served."""

    clock: Callable[[], float]
    num_waiting: int = 0
    num_tokens: int = 0
    num_tiles: int = 0
    _num_served: int = 0
    _seconds_each: float = 0.0  # in which anybody waited, for each that was served; a moving average
    _served_at: float = 0.0  # the last one, or since when anybody waits

    def join(self) -> None:
        if not self.num_waiting:
            self._served_at = self.clock()
        self.num_waiting += 1

    def leave(self, *, is_served: bool) -> None:
        self.num_waiting -= 1
        if is_served:
            now = self.clock()
            self._num_served += 1
            weight = 1 / min(self._num_served, _MEMORY)
            self._seconds_each += weight * (now - self._served_at - self._seconds_each)
            self._served_at = now

    def expected_wait(self) -> float:
        """Seconds until whoever joins now is served; 0 where nobody waits, or nothing is known."""
        if not self.num_waiting or self._num_served < _MIN_EVIDENCE:
            return 0.0
        return (self.num_waiting + 1) * self._seconds_each + self._stall()

    def _stall(self) -> float:
        """Seconds that the next one is late."""
        return max(0.0, self.clock() - self._served_at - self._seconds_each)


class Slot:
    """The place of one request, from admission to its end. Use as a context manager."""

    def __init__(self, admission: Admission, kind: RequestClass) -> None:
        self._admission = admission
        self._kind = kind
        self._num_tokens = 0
        self._num_tiles = 0
        self._is_waiting = True

    def weigh(self, num_tokens: int, num_tiles: int = 0) -> None:
        """The size of its prompt is known now. Raises Overloaded when too many tokens of its class wait, or more tiles
        than vision servers let wait. One that is alone is never too large."""
        self._admission._weigh(self._kind, num_tokens, num_tiles)
        self._num_tokens += num_tokens
        self._num_tiles += num_tiles

    def first_token(self) -> None:
        """The request waits no longer; safe to call again."""
        self._stop_waiting(is_served=True)

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_waiting(is_served=False)
        self._admission._left()

    def _stop_waiting(self, *, is_served: bool) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._admission._stop_waiting(self._kind, self._num_tokens, self._num_tiles, is_served=is_served)


class HeldBytes:
    """Memory of one request body. Use as a context manager."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """More of the body has come. Raises Overloaded."""
        self._admission._grow(num_bytes, self._num_bytes)
        self._num_bytes += num_bytes

    def __enter__(self) -> "HeldBytes":
        return self

    def __exit__(self, *_: object) -> None:
        self._admission._shrink(self._num_bytes)
        self._num_bytes = 0
