"""Neighbours of a transport: a sink in memory, frames to send, and a relay that can go silent, break or corrupt."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Buffer

from common.transport.base import Lend
from protos.frame import FrameHeader, FrameRejected, checksum, is_signed_by, pack_header, with_checksum
from protos.seal import open_payload, pack_frame
from protos.status_pb2 import Endpoint
from tests.common.transport.shm_relay import ShmRelay

FINGERPRINT = bytes(range(16))
TICKET = b"t" * 32
HIDDEN_SIZE = 64
MIB = 2**20
MIB_TOKENS = MIB // (2 * HIDDEN_SIZE)

Key = tuple[bytes, int, int]  # request, image, first tile


def make_frame(
    *,
    number: int = 0,
    num_tokens: int = 16,
    ticket: bytes = TICKET,
    fill: bytes | None = None,
) -> tuple[FrameHeader, bytes, bytes]:
    """Header, packed header and payload of a frame of ``num_tokens`` x 64 bfloat16, different for each number."""
    num_bytes = num_tokens * HIDDEN_SIZE * 2
    payload = (fill or number.to_bytes(4, "little") + b"feature") * (num_bytes // 4)
    payload = payload[:num_bytes]
    tiles = tuple([4096] * (num_tokens // 4096) + [num_tokens % 4096] * (num_tokens % 4096 > 0))
    header = FrameHeader(
        fingerprint=FINGERPRINT,
        request_id=number.to_bytes(16, "big"),
        image_index=0,
        attempt=0,
        first_tile=0,
        num_image_tiles=len(tiles),
        hidden_size=HIDDEN_SIZE,
        dtype="bfloat16",
        tokens_per_tile=tiles,
        payload_crc32c=0,
    )
    header = with_checksum(header, payload)
    return header, pack_header(header, ticket), payload


def sealed_frame(*, ticket: bytes = TICKET, **options: Any) -> tuple[FrameHeader, bytes, memoryview, bytes]:
    """As ``make_frame``: header, and what goes out; last what it says."""
    header, _, payload = make_frame(**options)
    return header, *pack_frame(header, memoryview(payload), ticket, is_sealed=True), payload


def key(header: FrameHeader) -> Key:
    return header.request_id, header.image_index, header.first_tile


@dataclass
class MemorySink:
    """A ``FrameSink`` that keeps every frame. ``refuse_with`` makes it refuse all of them for that reason."""

    seals: bool = False  # none in clear are taken
    refuse_with: str | None = None
    crash_on: bytes | None = None  # request id that makes `place` fail as no sink should
    on_place: Callable[[], None] = lambda: None
    ready: dict[Key, bytes] = field(default_factory=dict)
    num_placed: int = 0
    _open: dict[Key, memoryview] = field(default_factory=dict)

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        self.num_placed += 1
        self.on_place()
        if header.request_id == self.crash_on:
            raise RuntimeError("a bug in the sink")
        if self.refuse_with is not None:
            raise FrameRejected(self.refuse_with, "as told")
        if header.fingerprint != FINGERPRINT:
            raise FrameRejected("fingerprint", "another checkpoint")
        if not is_signed_by(packed_header, TICKET):
            raise FrameRejected("ticket", "not signed with ours")
        if self.seals and header.seal is None:
            raise FrameRejected("unsealed", "readable")
        if key(header) in self.ready:
            raise FrameRejected("duplicate", "was here before")
        lent = None if lend is None else lend()
        self._open[key(header)] = memoryview(bytearray(header.payload_bytes) if lent is None else lent).cast("B")
        return self._open[key(header)]

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        payload = self._open.pop(key(header))
        assert payload is memory
        assert checksum(payload) == payload_crc32c
        if header.seal is not None:
            open_payload(header, memory, TICKET)
        elif payload_crc32c != header.payload_crc32c:
            raise FrameRejected("checksum", "payload changed on its way")
        self.ready[key(header)] = bytes(payload)

    def forget_unfinished(self) -> None:
        """Let go of what was begun and not committed, as a feature store does when the request ends."""
        self._open.clear()


class Relay:
    """Stands between a sender and a receiver, on the same kind of address as the receiver's."""

    def __init__(self, endpoint: Endpoint, directory: str) -> None:
        self._target = endpoint
        self._directory = directory
        self._running = asyncio.Event()
        self._running.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._flip_at: int | None = None
        self._cut_at: int | None = None
        self.num_connections = 0
        self.num_forwarded = 0  # bytes, both ways
        self.forwarded: list[bytes] = []  # what they were, where ``keeps``
        self.keeps = False

    async def start(self) -> Endpoint:
        prefix, path, host_port = _split(self._target.address)
        if path:
            path = os.path.join(self._directory, f"relay-{self._target.transport}.sock")
            self._server = await asyncio.start_unix_server(self._accept, path)
            return Endpoint(transport=self._target.transport, address=prefix + path)
        host = host_port.rpartition(":")[0]
        self._server = await asyncio.start_server(self._accept, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Endpoint(transport=self._target.transport, address=f"{prefix}{host}:{port}")

    def pause(self) -> None:
        """Forward nothing in either direction; the connection stays up."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def flip_a_bit_after(self, num_bytes: int) -> None:
        """In what is forwarded from now on, once."""
        self._flip_at = self.num_forwarded + num_bytes

    def cut_after(self, num_bytes: int) -> None:
        """Break the connections within what is forwarded from now on, once."""
        self._cut_at = self.num_forwarded + num_bytes

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        accepting = asyncio.current_task()
        assert accepting is not None
        self._pumps.add(accepting)
        accepting.add_done_callback(self._pumps.discard)
        self._writers.add(writer)
        _, path, host_port = _split(self._target.address)
        try:
            if path:
                there = await asyncio.open_unix_connection(path)
            else:
                host, _, port = host_port.rpartition(":")
                there = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        self._writers.add(there[1])
        for source, target in ((reader, there[1]), (there[0], writer)):
            pump = asyncio.create_task(self._pump(source, target))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(2**16):
                await self._running.wait()
                if self._cut_at is not None and self._cut_at < self.num_forwarded + len(data):
                    target.write(data[: max(0, self._cut_at - self.num_forwarded)])
                    self._cut_at = None
                    for writer in self._writers:
                        writer.transport.abort()
                    break
                target.write(self._maybe_flip(data))
                self.num_forwarded += len(data)
                if self.keeps:
                    self.forwarded.append(data)
                await target.drain()
        while target.transport.get_write_buffer_size():
            await asyncio.sleep(0.005)
        target.transport.abort()  # unlike close, harmless when it comes twice

    def _maybe_flip(self, data: bytes) -> bytes:
        if self._flip_at is None or self._flip_at >= self.num_forwarded + len(data):
            return data
        at = self._flip_at - self.num_forwarded
        self._flip_at = None
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@contextlib.asynccontextmanager
async def relayed(endpoint: Endpoint, directory: str) -> AsyncIterator[tuple[Relay | ShmRelay, Endpoint]]:
    relay = ShmRelay(endpoint) if endpoint.transport == "shm" else Relay(endpoint, directory)
    try:
        yield relay, await relay.start()
    finally:
        await relay.close()


def _split(address: str) -> tuple[str, str, str]:
    """Prefix, path of a unix socket or "", host:port or ""."""
    for prefix in ("ipc://", "unix:"):
        if address.startswith(prefix):
            return prefix, address.removeprefix(prefix), ""
    return ("tcp://", "", address[6:]) if address.startswith("tcp://") else ("", "", address)
