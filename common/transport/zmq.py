"""The feature plane over ZeroMQ: one ROUTER per language server, one DEALER per peer in a vision server.

A frame is the message ``[sequence number, header, payload]``; the answer is ``[sequence number, verdict]``. Only the
answer means delivery: a ZeroMQ send that returned says nothing about the peer. Payloads are not copied on either side:
the sink keeps them in the memory that ZeroMQ has received them into. Settings and their reasons: RELIABILITY.md
section 6.

Knows nothing of encryption. ZeroMQ bounds the bytes of a message part, not the number of parts, so a stranger who can
connect can make it hold memory before any ticket is checked: bind to a private directory or a trusted network.
"""

import asyncio
import itertools
import logging
import struct
from dataclasses import dataclass
from socket import SOCK_STREAM
from typing import Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from common.service.errors import ConfigError, TransportFailed
from common.service.listen import cannot_listen
from common.transport.base import FrameSink, place_frame, receive_frame
from common.transport.listen import PRIVATE_DIRECTORY, check_host_port, new_socket_path, remove_socket
from common.transport.meter import ReceiveMeter
from common.transport.sender import BoundedSender, TransportLimits
from protos.frame import FrameRejected, checksum
from protos.status_pb2 import Endpoint

log = logging.getLogger(__name__)

NAME: Final = "zmq"
_SCHEMES: Final = ("tcp://", "ipc://")
_SEQUENCE: Final = struct.Struct("<Q")
_HEARTBEAT_MS: Final = 1_000
_HEARTBEAT_TIMEOUT_MS: Final = 3_000
_SMALL_BYTES: Final = 64 * 2**10
"""Up to here a payload is copied: ZeroMQ may have put it into one piece of memory with its neighbours."""
_LARGE_BYTES: Final = 4 * 2**20
"""From here on the event loop must not wait for a checksum."""
_PATIENCE: Final = 5.0
"""Seconds for what should take none: a name look-up, the end of a cancelled task."""


# Counts messages. Bytes are bounded by credit, and `max_inflight_frames` stays well below this mark (ZeroMQ may report
# a pipe as full from half of it), so it is never reached: a peer that reads slowly still has its heartbeats answered.
_HIGH_WATER_MARK: Final = 1_000
_MAX_INFLIGHT_FRAMES: Final = _HIGH_WATER_MARK // 2 - 1

_LINK_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


class ZmqReceiver:
    """A ``FeatureReceiver`` on ``tcp://host:port`` (port 0: any free one) or ``ipc://path``."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        self._address = address
        self._limits = limits
        self._meter = ReceiveMeter(NAME)
        self._socket: zmq.asyncio.Socket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, sink: FrameSink) -> Endpoint:
        """Listen, and feed ``sink`` from a task of our own.

        Raises:
            ConfigError: the address is taken or not one of this machine.
        """
        try:
            self._socket = socket = self._bind(await _numeric(self._address))
        except (zmq.ZMQError, OSError) as error:
            raise cannot_listen(self._address, error) from None
        self._serving = asyncio.create_task(self._serve(socket, sink), name="feature frames over zmq")
        self._serving.add_done_callback(self._on_serving_ended)
        return Endpoint(transport=NAME, address=socket.get_string(zmq.LAST_ENDPOINT))

    async def close(self) -> None:
        """Stop listening; frames in flight are dropped and their senders notice."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving}, timeout=_PATIENCE)
        if self._socket is not None:
            self._socket.close(linger=0)
        remove_socket(self._address)  # ZeroMQ does it too, but some time later and on another thread

    def _bind(self, address: str) -> zmq.asyncio.Socket:
        socket = _make_socket(zmq.ROUTER, address, max_part_bytes=self._limits.max_frame_bytes)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            socket.bind(address)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        return socket

    async def _serve(self, socket: zmq.asyncio.Socket, sink: FrameSink) -> None:
        while True:
            message = await socket.recv_multipart(copy=False)
            await self._handle(socket, sink, message)
            # With messages waiting neither await above suspends: without this a fast peer starves the loop.
            await asyncio.sleep(0)

    async def _handle(self, socket: zmq.asyncio.Socket, sink: FrameSink, message: list[zmq.Frame]) -> None:
        if len(message) != 4 or len(message[1]) != _SEQUENCE.size:
            return self._meter.malformed()
        peer, sequence, header, payload = message
        verdict = await _receive(sink, header.buffer, payload.buffer)
        self._meter.received(verdict, len(payload))
        try:
            # Not waiting: a peer that never reads its answers must not hold up the others.
            await socket.send_multipart([peer.bytes, sequence.bytes, verdict.encode()], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._meter.unanswered()

    def _on_serving_ended(self, task: asyncio.Task[None]) -> None:
        """A failure of the sink or of ZeroMQ: hang up, so that senders turn to another transport at once."""
        if not task.cancelled() and self._socket is not None:
            log.error("no longer taking features over zmq", exc_info=task.exception())
            self._socket.close(linger=0)


@dataclass(slots=True)
class _Pending:
    """A frame that is not acknowledged. Keeps its credit even when nobody waits for it any more: the bytes are out."""

    verdict: asyncio.Future[str]
    num_bytes: int


class ZmqSender(BoundedSender):
    """A ``FeatureSender`` for one peer: connects at the first send, over for good when the connection breaks."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        super().__init__(NAME, limits)
        if limits.max_inflight_frames > _MAX_INFLIGHT_FRAMES:
            raise ConfigError(f"max_inflight_frames {limits.max_inflight_frames}: at most {_MAX_INFLIGHT_FRAMES}")
        self._address = address
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._connected = asyncio.Event()
        self._sequence_numbers = itertools.count()
        self._pending: dict[int, _Pending] = {}

    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""
        self._hang_up("this end was closed")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_PATIENCE)

    async def _connect(self) -> None:
        if self._socket is None:
            self._open()
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                await self._connected.wait()
        except TimeoutError:
            self._hang_up("the peer cannot be reached")

    def _open(self) -> None:
        self._socket = socket = _make_socket(zmq.DEALER, self._address, max_part_bytes=self._limits.max_frame_bytes)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        # No second connection behind our back: what was pending on the first would be lost without a word.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = socket.get_monitor_socket(_LINK_EVENTS)
        try:
            if not self._address.startswith(_SCHEMES):
                raise zmq.ZMQError(zmq.EPROTONOSUPPORT)
            socket.connect(self._address)
        except zmq.ZMQError:
            return self._hang_up("not an address of this transport")
        self._tasks = (
            asyncio.create_task(self._watch(socket, self._monitor), name="zmq connection"),
            asyncio.create_task(self._read_verdicts(socket), name="zmq verdicts"),
        )
        for task in self._tasks:
            task.add_done_callback(self._on_task_ended)

    async def _exchange(self, packed_header: bytes, payload: memoryview, deadline: float) -> str:
        assert self._socket is not None
        number = next(self._sequence_numbers)
        pending = _Pending(asyncio.get_running_loop().create_future(), len(payload))
        self._pending[number] = pending
        try:
            # Zero copy above pyzmq's threshold. No tracker is needed before `payload` may be reused: the verdict shows
            # that all of it was read, and after a failure the checksum catches bytes that changed on their way.
            message = [_SEQUENCE.pack(number), packed_header, payload]
            await self._socket.send_multipart(message, flags=zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            self._hang_up("the peer takes no more frames")
        return await pending.verdict

    async def _watch(self, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        """Returns when the connection is over: refused, reset, closed, or silent for the heartbeat's time."""
        while (await recv_monitor_message(monitor))["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            socket.getsockopt(zmq.EVENTS)  # makes the socket take notice of the pipe to the peer
            self._connected.set()

    async def _read_verdicts(self, socket: zmq.asyncio.Socket) -> None:
        """Returns when the peer says what no receiver of ours would say."""
        while True:
            message = await socket.recv_multipart()
            if len(message) != 2 or len(message[0]) != _SEQUENCE.size:
                return
            (number,) = _SEQUENCE.unpack(message[0])
            pending = self._pending.pop(number, None)
            if pending is None:
                return
            self._credit.release(pending.num_bytes)
            if not pending.verdict.done():
                pending.verdict.set_result(message[1].decode("ascii", "replace"))

    def _on_task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if task.exception() is not None:
                log.warning("connection over zmq ended unexpectedly", exc_info=task.exception())
            self._hang_up("the connection to the peer broke")

    def _hang_up(self, failure: str) -> None:
        """The end of this connection, whatever the cause; the first cause is the one that is told."""
        if self.is_broken:
            return
        self._credit.close(failure)
        self._connected.set()  # who waits for the connection learns from the credit that there is none
        for task in self._tasks:
            task.cancel()
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=0)
        if self._monitor is not None:
            self._monitor.close(linger=0)
        for pending in self._pending.values():
            if not pending.verdict.done():
                pending.verdict.set_exception(TransportFailed(failure))
        self._pending.clear()


async def _receive(sink: FrameSink, packed_header: memoryview, payload: memoryview) -> str:
    """What ``receive_frame`` does, but a large payload stays in the memory where ZeroMQ has put it."""
    if len(payload) <= _SMALL_BYTES:
        return receive_frame(sink, packed_header, payload)
    try:
        header, memory = place_frame(sink, packed_header, len(payload), lambda: payload)
        crc = await asyncio.to_thread(checksum, memory) if len(memory) > _LARGE_BYTES else checksum(memory)
        sink.commit(header, memory, crc)
    except FrameRejected as rejection:
        return rejection.reason
    return "ok"


async def _numeric(address: str) -> str:
    """``address`` with its host name resolved: ZeroMQ binds to numbers only. ``ipc://`` stays as it is."""
    if not address.startswith("tcp://"):
        return address
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    loop = asyncio.get_running_loop()
    found = await asyncio.wait_for(loop.getaddrinfo(host.strip("[]"), port, type=SOCK_STREAM), _PATIENCE)
    resolved = str(found[0][4][0])
    return f"tcp://[{resolved}]:{port}" if ":" in resolved else f"tcp://{resolved}:{port}"


def _make_socket(kind: int, address: str, *, max_part_bytes: int) -> zmq.asyncio.Socket:
    # One context for the process: a context has an I/O thread of its own, and one thread moves several GB/s.
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, max_part_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    return socket


def receiver_at(listen: str, limits: TransportLimits) -> ZmqReceiver:
    """See ``common.transport.registry``. Raises ConfigError."""
    if listen.startswith(PRIVATE_DIRECTORY):
        return ZmqReceiver(f"ipc://{new_socket_path(listen, NAME)}", limits)
    return ZmqReceiver(f"tcp://{check_host_port(listen)}", limits)


sender_to = ZmqSender
