"""Which transport carries a frame: a pool of senders that falls back while requests run."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from typing_extensions import Buffer

from common.service import metrics
from common.service.errors import TransportFailed
from common.transport.registry import TransportChoice, can_reach, choose_transports, make_sender
from common.transport.sender import BoundedSender, TransportLimits
from protos.status_pb2 import Endpoint

_Key = tuple[str, str]


@dataclass(slots=True)
class _Entry:
    sender: BoundedSender
    last_used: float
    num_sending: int = 0


class SenderPool:
    """One sender per address of any peer. Safe to use from many tasks at once.

    Args:
        transports: those this side may use; a peer's endpoints of other kinds are passed over, as are those that say
            themselves that they cannot be reached from here.
        max_senders: beyond it the longest unused sender is closed, never one that is sending.
        idle_seconds: a sender unused for this long is closed when another is asked for.
        retry_seconds: after a failure an address is tried last for this long, so that not every frame waits for it.
    """

    def __init__(
        self,
        *,
        transports: Iterable[TransportChoice] = ("auto",),
        limits: TransportLimits | None = None,
        max_senders: int = 64,
        idle_seconds: float = 60.0,
        retry_seconds: float = 5.0,
    ) -> None:
        self._transports = frozenset(choose_transports(transports))
        self._limits = limits or TransportLimits()
        self._max_senders = max_senders
        self._idle_seconds = idle_seconds
        self._retry_seconds = retry_seconds
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # longest unused first
        self._retry_at: dict[_Key, float] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._entries)

    async def send(self, endpoints: Sequence[Endpoint], packed_header: bytes, payload: Buffer, timeout: float) -> str:
        """Send one frame on the first of the peer's endpoints that works; returns the transport that carried it.

        Raises:
            FrameRejected: the receiver refused the frame.
            TransportFailed: no endpoint works.
            DeadlineExceeded: no acknowledgement within ``timeout`` seconds.
        """
        deadline = _now() + timeout
        failure = TransportFailed("no transport in common with the peer")
        for attempt, endpoint in enumerate(self._in_order(endpoints)):
            try:
                await self._send_to(endpoint, packed_header, payload, deadline - _now())
            except TransportFailed as error:
                failure = error
                continue
            if attempt > 0:
                metrics.TRANSFER_FALLBACKS.labels(endpoint.transport).inc()
            return endpoint.transport
        raise failure

    async def close(self) -> None:
        """Close every sender; sends in flight fail with ``TransportFailed``."""
        self._is_closed = True
        while self._entries:
            self._close_later(self._entries.popitem()[1].sender)
        await asyncio.gather(*self._closing)

    def _in_order(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """The receiver's order, but those that failed lately last."""
        now = _now()
        usable = [each for each in endpoints if each.transport in self._transports and can_reach(each)]
        return sorted(usable, key=lambda endpoint: self._retry_at.get(_key(endpoint), 0.0) > now)

    async def _send_to(self, endpoint: Endpoint, packed_header: bytes, payload: Buffer, timeout: float) -> None:
        key = _key(endpoint)
        entry = self._entry(key)
        entry.num_sending += 1
        self._close_idle()
        try:
            await entry.sender.send(packed_header, payload, timeout)
            self._retry_at.pop(key, None)
        except TransportFailed:
            self._drop(key, entry)
            raise
        finally:
            entry.num_sending -= 1
            entry.last_used = _now()

    def _entry(self, key: _Key) -> _Entry:
        if self._is_closed:
            raise TransportFailed("this end was closed")
        transport, address = key
        entry = self._entries.get(key)
        if entry is not None and entry.sender.is_broken:  # while nobody was sending
            self._close_later(self._entries.pop(key).sender)
            metrics.TRANSFER_RECONNECTS.labels(transport, "send").inc()
            entry = None
        elif entry is None and key in self._retry_at:
            metrics.TRANSFER_RECONNECTS.labels(transport, "send").inc()
        if entry is None:
            entry = self._entries[key] = _Entry(make_sender(transport, address, self._limits), _now())
        self._entries.move_to_end(key)
        return entry

    def _close_idle(self) -> None:
        too_old = _now() - self._idle_seconds
        num_excess = len(self._entries) - self._max_senders
        idle = [key for key, entry in self._entries.items() if entry.num_sending == 0]
        for position, key in enumerate(idle):
            if position < num_excess or self._entries[key].last_used < too_old:
                self._close_later(self._entries.pop(key).sender)

    def _drop(self, key: _Key, entry: _Entry) -> None:
        now = _now()
        self._retry_at = {known: at for known, at in self._retry_at.items() if at > now}
        self._retry_at[key] = now + self._retry_seconds
        if self._entries.get(key) is entry:
            self._close_later(self._entries.pop(key).sender)

    def _close_later(self, sender: BoundedSender) -> None:
        """Close a sender that has left the pool. Not on a caller's time, nor lost when that caller is cancelled."""
        task = asyncio.create_task(sender.close(), name="closing a sender")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _key(endpoint: Endpoint) -> _Key:
    return endpoint.transport, endpoint.address


def _now() -> float:
    return asyncio.get_running_loop().time()
