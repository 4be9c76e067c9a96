"""What only plain sockets can do to us: bytes that are no frames, peers that dribble, stall or vanish, threads."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator

import pytest

from common.service import metrics
from common.service.errors import DeadlineExceeded, TransportFailed
from common.transport import tcp_receiver, tcp_sender
from common.transport.sender import TransportLimits
from common.transport.tcp_receiver import TcpReceiver
from common.transport.tcp_sender import TcpSender
from common.transport.tcp_wire import ANSWER, FRAME, GREETING, NO_ANSWER, NO_FRAME
from protos.status_pb2 import Endpoint
from tests.common.transport.fakes import MIB, MIB_TOKENS, MemorySink, key, make_frame, relayed

SECONDS = 20.0
LIMITS = TransportLimits()
pytestmark = pytest.mark.usefixtures("clean_loop")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def rejected(reason: str) -> float:
    return float(metrics.TRANSFER_FRAMES_REJECTED.labels("tcp", "receive", reason)._value.get())


def num_threads() -> int:
    return sum(thread.name == "features over tcp" for thread in threading.enumerate())


async def eventually(condition) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
async def receiver(sink: MemorySink) -> AsyncIterator[str]:
    """The address of one."""
    receiver = TcpReceiver("127.0.0.1:0", LIMITS)
    yield (await receiver.start(sink)).address
    await receiver.close()
    assert num_threads() == 0


@contextlib.asynccontextmanager
async def sender_to(address: str, limits: TransportLimits = LIMITS) -> AsyncIterator[TcpSender]:
    sender = TcpSender(address, limits)
    try:
        yield sender
    finally:
        await sender.close()


@contextlib.asynccontextmanager
async def raw_peer_of(address: str) -> AsyncIterator[Streams]:
    """A bare connection to a receiver, past its greeting."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        assert await reader.readexactly(len(GREETING)) == GREETING
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_receiver(*greeting: bytes) -> AsyncIterator[tuple[str, "asyncio.Queue[Streams]"]]:
    """A server that greets and then is at the mercy of the test."""
    connections: asyncio.Queue[Streams] = asyncio.Queue()
    writers = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        for piece in greeting:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        connections.put_nowait((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=2**20)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def verdict_on(reader: asyncio.StreamReader) -> tuple[int, str]:
    """The next one; heartbeats are passed over."""
    async with asyncio.timeout(SECONDS):
        while (answer := await reader.readexactly(ANSWER.size)) == NO_ANSWER:
            pass
        number, num_bytes = ANSWER.unpack(answer)
        return number, (await reader.readexactly(num_bytes)).decode()


async def ended(reader: asyncio.StreamReader) -> None:
    """Until the other side hangs up; what it says before does not count."""
    async with asyncio.timeout(SECONDS):
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass


def message(number: int, packed: bytes, payload: bytes) -> bytes:
    return FRAME.pack(len(packed), len(payload), number) + packed + payload


# --- a receiver and strangers


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 64, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", FRAME.pack(10_000, 10, 1), FRAME.pack(106, 2**31, 1)],
    ids=["ones", "http", "large header", "large payload"],
)
async def test_garbage_ends_its_connection_only(receiver: str, sink: MemorySink, garbage: bytes):
    before = rejected("magic")
    async with sender_to(receiver) as sender, raw_peer_of(receiver) as (reader, writer):
        writer.write(garbage)
        await ended(reader)
        _, packed, payload = make_frame()
        await sender.send(packed, payload, SECONDS)
    assert rejected("magic") == before + 1
    assert len(sink.ready) == 1


async def test_heartbeats_and_frames_may_come_in_any_pieces(receiver: str, sink: MemorySink):
    frames = [make_frame(number=number, num_tokens=num_tokens) for number, num_tokens in enumerate((1, 700, 16))]
    said = NO_FRAME + b"".join(message(n, packed, payload) + NO_FRAME for n, (_, packed, payload) in enumerate(frames))
    async with raw_peer_of(receiver) as (reader, writer):
        for start in range(0, len(said), 5_003):
            writer.write(said[start : start + 5_003])
            await writer.drain()
            await asyncio.sleep(0.001)
        assert [await verdict_on(reader) for _ in frames] == [(0, "ok"), (1, "ok"), (2, "ok")]
    assert sink.ready == {key(header): payload for header, _, payload in frames}


async def test_a_large_frame_that_is_refused_is_read_and_thrown_away(receiver: str, sink: MemorySink):
    sink.refuse_with = "tombstone"
    _, packed, payload = make_frame(num_tokens=4 * MIB_TOKENS)
    async with sender_to(receiver) as sender:
        for _ in range(3):
            with pytest.raises(ValueError, match="tombstone"):
                await sender.send(packed, payload, SECONDS)
        sink.refuse_with = None
        await sender.send(packed, payload, SECONDS)
    assert len(sink.ready) == 1


async def test_a_stranger_that_sends_a_header_bit_by_bit_is_cut_off(
    receiver: str, sink: MemorySink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tcp_receiver, "SILENCE", 0.4)
    async with raw_peer_of(receiver) as (reader, writer):

        async def dribble() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in FRAME.pack(600, 100, 1) + bytes(500):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.1)

        dribbling = asyncio.create_task(dribble())
        await ended(reader)
        dribbling.cancel()
        await asyncio.wait({dribbling})
    assert sink.num_placed == 0


async def test_a_mute_stranger_is_cut_off(receiver: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tcp_receiver, "SILENCE", 0.3)
    async with raw_peer_of(receiver) as (reader, _):
        await ended(reader)
    await eventually(lambda: num_threads() == 0)


async def test_a_peer_that_stops_within_a_frame_is_cut_off_and_its_memory_comes_back(
    sink: MemorySink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tcp_receiver, "SILENCE", 0.5)
    receiver = TcpReceiver("127.0.0.1:0", LIMITS)
    address = (await receiver.start(sink)).address
    _, packed, payload = make_frame(num_tokens=4 * MIB_TOKENS)
    async with raw_peer_of(address) as (reader, writer):
        writer.write(message(1, packed, payload)[: 2 * MIB])
        await eventually(lambda: sink.num_placed == 1)
        await ended(reader)
    assert sink.ready == {}
    sink._open.clear()
    await eventually(lambda: receiver._memory.idle_bytes == 4 * MIB)
    await receiver.close()
    assert receiver._memory.idle_bytes == 0


async def test_a_slow_wire_is_not_silence(sink: MemorySink, monkeypatch: pytest.MonkeyPatch):
    """A payload may take many times what a silence may."""
    monkeypatch.setattr(tcp_receiver, "SILENCE", 0.5)
    receiver = TcpReceiver("127.0.0.1:0", LIMITS)
    address = (await receiver.start(sink)).address
    _, packed, payload = make_frame(num_tokens=2 * MIB_TOKENS)
    said = message(1, packed, payload)
    async with raw_peer_of(address) as (reader, writer):
        for start in range(0, len(said), 2**17):
            writer.write(said[start : start + 2**17])
            await asyncio.sleep(0.1)
        assert await verdict_on(reader) == (1, "ok")
    await receiver.close()


async def test_strangers_cannot_keep_others_out(receiver: str, sink: MemorySink, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tcp_receiver, "_MAX_PEERS", 4)
    async with sender_to(receiver) as sender, contextlib.AsyncExitStack() as strangers:
        _, packed, payload = make_frame(number=1)
        await sender.send(packed, payload, SECONDS)
        for _ in range(12):
            await strangers.enter_async_context(raw_peer_of(receiver))
        _, packed, payload = make_frame(number=2)
        await sender.send(packed, payload, SECONDS)
        assert num_threads() <= 4 + 2
        async with sender_to(receiver) as another:
            _, packed, payload = make_frame(number=3)
            await another.send(packed, payload, SECONDS)
    assert len(sink.ready) == 3


async def test_a_peer_that_never_reads_its_verdicts_is_cut_off(private_directory: str):
    sink = MemorySink(refuse_with="x" * 200)
    receiver = TcpReceiver(f"unix:{private_directory}/tcp.sock", LIMITS)
    endpoint = await receiver.start(sink)
    _, packed, payload = make_frame(number=1)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(endpoint.address.removeprefix("unix:"))

    def flood() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(message(1, packed, payload))

    await asyncio.wait_for(asyncio.to_thread(flood), SECONDS)
    peer.close()
    sink.refuse_with = None
    async with sender_to(endpoint.address) as sender:
        await sender.send(packed, payload, SECONDS)
    await receiver.close()


async def test_a_failing_sink_hangs_up_and_says_so(caplog: pytest.LogCaptureFixture):
    for num_tokens in (16, MIB_TOKENS):  # taken in one call, and in two
        sink = MemorySink(crash_on=(7).to_bytes(16, "big"))
        receiver = TcpReceiver("127.0.0.1:0", LIMITS)
        endpoint = await receiver.start(sink)
        _, packed, payload = make_frame(number=7, num_tokens=num_tokens)
        async with sender_to(endpoint.address) as sender:
            with caplog.at_level(logging.ERROR), pytest.raises(TransportFailed):
                await sender.send(packed, payload, SECONDS)
            assert "a bug in the sink" in caplog.text
            async with sender_to(endpoint.address) as another:
                with pytest.raises(TransportFailed):
                    await another.send(packed, payload, SECONDS)
        await receiver.close()
        caplog.clear()
    assert num_threads() == 0


# --- a sender and strange receivers


@pytest.mark.parametrize(
    "answer",
    [ANSWER.pack(77, 2) + b"ok", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20],
    ids=["unknown number", "http"],
)
async def test_a_peer_that_answers_nonsense_is_given_up(answer: bytes):
    async with raw_receiver(GREETING) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame()
        send = asyncio.create_task(sender.send(packed, payload, SECONDS))
        _, writer = await connections.get()
        writer.write(answer)
        with pytest.raises(TransportFailed):
            await send
        assert sender.is_broken


@pytest.mark.parametrize("greeting", [b"HTTP/1.1", b"DVDT\x02\0\0\0"], ids=["http", "another version"])
async def test_a_peer_that_speaks_something_else_is_not_sent_to(greeting: bytes):
    async with raw_receiver(greeting) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame()
        with pytest.raises(TransportFailed, match="cannot be reached"):
            await sender.send(packed, payload, SECONDS)
        reader, _ = await connections.get()
        assert await reader.read() == b""


async def test_greeting_and_verdict_may_come_in_pieces():
    async with raw_receiver(GREETING[:3], GREETING[3:]) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame()
        send = asyncio.create_task(sender.send(packed, payload, SECONDS))
        reader, writer = await connections.get()
        assert await reader.readexactly(len(message(0, packed, payload))) == message(0, packed, payload)
        for byte in NO_ANSWER + ANSWER.pack(0, 2) + b"ok":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.001)
        await send


async def test_both_sides_say_that_they_are_there(receiver: str):
    async with raw_peer_of(receiver) as (reader, _):
        async with asyncio.timeout(SECONDS):
            assert await reader.readexactly(2 * ANSWER.size) == 2 * NO_ANSWER
    async with raw_receiver(GREETING) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame()
        send = asyncio.create_task(sender.send(packed, payload, SECONDS))
        reader, writer = await connections.get()
        await reader.readexactly(len(message(0, packed, payload)))
        writer.write(ANSWER.pack(0, 2) + b"ok")
        await send
        async with asyncio.timeout(SECONDS):
            assert await reader.readexactly(2 * FRAME.size) == 2 * NO_FRAME


async def test_a_peer_that_falls_silent_is_noticed(private_directory: str, receiver: str, monkeypatch):
    """Half-open connection: nothing is closed, nothing arrives. Noticed long before the deadline."""
    monkeypatch.setattr(tcp_sender, "HEARTBEAT", 0.1)
    endpoint = Endpoint(transport="tcp", address=receiver)
    async with relayed(endpoint, private_directory) as (relay, there), sender_to(there.address) as sender:
        _, packed, payload = make_frame()
        await sender.send(packed, payload, SECONDS)
        relay.pause()
        with pytest.raises(TransportFailed):
            await sender.send(packed, payload, 60.0)


async def test_a_peer_that_reads_slowly_is_not_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tcp_sender, "HEARTBEAT", 0.05)
    async with raw_receiver(GREETING) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame(num_tokens=16 * MIB_TOKENS)
        send = asyncio.create_task(sender.send(packed, payload, SECONDS))
        reader, writer = await connections.get()
        for _ in range(40):
            await reader.read(2**17)
            writer.write(NO_ANSWER)
            await asyncio.sleep(0.03)
        assert not sender.is_broken
        send.cancel()
        await asyncio.wait({send})


async def test_a_connection_at_rest_stays(receiver: str, sink: MemorySink, monkeypatch: pytest.MonkeyPatch):
    """Heartbeats are what keeps it: at the silence that is allowed here, it would end many times over."""
    for module in (tcp_receiver, tcp_sender):
        monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(tcp_receiver, "SILENCE", 1.0)
    receiver_at_rest = TcpReceiver("127.0.0.1:0", LIMITS)
    address = (await receiver_at_rest.start(sink)).address
    async with sender_to(address) as sender:
        _, packed, payload = make_frame(number=1)
        await sender.send(packed, payload, SECONDS)
        await asyncio.sleep(2.5)
        assert not sender.is_broken
        _, packed, payload = make_frame(number=2)
        await sender.send(packed, payload, SECONDS)
    await receiver_at_rest.close()
    assert len(sink.ready) == 2


async def test_a_frame_keeps_its_credit_until_it_is_acknowledged_even_when_its_caller_has_left():
    async with raw_receiver(GREETING) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame()
        with pytest.raises(DeadlineExceeded):
            await sender.send(packed, payload, 0.2)
        assert sender.inflight_bytes == len(payload)
        _, writer = await connections.get()
        writer.write(ANSWER.pack(0, 2) + b"ok")
        await eventually(lambda: sender.inflight_bytes == 0)


async def test_a_large_frame_does_not_hold_up_small_ones(monkeypatch: pytest.MonkeyPatch):
    """The first link is stuck in a payload that nobody reads; a second one is opened, and takes what waits."""
    async with raw_receiver(GREETING) as (address, connections), sender_to(address) as sender:
        _, packed, payload = make_frame(number=1, num_tokens=48 * MIB_TOKENS)
        large = asyncio.create_task(sender.send(packed, payload, SECONDS))
        await connections.get()
        small = []
        for number in (2, 3):
            _, packed, payload = make_frame(number=number)
            small.append(asyncio.create_task(sender.send(packed, payload, SECONDS)))
            await asyncio.sleep(0.05)
        async with asyncio.timeout(SECONDS):
            reader, writer = await connections.get()
            for number in (1, 2):
                said = await reader.readexactly(len(message(0, packed, payload)))
                assert FRAME.unpack_from(said)[2] == number
                writer.write(ANSWER.pack(number, 2) + b"ok")
            await asyncio.gather(*small)
        assert not large.done()
        large.cancel()
        await asyncio.wait({large})


async def test_no_thread_is_left(sink: MemorySink):
    receiver = TcpReceiver("127.0.0.1:0", LIMITS)
    endpoint = await receiver.start(sink)
    senders = [TcpSender(endpoint.address, LIMITS) for _ in range(3)]
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(12)]
    await asyncio.gather(
        *(senders[n % 3].send(packed, payload, SECONDS) for n, (_, packed, payload) in enumerate(frames))
    )
    assert 6 <= num_threads() <= 12
    for sender in senders:
        await sender.close()
    await eventually(lambda: num_threads() == 0)  # the receiver's end by themselves
    await receiver.close()


async def test_no_payload_is_held_after_its_send(receiver: str):
    """A thread that waits for the next frame must not keep the last one: a bytearray that is held cannot shrink."""
    async with sender_to(receiver) as sender:
        _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        buffer = bytearray(payload)
        await sender.send(packed, buffer, SECONDS)
        async with asyncio.timeout(SECONDS):
            while buffer:
                with contextlib.suppress(BufferError):
                    buffer.clear()
                await asyncio.sleep(0.005)
