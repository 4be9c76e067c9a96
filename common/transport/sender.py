"""What every sender does around the wire itself: frame cap, byte credit, deadline, verdict, metrics.

Knows nothing of sockets. A transport adds how to reach the peer and how to carry one frame.
"""

import abc
import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from typing_extensions import Buffer

from common.service import metrics
from common.service.errors import ConfigError, DeadlineExceeded, TransportFailed
from common.transport.meter import SendMeter
from protos.frame import MAX_HEADER_BYTES, FrameRejected

if TYPE_CHECKING:
    from common.service.keys import Keys

_DELIVERED: Final = frozenset({"ok", "duplicate"})
_MAX_VERDICT_CHARS: Final = 32


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Bounds of one connection; both ends should agree on ``max_frame_bytes``.

    Raises:
        ConfigError: a frame that may be sent would never get credit.
    """

    max_frame_bytes: int = 64 * 2**20
    """Payload of one frame. 64 MiB are 32 tiles of 256 x 4096 bfloat16 features."""
    max_inflight_bytes: int = 72 * 2**20
    """Payload bytes sent to one peer and not yet acknowledged. Two images of 13 tiles x 256 x 5120 bfloat16, so that
    one can be on the wire while the other is checked and acknowledged."""
    max_inflight_frames: int = 256
    connect_timeout: float = 2.0
    """Seconds. Short, because another transport may be tried after it."""
    keys: "Keys | None" = None
    """Of the ends of a transport that is encrypted, which is gRPC."""

    def __post_init__(self) -> None:
        if not MAX_HEADER_BYTES <= self.max_frame_bytes <= self.max_inflight_bytes:
            raise ConfigError(
                f"max_frame_bytes must be from {MAX_HEADER_BYTES} to max_inflight_bytes ({self.max_inflight_bytes})"
            )


class Credit:
    """How much may be on its way to one peer. First come, first served, so that large frames are not starved."""

    def __init__(self, transport: str, limits: TransportLimits) -> None:
        self._limits = limits
        self._gauge = metrics.TRANSFER_INFLIGHT_BYTES.labels(transport, "send")
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.inflight_bytes = 0
        self.inflight_frames = 0
        self.failure: str | None = None

    def check(self) -> None:
        """Raises ``TransportFailed`` when the connection is over."""
        if self.failure is not None:
            raise TransportFailed(self.failure)

    async def acquire(self, num_bytes: int) -> None:
        """Wait until a frame of ``num_bytes`` may be sent.

        Raises:
            TransportFailed: the connection is over.
        """
        self.check()
        if not self._waiters and self._fits(num_bytes):
            return self._take(num_bytes)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((num_bytes, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._grant()  # a smaller frame behind this one may fit
            else:
                self.release(num_bytes)
            raise
        self.check()

    def release(self, num_bytes: int) -> None:
        """A frame was acknowledged, or will never be."""
        if self.failure is None:
            self._take(num_bytes, sign=-1)
            self._grant()

    def close(self, failure: str) -> None:
        """The connection is over: every waiter fails, and nothing counts as in flight any more."""
        if self.failure is not None:
            return
        self.failure = failure
        self._gauge.dec(self.inflight_bytes)
        self.inflight_bytes = self.inflight_frames = 0
        for _, granted in self._waiters:
            if not granted.done():
                granted.set_result(None)
        self._waiters.clear()

    def _fits(self, num_bytes: int) -> bool:
        return (
            self.inflight_bytes + num_bytes <= self._limits.max_inflight_bytes
            and self.inflight_frames < self._limits.max_inflight_frames
        )

    def _take(self, num_bytes: int, sign: int = 1) -> None:
        self.inflight_bytes += sign * num_bytes
        self.inflight_frames += sign
        self._gauge.inc(sign * num_bytes)

    def _grant(self) -> None:
        while self._waiters:
            num_bytes, granted = self._waiters[0]
            if not granted.done():
                if not self._fits(num_bytes):
                    return
                self._take(num_bytes)
                granted.set_result(None)
            self._waiters.popleft()


class BoundedSender(abc.ABC):
    """A ``FeatureSender`` less its wire. One connection: once broken it stays so, and its owner makes another."""

    def __init__(self, transport: str, limits: TransportLimits) -> None:
        self._limits = limits
        self._meter = SendMeter(transport)
        self._credit = Credit(transport, limits)

    @property
    def is_broken(self) -> bool:
        """Whether every further send would fail."""
        return self._credit.failure is not None

    @property
    def inflight_bytes(self) -> int:
        """Payload bytes sent and not yet acknowledged."""
        return self._credit.inflight_bytes

    async def send(self, packed_header: bytes, payload: Buffer, timeout: float) -> None:
        """See ``common.transport.base.FeatureSender``. A frame above the cap is refused here, with reason ``size``."""
        view = memoryview(payload).cast("B")
        with self._meter.sending(len(view)):
            if len(view) > self._limits.max_frame_bytes or len(packed_header) > MAX_HEADER_BYTES:
                raise FrameRejected("size", f"frame of {len(packed_header)} + {len(view)} bytes is above the cap")
            verdict = await self._deliver(packed_header, view, timeout)
            if verdict not in _DELIVERED:
                raise FrameRejected(_plain(verdict), "refused by the receiver")

    async def _deliver(self, packed_header: bytes, payload: memoryview, timeout: float) -> str:
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                self._credit.check()
                await self._connect()
                with self._meter.waiting_for_credit():
                    await self._credit.acquire(len(payload))
                return await self._exchange(packed_header, payload, deadline)
        except TimeoutError:
            raise DeadlineExceeded("feature frame was not acknowledged in time") from None

    @abc.abstractmethod
    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""

    @abc.abstractmethod
    async def _connect(self) -> None:
        """Return when the peer can be sent to.

        Raises:
            TransportFailed: it cannot be reached within ``connect_timeout``.
        """

    @abc.abstractmethod
    async def _exchange(self, packed_header: bytes, payload: memoryview, deadline: float) -> str:
        """Carry one frame whose credit is taken; returns the verdict. ``deadline`` is in the loop's time.

        Releases the credit when the bytes are no longer on their way, which may be after a caller has given up.

        Raises:
            TransportFailed: the connection broke.
        """


def _plain(verdict: str) -> str:
    """A verdict fit for a log and a metric label, whoever sent it."""
    is_word = verdict.isascii() and verdict.isidentifier() and len(verdict) <= _MAX_VERDICT_CHARS
    return verdict if is_word else "unknown"
