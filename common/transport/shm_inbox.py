"""The receiver's side of one ``shm`` connection: segments of the sender in our address space, and what is lent of them.

A payload is lent to the sink where it lies, within the bound that the sender allows, and otherwise copied. Its segment
is released when the last reference to the payload is gone, on whatever thread.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from common.transport import segments
from common.transport.base import FrameSink, place_frame, receive_frame
from common.transport.meter import ReceiveMeter
from common.transport.packets import PacketLink, ProtocolViolation
from common.transport.piecewise import PiecewiseCheck
from common.transport.sender import TransportLimits
from common.transport.shm_messages import (
    FORGET,
    FORGET_KIND,
    FRAME,
    FRAME_KIND,
    HELLO,
    MAGIC,
    MAX_MESSAGE_BYTES,
    RELEASE,
    RELEASE_KIND,
    VERDICT,
    VERDICT_KIND,
    VERSION,
    WELCOME,
    WRITTEN,
    WRITTEN_KIND,
)
from protos.frame import FrameHeader, FrameRejected

log = logging.getLogger(__name__)

MIN_LENT_BYTES: Final = 256 * 2**10
"""Less is copied: each segment lent is a descriptor."""
_GREETING_SECONDS: Final = 5.0
_MAX_QUEUED: Final = 1024
"""Answers that wait because the sender does not read: more than it can have frames and segments with us."""


@dataclass(eq=False, slots=True)
class _Mapped:
    """A segment of the sender."""

    number: int
    memory: mmap.mmap
    is_lent: bool = False

    @property
    def num_bytes(self) -> int:
        return len(self.memory)


@dataclass(eq=False, slots=True)
class _Incoming:
    """A frame of which the payload is not all here or not all checked."""

    number: int
    header: FrameHeader
    check: PiecewiseCheck
    is_scheduled: bool = False


class ShmInbox:
    """One sender, seen from the receiver. Lives until either side hangs up.

    Args:
        on_closed: called once, when it is over.
    """

    def __init__(
        self,
        connection: socket.socket,
        sink: FrameSink,
        limits: TransportLimits,
        meter: ReceiveMeter,
        on_closed: Callable[["ShmInbox"], None],
    ) -> None:
        self._sink = sink
        self._limits = limits
        self._meter = meter
        self._on_closed = on_closed
        self._segments: dict[int, _Mapped] = {}
        self._mapped_bytes = 0
        self._lent_bytes = 0
        self._may_keep_bytes = 0
        self._incoming: dict[int, _Incoming] = {}  # placed, not committed
        self._is_greeted = False
        self._thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()
        self._greeting = self._loop.call_later(_GREETING_SECONDS, self.close)
        self._link = PacketLink(
            connection,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_queued=_MAX_QUEUED,
            on_message=self._on_message,
            on_end=self._on_end,
        )

    def close(self) -> None:
        """Hang up; what the sink keeps stays mapped for as long as it does."""
        self._link.close()
        self._on_end("this end was closed")

    def _on_end(self, cause: str) -> None:
        log.debug("a connection over shm ended: %s", cause)
        self._greeting.cancel()
        self._segments.clear()
        self._incoming.clear()
        self._on_closed(self)

    # --- messages

    def _on_message(self, message: memoryview, descriptor: int) -> None:
        kind = message[0]
        if self._is_greeted and kind == FRAME_KIND and len(message) >= FRAME.size:
            return self._on_frame(message, descriptor)
        if descriptor >= 0:
            os.close(descriptor)
        elif self._is_greeted and kind == WRITTEN_KIND and len(message) == WRITTEN.size:
            return self._on_written(*WRITTEN.unpack(message)[1:])
        elif self._is_greeted and kind == FORGET_KIND and len(message) == FORGET.size:
            return self._on_forget(*FORGET.unpack(message)[1:])
        elif not self._is_greeted and len(message) == HELLO.size:
            return self._on_hello(*HELLO.unpack(message))
        self._refuse("no message of this transport")

    def _on_hello(self, magic: bytes, version: int, may_keep_bytes: int) -> None:
        if magic != MAGIC or version != VERSION:
            self._refuse("another protocol")
        self._greeting.cancel()
        self._is_greeted = True
        self._may_keep_bytes = may_keep_bytes
        self._link.send(WELCOME.pack(MAGIC, VERSION))

    def _on_forget(self, number: int) -> None:
        segment = self._segments.pop(number, None)
        if segment is None or segment.is_lent:
            self._refuse("it forgets what is not its own")
        self._mapped_bytes -= segment.num_bytes

    def _on_frame(self, message: memoryview, descriptor: int) -> None:
        _, header_bytes, segment_number, number, payload_bytes, num_written = FRAME.unpack_from(message)
        header = message[FRAME.size : FRAME.size + header_bytes]
        rest = message[FRAME.size + header_bytes :]
        if segment_number == 0 and descriptor < 0 and len(rest) == payload_bytes:
            return self._answer(number, receive_frame(self._sink, header, rest), payload_bytes)
        segment = self._find(segment_number, descriptor)
        is_new = not segment.is_lent and number not in self._incoming
        if len(rest) or not is_new or not 0 < payload_bytes <= segment.num_bytes:
            self._refuse("a payload where none can be")
        try:
            incoming = self._incoming[number] = self._place(segment, header, number, payload_bytes)
        except FrameRejected as rejection:
            return self._answer(number, rejection.reason, payload_bytes)
        self._advance(incoming, num_written)

    def _answer(self, number: int, verdict: str, payload_bytes: int) -> None:
        self._meter.received(verdict, payload_bytes)
        self._link.send(VERDICT.pack(VERDICT_KIND, number), verdict.encode())

    def _refuse(self, why: str) -> NoReturn:
        self._meter.malformed()
        raise ProtocolViolation(why)

    # --- payloads

    def _find(self, number: int, descriptor: int) -> _Mapped:
        """The segment of that number; with a descriptor it is new. Raises OSError: it cannot be mapped."""
        if descriptor >= 0:
            memory = segments.adopt(descriptor, segments.round_up(self._limits.max_frame_bytes))
            if number in self._segments or self._mapped_bytes + len(memory) > segments.pool_bytes(self._limits):
                self._refuse("more segments than agreed")
            self._segments[number] = _Mapped(number, memory)
            self._mapped_bytes += len(memory)
        if number not in self._segments:
            self._refuse("an unknown segment")
        return self._segments[number]

    def _place(self, segment: _Mapped, packed_header: memoryview, number: int, payload_bytes: int) -> _Incoming:
        """Find memory for a frame: where its payload lies, or the sink's own. Raises FrameRejected."""
        payload = self._lend(segment, payload_bytes)
        if payload_bytes >= MIN_LENT_BYTES and self._lent_bytes <= self._may_keep_bytes:
            header, memory = place_frame(self._sink, packed_header, payload_bytes, lambda: payload)
            return _Incoming(number, header, PiecewiseCheck(memory))
        header, memory = place_frame(self._sink, packed_header, payload_bytes)
        return _Incoming(number, header, PiecewiseCheck(memory, payload))

    def _on_written(self, number: int, num_bytes: int) -> None:
        incoming = self._incoming.get(number)
        if incoming is not None:  # else it is rejected already
            self._advance(incoming, num_bytes)

    def _advance(self, incoming: _Incoming, num_written: int) -> None:
        if not incoming.check.grow(num_written):
            self._refuse("a payload that shrinks or overflows")
        if incoming.check.is_waiting and not incoming.is_scheduled:
            self._step(incoming)

    def _step(self, incoming: _Incoming) -> None:
        """Check a piece, and go on when the loop's other callbacks have had their turn."""
        incoming.check.step()
        incoming.is_scheduled = incoming.check.is_waiting
        if incoming.is_scheduled:
            self._loop.call_soon(self._on_turn, incoming)
        elif incoming.check.is_complete:
            self._commit(incoming)

    def _on_turn(self, incoming: _Incoming) -> None:
        if self._link.is_closed:
            return
        try:
            self._step(incoming)
        except BaseException:  # a mistake of ours: the loop logs it, and the sender takes another way
            self.close()
            raise

    def _commit(self, incoming: _Incoming) -> None:
        """Bring a checked frame to the sink. What that does not keep is released before the verdict is told."""
        del self._incoming[incoming.number]
        check = incoming.check
        del incoming.check
        verdict = "ok"
        try:
            self._sink.commit(incoming.header, check.memory, check.crc)
        except FrameRejected as rejection:
            verdict = rejection.reason
        del check
        self._loop.call_soon(self._answer, incoming.number, verdict, incoming.header.payload_bytes)

    def _lend(self, segment: _Mapped, num_bytes: int) -> memoryview:
        """The payload; its segment goes back to the sender when nobody holds on to it any more."""
        payload = segments.part_of(segment.memory, num_bytes)
        segment.is_lent = True
        self._lent_bytes += segment.num_bytes
        # Weakly: what is kept must not keep us, and by us the sink that keeps it.
        weakref.finalize(payload, _call, weakref.WeakMethod(self._on_let_go), segment).atexit = False
        return payload.data

    def _on_let_go(self, segment: _Mapped) -> None:
        """On any thread, and in the middle of anything."""
        if self._link.is_closed:
            return
        if threading.get_ident() == self._thread:
            self._loop.call_soon(self._release, segment)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._release, segment)

    def _release(self, segment: _Mapped) -> None:
        segment.is_lent = False
        self._lent_bytes -= segment.num_bytes
        self._link.send(RELEASE.pack(RELEASE_KIND, segment.number))


def _call(method: Callable[[], Callable[[_Mapped], None] | None], segment: _Mapped) -> None:
    if (bound := method()) is not None:
        bound(segment)
