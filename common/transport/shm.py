"""The feature plane between two processes of one host: payloads lie in shared memory, only words travel.

The sender owns the memory (``segments``): it copies a payload into a segment that nobody else uses, and then says so
over a socket (``packets``). The receiver checks the payload where it lies and lets the sink keep it there, so it is
copied once in all; when the sink lets go of it, the segment returns to the sender and is written again. What may be
kept is bounded: beyond it, payloads are copied and their segments return at once. Small payloads travel in the message.

    sender                                     receiver
      | hello {version, bytes it may keep}        |
      |------------------------------------------>|
      |                        welcome {version}  |
      |<------------------------------------------|
      | frame {number, segment, bytes, header}    |  with the segment's descriptor when it is new,
      |------------------------------------------>|  or with the payload when it is small
      | written {number, bytes}                   |  of a large payload, which is checked while the rest is copied
      |------------------------------------------>|
      |                  verdict {number, word}   |
      |<------------------------------------------|
      |                      release {segment}    |  when nobody here reads it any more
      |<------------------------------------------|
      | forget {segment}                          |  one that gave way to another size
      |------------------------------------------>|

No memory is freed or used again while somebody may touch it. A segment belongs to one frame until its release by the
receiver and the end of its sender's copy, whichever is later, and whether or not somebody still waits for that frame:
what a cancelled or expired request leaves is written by nobody but its own late writer. When a side dies, the kernel
keeps the pages until the other has let go of them. Nothing has a name that could outlive its owner, so a crash leaves
nothing behind.

Both ends belong to one user of one host. A sender that writes after its word could make us serve wrong features, as it
could with any frame that it signs, but it cannot crash us: segments are sealed against shrinking.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import mmap
import os
import re
import secrets
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from common.service.errors import TransportFailed
from common.service.listen import cannot_listen
from common.transport import packets, segments
from common.transport.base import FrameSink
from common.transport.listen import PRIVATE_DIRECTORY, check_host_port
from common.transport.meter import ReceiveMeter
from common.transport.packets import PacketLink, ProtocolViolation
from common.transport.piecewise import PIECE_BYTES
from common.transport.segments import Segment, SegmentPool
from common.transport.sender import BoundedSender, TransportLimits
from common.transport.shm_inbox import ShmInbox
from common.transport.shm_messages import (
    FORGET,
    FORGET_KIND,
    FRAME,
    FRAME_KIND,
    HELLO,
    INLINE_BYTES,
    MAGIC,
    MAX_ANSWER_BYTES,
    RELEASE,
    RELEASE_KIND,
    VERDICT,
    VERDICT_KIND,
    VERSION,
    WELCOME,
    WRITTEN,
    WRITTEN_KIND,
)
from protos.status_pb2 import Endpoint

log = logging.getLogger(__name__)

NAME: Final = "shm"
TAKES_PORT: Final = False

_MAX_FRAMES_IN_FLIGHT: Final = 128
"""Each may be a descriptor at both ends."""
_PATIENCE: Final = 5.0
"""Seconds for what should take none: memory that the kernel hands out."""
_RETRY_ACCEPT_SECONDS: Final = 1.0
_ADDRESS: Final = re.compile(r"shm://([\w.-]{1,128})/([\w.-]{1,64})", re.ASCII)


class ShmReceiver:
    """A ``FeatureReceiver`` that any process of this user in this network namespace can find under ``name``."""

    def __init__(self, name: str, limits: TransportLimits) -> None:
        self._name = name
        self._limits = limits
        self._meter = ReceiveMeter(NAME)
        self._listener: socket.socket | None = None
        self._retrying: asyncio.TimerHandle | None = None
        self._inboxes: set[ShmInbox] = set()

    async def start(self, sink: FrameSink) -> Endpoint:
        """Listen, and feed ``sink`` from callbacks of the loop. Raises ConfigError: the name is taken."""
        try:
            self._listener = listener = packets.listen(self._name)
        except OSError as error:
            raise cannot_listen(self._name, error) from None
        self._accept_from(listener, sink)
        return Endpoint(transport=NAME, address=address_of(self._name))

    async def close(self) -> None:
        """Stop listening; frames in flight are dropped and their senders notice."""
        if self._retrying is not None:
            self._retrying.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for inbox in list(self._inboxes):
            inbox.close()

    def _accept_from(self, listener: socket.socket, sink: FrameSink) -> None:
        asyncio.get_running_loop().add_reader(listener, self._accept, listener, sink)

    def _accept(self, listener: socket.socket, sink: FrameSink) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: look again later, instead of all the time
            log.warning("cannot take a connection over shm: %s", error.strerror)
            loop.remove_reader(listener)
            self._retrying = loop.call_later(_RETRY_ACCEPT_SECONDS, self._accept_from, listener, sink)
            return
        try:
            packets.check_peer(connection)
        except OSError as error:
            log.warning("refused a connection over shm: %s", error.strerror)
            connection.close()
            return
        self._inboxes.add(ShmInbox(connection, sink, self._limits, self._meter, on_closed=self._inboxes.discard))


@dataclass(eq=False, slots=True)
class _Outgoing:
    """A frame that is not over. Keeps its credit even when nobody waits for it any more: the bytes are out."""

    number: int
    packed_header: bytes
    payload: memoryview
    verdict: asyncio.Future[str]
    segment: Segment | None = None  # a small payload needs none
    num_written: int = 0
    is_written: bool = False  # we do not touch its segment any more
    is_released: bool = False


class ShmSender(BoundedSender):
    """A ``FeatureSender`` for one peer: connects at the first send, over for good when the connection breaks."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        num_frames = min(limits.max_inflight_frames, _MAX_FRAMES_IN_FLIGHT)
        super().__init__(NAME, dataclasses.replace(limits, max_inflight_frames=num_frames))
        self._address = address
        self._link: PacketLink | None = None
        self._connected = asyncio.Event()
        self._has_room = asyncio.Event()
        self._pool = SegmentPool(segments.pool_bytes(limits))
        self._lent: dict[int, _Outgoing] = {}  # by segment: said to the peer and not released
        self._making: set[asyncio.Future[None]] = set()  # segments
        self._writing: deque[_Outgoing] = deque()  # the first of them
        self._numbers = itertools.count()
        self._pending: dict[int, _Outgoing] = {}

    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""
        self._hang_up("this end was closed")
        if self._making:
            await asyncio.wait(self._making, timeout=_PATIENCE)

    async def _connect(self) -> None:
        if self._link is None:
            self._open()
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                await self._connected.wait()
        except TimeoutError:
            self._hang_up("the peer cannot be reached")

    def _open(self) -> None:
        found = _ADDRESS.fullmatch(self._address)
        if found is None:
            return self._hang_up("not an address of this transport")
        if found[1] != _host():
            return self._hang_up("the peer is on another host")
        try:
            connection = packets.connect(found[2])
        except OSError as error:
            return self._hang_up(f"the peer cannot be reached: {error.strerror}")
        self._link = PacketLink(
            connection,
            max_message_bytes=MAX_ANSWER_BYTES,
            max_queued=2 * _MAX_FRAMES_IN_FLIGHT + segments.MAX_IDLE,
            on_message=self._on_message,
            on_end=lambda cause: self._hang_up(f"the connection to the peer broke: {cause}"),
        )
        self._link.send(HELLO.pack(MAGIC, VERSION, segments.keep_bytes(self._limits)))

    # --- frames

    async def _exchange(self, packed_header: bytes, payload: memoryview, deadline: float) -> str:
        frame = _Outgoing(next(self._numbers), packed_header, payload, asyncio.get_running_loop().create_future())
        segment = frame.segment = None if len(payload) <= INLINE_BYTES else await self._take_segment(len(payload))
        self._pending[frame.number] = frame
        if segment is None:
            self._say_frame(frame)
        elif segment.is_there:
            self._start_writing(frame)
        else:
            self._start_making(frame, segment)
        return await frame.verdict

    def _start_making(self, frame: _Outgoing, segment: Segment) -> None:
        making = asyncio.get_running_loop().run_in_executor(segments.maker(), segment.make)
        self._making.add(making)
        making.add_done_callback(functools.partial(self._on_made, frame, segment))

    def _on_made(self, frame: _Outgoing, segment: Segment, making: "asyncio.Future[None]") -> None:
        self._making.discard(making)
        failure = making.exception()
        if self.is_broken:
            segment.drop()
        elif failure is not None:
            segment.drop()
            self._pool.remove(segment)
            self._has_room.set()
            self._settle(frame.number, TransportFailed(f"no shared memory: {failure}"))
        else:
            self._start_writing(frame)

    def _start_writing(self, frame: _Outgoing) -> None:
        self._writing.append(frame)
        if len(self._writing) == 1:
            self._write_some()

    def _write_some(self) -> None:
        """A piece of the first frame; the next when the loop's other callbacks have had their turn.

        Goes on when nobody waits for the frame any more: the peer does. Ends when that has refused it.
        """
        if self.is_broken:
            return
        try:
            frame = self._writing[0]
            if frame.number in self._pending:
                self._write_piece(frame)
            if self.is_broken:
                return
            if frame.number not in self._pending or frame.num_written == len(frame.payload):
                self._writing.popleft()
                frame.is_written = True
                self._maybe_give_back(frame)
        except BaseException:  # a mistake of ours, which the loop logs
            self._hang_up("this end failed")
            raise
        if self._writing:
            asyncio.get_running_loop().call_soon(self._write_some)

    def _write_piece(self, frame: _Outgoing) -> None:
        assert frame.segment is not None
        start, stop = frame.num_written, min(frame.num_written + PIECE_BYTES, len(frame.payload))
        frame.segment.write(frame.payload, start, stop)
        frame.num_written = stop
        if start == 0:
            self._say_frame(frame)
        else:
            self._say_written(frame)

    def _say_frame(self, frame: _Outgoing) -> None:
        assert self._link is not None
        number, descriptor, rest = 0, -1, frame.payload
        if frame.segment is not None:
            self._lent[frame.segment.number] = frame
            number, descriptor, rest = frame.segment.number, frame.segment.take_descriptor(), memoryview(b"")
        sizes = len(frame.payload), frame.num_written
        prefix = FRAME.pack(FRAME_KIND, len(frame.packed_header), number, frame.number, *sizes)
        self._link.send(prefix, frame.packed_header, rest, descriptor=descriptor)

    def _say_written(self, frame: _Outgoing) -> None:
        assert self._link is not None
        self._link.send(WRITTEN.pack(WRITTEN_KIND, frame.number, frame.num_written))

    async def _take_segment(self, num_bytes: int) -> Segment:
        """Waits where a verdict has overtaken the release of its segment. Raises TransportFailed."""
        while True:
            with contextlib.suppress(MemoryError):
                segment, evicted = self._pool.take(num_bytes)
                self._forget(evicted)
                return segment
            self._has_room.clear()
            try:
                await self._has_room.wait()
            except asyncio.CancelledError:
                self._credit.release(num_bytes)
                raise
            self._credit.check()

    def _maybe_give_back(self, frame: _Outgoing) -> None:
        """A segment is written again only when the peer has released it and our own copy has ended."""
        if frame.is_written and frame.is_released and frame.segment is not None:
            self._forget(self._pool.give_back(frame.segment))
            self._has_room.set()

    def _forget(self, evicted: Iterable[Segment]) -> None:
        assert self._link is not None
        for segment in evicted:
            self._link.send(FORGET.pack(FORGET_KIND, segment.number))
            segment.drop()

    # --- answers

    def _on_message(self, message: memoryview, descriptor: int) -> None:
        if descriptor >= 0:
            os.close(descriptor)
        elif not self._connected.is_set():
            if message == WELCOME.pack(MAGIC, VERSION):
                return self._connected.set()
        elif message[0] == VERDICT_KIND and len(message) > VERDICT.size:
            return self._on_verdict(VERDICT.unpack_from(message)[1], message[VERDICT.size :])
        elif message[0] == RELEASE_KIND and len(message) == RELEASE.size:
            return self._on_release(RELEASE.unpack(message)[1])
        raise ProtocolViolation("no message of this transport")

    def _on_verdict(self, number: int, word: Buffer) -> None:
        if number not in self._pending:
            raise ProtocolViolation("a verdict on nothing")
        self._settle(number, bytes(word).decode("ascii", "replace"))

    def _on_release(self, number: int) -> None:
        frame = self._lent.pop(number, None)
        if frame is None:
            raise ProtocolViolation("it releases what it does not have")
        frame.is_released = True
        self._maybe_give_back(frame)

    def _settle(self, number: int, outcome: str | TransportFailed) -> None:
        """The end of a frame, told to whoever still waits for it."""
        frame = self._pending.pop(number)
        self._credit.release(len(frame.payload))
        if frame.verdict.done():
            return
        if isinstance(outcome, TransportFailed):
            frame.verdict.set_exception(outcome)
        else:
            frame.verdict.set_result(outcome)

    def _hang_up(self, failure: str) -> None:
        """The end of this connection, whatever the cause; the first cause is the one that is told."""
        if self.is_broken:
            return
        self._credit.close(failure)
        self._connected.set()  # who waits for the connection, or for room, learns from the credit that there is none
        self._has_room.set()
        if self._link is not None:
            self._link.close()
        self._pool.close()
        self._lent.clear()
        self._writing.clear()
        for frame in self._pending.values():
            if not frame.verdict.done():
                frame.verdict.set_exception(TransportFailed(failure))
        self._pending.clear()


def address_of(name: str) -> str:
    """What senders are told of a receiver that listens at ``name`` here."""
    return f"shm://{_host()}/{name}"


@functools.cache
def _host() -> str:
    """This kernel, since it was started, and the part of it in which our sockets have their names."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot_id}.{os.stat('/proc/self/ns/net').st_ino}"


def can_reach(address: str) -> bool:
    """See ``common.transport.registry``: not if the receiver is on another host."""
    found = _ADDRESS.fullmatch(address)
    return found is not None and found[1] == _host()


def why_unavailable() -> str:
    """See ``common.transport.registry``: tried, as a container may forbid it."""
    try:
        _host()
        descriptor, _ = segments.create(mmap.PAGESIZE)
    except OSError as error:
        return f"no shared memory: {error.strerror}"
    os.close(descriptor)
    return ""


def receiver_at(listen: str, limits: TransportLimits) -> ShmReceiver:
    """See ``common.transport.registry``. Raises ConfigError for no address; any will do."""
    if not listen.startswith(PRIVATE_DIRECTORY):
        check_host_port(listen)
    return ShmReceiver(f"dvd-{secrets.token_hex(16)}", limits)


sender_to = ShmSender
