"""The feature plane over NIXL: RDMA where there is a device, TCP where there is none.

The receiver reads. A sender copies a payload into memory that it has registered once and says over a control
connection (``records``) where the frame lies. The receiver shows the header to the sink first, and only then reads the
payload straight into the memory where it stays, checks it and answers with the verdict. So nobody writes into a
receiver, no transfer begins without a valid ticket, and not even the sender's metadata are looked at before one.

The sender's memory stays with a frame until its verdict, the sink's until the transfer is over or the agent is gone.
For whom the network must be isolated: see ``nixl_agent``.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from common.service.errors import ConfigError, DvdError
from common.service.listen import UNIX, cannot_listen, split_host_port
from common.transport.base import FrameSink, place_frame
from common.transport.listen import PRIVATE_DIRECTORY, check_host_port, new_socket_path, remove_socket
from common.transport.memory import WarmMemory
from common.transport.meter import ReceiveMeter
from common.transport.nixl_agent import NOT_INSTALLED, RemoteMemory, check_agent, is_installed, rdma_devices
from common.transport.nixl_messages import FROM_SENDER, Frame, Hello, pack_verdict
from common.transport.nixl_sender import MAX_INFLIGHT_FRAMES, NAME, NixlSender
from common.transport.records import Kind, Malformed, Records
from common.transport.sender import TransportLimits
from protos.frame import FrameHeader, FrameRejected, checksum
from protos.status_pb2 import Endpoint

log = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 256
_SMALL_BYTES: Final = 64 * 2**10
"""Up to here memory of the sink's own will do."""
_PATIENCE: Final = 5.0
"""Seconds for the end of what was told to end."""


class NixlReceiver:
    """A ``FeatureReceiver`` with its control connections on ``host:port`` (port 0: any free one) or ``unix:/path``."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        if not is_installed():
            raise ConfigError(f"transport {NAME}: {NOT_INSTALLED}")
        self._address = address
        self._limits = limits
        self._meter = ReceiveMeter(NAME)
        self._memory = WarmMemory(limits.max_inflight_bytes)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self, sink: FrameSink) -> Endpoint:
        """Listen, and feed ``sink`` from one task for each sender.

        Raises:
            ConfigError: the address is taken or not one of this machine, or NIXL cannot work there.
        """

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._accept(sink, reader, writer)

        host, port = "", 0
        try:
            if not self._address.startswith(UNIX):
                host, port = split_host_port(self._address)
                looking_up = asyncio.get_running_loop().getaddrinfo(host, port)
                found = await asyncio.wait_for(looking_up, _PATIENCE)
                host = str(found[0][4][0])  # one address, also where a name has two
            await asyncio.to_thread(check_agent, host)
            if not host:
                self._server = await asyncio.start_unix_server(accept, self._address.removeprefix(UNIX))
                return Endpoint(transport=NAME, address=self._address)
            self._server = await asyncio.start_server(accept, host, port)
        except OSError as error:
            raise cannot_listen(self._address, error) from None
        port = self._server.sockets[0].getsockname()[1]
        return Endpoint(transport=NAME, address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    async def close(self) -> None:
        """Stop listening; frames in flight are dropped and their senders notice."""
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=_PATIENCE)
        self._memory.close()
        remove_socket(self._address)

    def _accept(self, sink: FrameSink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._serving) >= _MAX_CONNECTIONS:
            log.warning("nixl: more than %d connections, one was refused", _MAX_CONNECTIONS)
            return writer.transport.abort()
        incoming = _Incoming(sink, reader, writer, self._memory, self._limits.max_frame_bytes, self._meter)
        task = asyncio.create_task(incoming.serve(), name="feature frames over nixl")
        self._serving.add(task)
        task.add_done_callback(self._on_serving_ended)

    def _on_serving_ended(self, task: asyncio.Task[None]) -> None:
        """The loss of a peer is no news; a failure of the sink costs the connection, so that its sender notices."""
        self._serving.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, BaseExceptionGroup):
            if error.subgroup(Malformed):
                self._meter.malformed()
            _, error = error.split((OSError, EOFError, DvdError))
        if error is not None:
            log.error("a connection over nixl ended unexpectedly", exc_info=error)


class _Incoming:
    """The connection of one sender, at the receiver."""

    def __init__(
        self,
        sink: FrameSink,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        memory: WarmMemory,
        max_frame_bytes: int,
        meter: ReceiveMeter,
    ) -> None:
        self._sink = sink
        self._memory = memory
        self._max_frame_bytes = max_frame_bytes
        self._meter = meter
        self._records = Records(reader, writer, FROM_SENDER)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="nixl-read")  # one reads while one checks
        self._is_over = threading.Event()
        self._opening: asyncio.Task[RemoteMemory] | None = None
        self._remote: RemoteMemory | None = None
        self._num_reading = 0

    async def serve(self) -> None:
        """Until the peer leaves, which is an error. Raises an exception group."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._serve(tasks)
        finally:
            self._is_over.set()
            self._records.abort()
            await asyncio.to_thread(self._let_go)

    async def _serve(self, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self._records.beat())
        hello = Hello.parse(await self._records.expect(Kind.HELLO))
        self._records.write(Kind.WELCOME)
        while True:
            frame = Frame.parse(await self._records.expect(Kind.FRAME))
            is_allowed = frame.payload_bytes <= min(self._max_frame_bytes, hello.num_bytes - frame.offset)
            if not is_allowed or self._num_reading >= MAX_INFLIGHT_FRAMES:
                raise Malformed("a frame that no sender of ours would send")
            placed = self._place(frame)
            if placed is not None:
                self._num_reading += 1
                self._opening = self._opening or tasks.create_task(self._run(self._open, hello.metadata))
                tasks.create_task(self._take(self._opening, frame.number, hello.address + frame.offset, *placed))
            # With records waiting `expect` does not suspend: without this a fast peer starves the loop.
            await asyncio.sleep(0)

    def _place(self, frame: Frame) -> tuple[FrameHeader, memoryview] | None:
        """Where the payload shall go; None if the frame was refused, which is then answered."""
        try:
            return place_frame(self._sink, frame.packed_header, frame.payload_bytes, partial(self._lend, frame))
        except FrameRejected as rejection:
            self._answer(frame.number, rejection.reason, frame.payload_bytes)
            return None

    def _lend(self, frame: Frame) -> memoryview | None:
        return self._memory.take(frame.payload_bytes) if frame.payload_bytes > _SMALL_BYTES else None

    async def _take(
        self, opening: asyncio.Task[RemoteMemory], number: int, address: int, header: FrameHeader, memory: memoryview
    ) -> None:
        remote = await asyncio.shield(opening)
        crc = await self._run(self._fetch, remote, address, memory)
        self._num_reading -= 1
        try:
            self._sink.commit(header, memory, crc)
        except FrameRejected as rejection:
            return self._answer(number, rejection.reason, len(memory))
        self._answer(number, "ok", len(memory))

    def _answer(self, number: int, verdict: str, num_bytes: int) -> None:
        self._meter.received(verdict, num_bytes)
        try:
            self._records.write(Kind.VERDICT, pack_verdict(number, verdict))
        except OSError:
            self._meter.unanswered()
            raise

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    # --- on threads

    def _open(self, metadata: bytes) -> RemoteMemory:
        self._remote = RemoteMemory(metadata, self._records.local_address)
        return self._remote

    def _fetch(self, remote: RemoteMemory, address: int, memory: memoryview) -> int:
        remote.read(address, memory, self._is_over.is_set)
        return checksum(memory)

    def _let_go(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._remote is not None:
            self._remote.close()


def why_unavailable() -> str:
    """See ``common.transport.registry``."""
    return "" if is_installed() else NOT_INSTALLED


def why_not_auto() -> str:
    """See ``common.transport.registry``. Only the operator knows whether the network is isolated."""
    devices = ", ".join(rdma_devices())
    return f"{devices} found: name nixl if their network is isolated" if devices else "this machine has no RDMA device"


def receiver_at(listen: str, limits: TransportLimits) -> NixlReceiver:
    """See ``common.transport.registry``. Raises ConfigError."""
    if listen.startswith(PRIVATE_DIRECTORY):
        return NixlReceiver(f"{UNIX}{new_socket_path(listen, NAME)}", limits)
    return NixlReceiver(check_host_port(listen), limits)


sender_to = NixlSender
