"""What only shared memory can do to us: payloads that stay where they were written, peers that lie, die or hold on."""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from typing_extensions import Buffer

from common.service import metrics
from common.service.errors import DeadlineExceeded, TransportFailed
from common.transport import packets, registry, segments, shm, shm_inbox
from common.transport.base import Lend
from common.transport.sender import TransportLimits
from common.transport.shm import ShmReceiver, ShmSender, _Outgoing
from common.transport.shm_messages import (
    FORGET,
    FORGET_KIND,
    FRAME,
    FRAME_KIND,
    HELLO,
    MAGIC,
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
from protos.status_pb2 import Endpoint
from tests.common.transport.fakes import MIB, MIB_TOKENS, Key, MemorySink, key, make_frame

SECONDS = 20.0
pytestmark = pytest.mark.usefixtures("clean_loop")


@dataclass
class KeepingSink(MemorySink):
    """Keeps each payload where it was put, as the feature store does, until told to let go."""

    kept: dict[Key, memoryview] = field(default_factory=dict)
    num_lent: int = 0

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        self.num_lent += lend is not None
        return super().place(header, packed_header, lend)

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        super().commit(header, memory, payload_crc32c)
        self.kept[key(header)] = memory


@dataclass
class Pair:
    receiver: ShmReceiver
    endpoint: Endpoint
    sender: ShmSender


@contextlib.asynccontextmanager
async def pair_of(sink: MemorySink, limits: TransportLimits | None = None) -> AsyncIterator[Pair]:
    limits = limits or TransportLimits()
    receiver = shm.receiver_at("127.0.0.1:0", limits)
    endpoint = await receiver.start(sink)
    sender = ShmSender(endpoint.address, limits)
    try:
        yield Pair(receiver, endpoint, sender)
    finally:
        await sender.close()
        await receiver.close()


async def eventually(condition) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def num_segments() -> int:
    (family,) = metrics.TRANSFER_SHM_SEGMENTS.collect()
    return int(family.samples[0].value)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    segments.maker().submit(int).result()  # so that its thread is there
    files = num_open_files()
    yield
    gc.collect()
    await eventually(lambda: num_segments() == 0 and num_open_files() <= files)


# --- lending


async def test_a_payload_stays_where_it_was_written_until_the_sink_lets_go():
    sink = KeepingSink()
    async with pair_of(sink) as pair:
        frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(6)]
        for _, packed, payload in frames:
            await pair.sender.send(packed, payload, SECONDS)
        assert sink.num_lent == 6
        assert all(sink.kept[key(header)] == payload for header, _, payload in frames)
        assert num_segments() == 12  # both ends are in this process

        sink.kept.clear()
        for number in range(6, 18):
            _, packed, payload = make_frame(number=number, num_tokens=MIB_TOKENS)
            await pair.sender.send(packed, payload, SECONDS)
            sink.kept.clear()
            await eventually(lambda: pair.sender._pool._idle)
        assert num_segments() <= 14  # used again


async def test_what_is_kept_outlives_the_connection_and_its_sender():
    sink = KeepingSink()
    async with pair_of(sink) as pair:
        header, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        await pair.sender.send(packed, payload, SECONDS)
    assert num_segments() == 1
    assert sink.kept[key(header)] == payload


async def test_beyond_what_it_may_keep_payloads_are_copied_and_nobody_waits():
    sink = KeepingSink()
    limits = TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=4 * MIB)
    async with pair_of(sink, limits) as pair:
        frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(20)]
        await asyncio.gather(*(pair.sender.send(packed, payload, SECONDS) for _, packed, payload in frames))
        assert 0 < sink.num_lent <= 6
        assert num_segments() * MIB <= 2 * segments.pool_bytes(limits)
        assert all(sink.kept[key(header)] == payload for header, _, payload in frames)
        sink.kept.clear()
        await asyncio.sleep(0)
        num_lent = sink.num_lent
        for number in range(20, 24):
            _, packed, payload = make_frame(number=number, num_tokens=MIB_TOKENS)
            await pair.sender.send(packed, payload, SECONDS)
        assert sink.num_lent > num_lent  # lends again


async def test_a_segment_that_is_released_late_is_waited_for_as_long_as_the_deadline():
    sink = MemorySink()
    limits = TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=2 * MIB)
    async with pair_of(sink, limits) as pair:
        _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        await pair.sender.send(packed, payload, SECONDS)
        await eventually(lambda: pair.sender._pool._idle)
        taken = []
        with contextlib.suppress(MemoryError):
            while True:
                taken.append(pair.sender._pool.take(MIB)[0])
        _, packed, payload = make_frame(number=1, num_tokens=MIB_TOKENS)
        with pytest.raises(DeadlineExceeded):
            await pair.sender.send(packed, payload, 0.05)
        assert pair.sender.inflight_bytes == 0

        send = asyncio.create_task(pair.sender.send(packed, payload, SECONDS))
        await eventually(lambda: pair.sender.inflight_bytes == MIB)
        await asyncio.sleep(0)
        nobody = asyncio.get_running_loop().create_future()
        pair.sender._maybe_give_back(
            _Outgoing(0, b"", memoryview(b""), nobody, taken[0], is_written=True, is_released=True)
        )
        await send
        assert len(sink.ready) == 2


async def test_other_threads_may_let_go():
    sink = KeepingSink()
    async with pair_of(sink) as pair:
        for number in range(8):
            _, packed, payload = make_frame(number=number, num_tokens=MIB_TOKENS)
            await pair.sender.send(packed, payload, SECONDS)
            thread = threading.Thread(target=sink.kept.clear)
            thread.start()
            await asyncio.to_thread(thread.join)
            await eventually(lambda: pair.sender._pool._idle)
        assert num_segments() == 2


async def test_segments_of_one_size_give_way_to_another():
    sink = MemorySink()
    limits = TransportLimits(max_frame_bytes=4 * MIB, max_inflight_bytes=4 * MIB)
    async with pair_of(sink, limits) as pair:
        for number in range(40):
            header, packed, payload = make_frame(number=number, num_tokens=(1 + number % 4) * MIB_TOKENS)
            await pair.sender.send(packed, payload, SECONDS)
            assert sink.ready.pop(key(header)) == payload
            assert pair.sender._pool.num_bytes <= segments.pool_bytes(limits)


async def test_cancelled_while_it_is_copied():
    sink = MemorySink()
    async with pair_of(sink) as pair:
        for number in range(10):
            _, packed, payload = make_frame(number=number, num_tokens=32 * MIB_TOKENS)
            send = asyncio.create_task(pair.sender.send(packed, payload, SECONDS))
            for _ in range(number):
                await asyncio.sleep(0)
            send.cancel()
            with pytest.raises(asyncio.CancelledError):
                await send
        await eventually(lambda: pair.sender.inflight_bytes == 0)
        header, packed, payload = make_frame(number=99, num_tokens=32 * MIB_TOKENS)
        await pair.sender.send(packed, payload, SECONDS)
        assert sink.ready[key(header)] == payload


async def test_a_large_frame_refused_by_its_header():
    sink = MemorySink(refuse_with="tombstone")
    async with pair_of(sink) as pair:
        _, packed, payload = make_frame(num_tokens=32 * MIB_TOKENS)
        for _ in range(5):
            with pytest.raises(FrameRejected, match="tombstone"):
                await pair.sender.send(packed, payload, SECONDS)
        sink.refuse_with = None
        await pair.sender.send(packed, payload, SECONDS)
        assert len(sink.ready) == 1


async def test_a_mistake_in_the_sink_fails_the_frame_at_once(caplog):
    sink = MemorySink(crash_on=bytes(16))
    async with pair_of(sink) as pair:
        _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        with pytest.raises(TransportFailed):
            await pair.sender.send(packed, payload, SECONDS)
        again = ShmSender(pair.endpoint.address, TransportLimits())
        _, packed, payload = make_frame(number=1)
        await again.send(packed, payload, SECONDS)
        await again.close()
    assert "a bug in the sink" in caplog.text
    caplog.clear()  # its traceback holds the payload


# --- death


async def test_what_a_killed_sender_had_lent_is_still_right_and_then_gone():
    sink = KeepingSink()
    async with pair_of(sink) as pair:
        command = (sys.executable, "-m", "tests.common.transport.peer_process", "send", "shm", pair.endpoint.address)
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        await eventually(lambda: len(sink.kept) >= 10)
        process.kill()
        await process.wait()
        await eventually(lambda: not pair.receiver._inboxes)
        assert num_segments() > 0
        assert all(
            memory == make_frame(number=int.from_bytes(request_id, "big"), num_tokens=MIB_TOKENS)[2]
            for (request_id, _, _), memory in sink.kept.items()
        )
        sink.kept.clear()
        sink.forget_unfinished()
        await eventually(lambda: num_segments() == 0)


async def test_a_receiver_killed_with_segments_leaves_nothing():
    names = set(os.listdir("/dev/shm"))
    command = (sys.executable, "-m", "tests.common.transport.peer_process", "receive", "shm", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    sender = ShmSender((await process.stdout.readline()).decode().strip(), TransportLimits())
    _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
    await sender.send(packed, payload, SECONDS)
    process.send_signal(signal.SIGSTOP)
    _, packed, payload = make_frame(number=1, num_tokens=32 * MIB_TOKENS)
    send = asyncio.create_task(sender.send(packed, payload, SECONDS))
    await eventually(lambda: not sender._writing and len(sender._lent) > 0)
    process.kill()
    await process.wait()
    with pytest.raises(TransportFailed):
        await send
    await eventually(lambda: num_segments() == 0)
    await sender.close()
    assert set(os.listdir("/dev/shm")) <= names


# --- memory


def test_a_segment_cannot_be_shrunk_by_who_maps_it():
    descriptor, memory = segments.create(MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    del memory


@pytest.mark.parametrize("cause", [errno.EMFILE, errno.ENOMEM])
async def test_without_memory_or_descriptors_another_transport_is_taken(monkeypatch, cause: int):
    def fail(*_: object) -> int:
        raise OSError(cause, os.strerror(cause))

    sink = MemorySink()
    async with pair_of(sink) as pair:
        _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", fail)
            with pytest.raises(TransportFailed, match=os.strerror(cause)):
                await pair.sender.send(packed, payload, SECONDS)
        assert pair.sender.inflight_bytes == 0
        await pair.sender.send(packed, payload, SECONDS)
        assert len(sink.ready) == 1


def test_a_machine_without_it_is_told_so(monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(errno.EPERM, "not here")

    assert shm.why_unavailable() == ""
    monkeypatch.setattr(os, "memfd_create", fail)
    assert "not here" in shm.why_unavailable()


# --- addresses


async def test_a_receiver_elsewhere_is_not_even_tried():
    async with pair_of(MemorySink()) as pair:
        name = pair.endpoint.address.rpartition("/")[2]
        assert registry.can_reach(pair.endpoint)
        elsewhere = Endpoint(transport="shm", address=f"shm://5203e9dd-0000-4e54-828e-e863d651ae31.4026531833/{name}")
        assert not registry.can_reach(elsewhere)
        sender = ShmSender(elsewhere.address, TransportLimits())
        _, packed, payload = make_frame()
        with pytest.raises(TransportFailed, match="another host"):
            await sender.send(packed, payload, SECONDS)
        await sender.close()


async def test_another_users_process_is_refused_by_both_ends(monkeypatch):
    sink = MemorySink()
    async with pair_of(sink) as pair:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        _, packed, payload = make_frame()
        with pytest.raises(TransportFailed, match="another user"):
            await pair.sender.send(packed, payload, SECONDS)
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.connect("\0" + pair.endpoint.address.rpartition("/")[2])
        stranger.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(stranger, 100) == b""
        stranger.close()
    assert sink.num_placed == 0


# --- liars


class RawPeer:
    """One end of a connection that may say anything."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def says(self, message: bytes, *descriptors: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._connection, [message], list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)

    async def hears(self) -> bytes:
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionResetError):
                return await asyncio.get_running_loop().sock_recv(self._connection, 1000)
            return b""

    def close(self) -> None:
        self._connection.close()


HELLO_MESSAGE = HELLO.pack(MAGIC, VERSION, MIB)


def frame_message(segment: int, number: int, packed: bytes, payload_bytes: int, num_written: int) -> bytes:
    return FRAME.pack(FRAME_KIND, len(packed), segment, number, payload_bytes, num_written) + packed


def unsealed(num_bytes: int) -> int:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def sealed(num_bytes: int) -> int:
    return segments.create(num_bytes)[0]


def lies() -> Iterator[tuple[str, list[tuple[bytes, list]]]]:
    """Messages that no sender of ours sends, after the hello unless they replace it; descriptors are made when used."""
    _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
    whole = frame_message(1, 1, packed, len(payload), len(payload))
    small = make_frame(num_tokens=1)
    yield "no hello", [(whole, [])]
    yield "another magic", [(HELLO.pack(b"HTTP", VERSION, MIB), [])]
    yield "another version", [(HELLO.pack(MAGIC, VERSION + 1, MIB), [])]
    yield "two hellos", [(HELLO_MESSAGE, []), (HELLO_MESSAGE, [])]
    yield "one byte", [(HELLO_MESSAGE, []), (b"\x01", [])]
    yield "an unknown kind", [(HELLO_MESSAGE, []), (b"\xff" * 40, [])]
    yield "too long", [(HELLO_MESSAGE, []), (b"\x01" * 50_000, [])]
    yield "an unknown segment", [(HELLO_MESSAGE, []), (whole, [])]
    yield "no segment and no payload", [(HELLO_MESSAGE, []), (frame_message(0, 1, packed, len(payload), 0), [])]
    yield "not sealed", [(HELLO_MESSAGE, []), (whole, [lambda: unsealed(MIB)])]
    yield "no memory at all", [(HELLO_MESSAGE, []), (whole, [lambda: os.open("/dev/null", os.O_RDWR)])]
    yield "too small", [(HELLO_MESSAGE, []), (whole, [lambda: sealed(MIB // 2)])]
    yield "too large", [(HELLO_MESSAGE, []), (whole, [lambda: sealed(72 * MIB)])]
    yield "two descriptors", [(HELLO_MESSAGE, []), (whole, [lambda: sealed(MIB), lambda: sealed(MIB)])]
    yield "one where none belongs", [(HELLO_MESSAGE, []), (FORGET.pack(FORGET_KIND, 1), [lambda: sealed(MIB)])]
    yield (
        "one beside a payload",
        [(HELLO_MESSAGE, []), (frame_message(0, 1, small[1], 128, 128) + small[2], [lambda: sealed(MIB)])],
    )
    yield "forgets nothing", [(HELLO_MESSAGE, []), (FORGET.pack(FORGET_KIND, 1), [])]
    partly = frame_message(1, 1, packed, len(payload), 4096)
    again = frame_message(1, 2, packed, len(payload), 4096)
    yield "a segment in use", [(HELLO_MESSAGE, []), (partly, [lambda: sealed(MIB)]), (again, [])]
    yield "the number again", [(HELLO_MESSAGE, []), (partly, [lambda: sealed(MIB)]), (partly, [lambda: sealed(MIB)])]
    yield (
        "forgets what is in use",
        [(HELLO_MESSAGE, []), (partly, [lambda: sealed(MIB)]), (FORGET.pack(FORGET_KIND, 1), [])],
    )
    for name, num_written in (("shrinks", 100), ("overflows", MIB + 1), ("overflows by far", 2**64 - 1)):
        written = WRITTEN.pack(WRITTEN_KIND, 1, num_written)
        yield name, [(HELLO_MESSAGE, []), (partly, [lambda: sealed(MIB)]), (written, [])]


@pytest.mark.parametrize("lie", [pytest.param(messages, id=name) for name, messages in lies()])
async def test_a_sender_that_breaks_the_rules_is_cut_off_and_nobody_else(lie: list[tuple[bytes, list]]):
    sink = MemorySink()
    async with pair_of(sink) as pair:
        liar = RawPeer(packets.connect(pair.endpoint.address.rpartition("/")[2]))
        for message, descriptors in lie:
            await liar.says(message, *(make() for make in descriptors))
        while (heard := await liar.hears()) != b"":
            assert heard[0] in (MAGIC[0], VERDICT_KIND)
        liar.close()
        _, packed, payload = make_frame(number=7, num_tokens=MIB_TOKENS)
        await pair.sender.send(packed, payload, SECONDS)
        assert len(sink.ready) == 1


async def test_a_sender_that_says_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(shm_inbox, "_GREETING_SECONDS", 0.05)
    async with pair_of(MemorySink()) as pair:
        silent = RawPeer(packets.connect(pair.endpoint.address.rpartition("/")[2]))
        assert await silent.hears() == b""
        silent.close()


async def test_bytes_changed_before_they_are_checked_are_noticed():
    sink = MemorySink()
    async with pair_of(sink) as pair:
        _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        liar = RawPeer(packets.connect(pair.endpoint.address.rpartition("/")[2]))
        await liar.says(HELLO_MESSAGE)
        assert await liar.hears() == WELCOME.pack(MAGIC, VERSION)
        await liar.says(frame_message(1, 5, packed, len(payload), len(payload)), sealed(MIB))  # all zeros
        answers = {await liar.hears(), await liar.hears()}
        assert answers == {VERDICT.pack(VERDICT_KIND, 5) + b"checksum", RELEASE.pack(RELEASE_KIND, 1)}
        liar.close()
    assert sink.ready == {}


@pytest.mark.parametrize(
    "answers",
    [
        [b"x"],
        [WELCOME.pack(MAGIC, VERSION + 1)],
        [WELCOME.pack(MAGIC, VERSION), WELCOME.pack(MAGIC, VERSION)],
        [WELCOME.pack(MAGIC, VERSION), VERDICT.pack(VERDICT_KIND, 9) + b"ok"],
        [WELCOME.pack(MAGIC, VERSION), VERDICT.pack(VERDICT_KIND, 0)],
        [WELCOME.pack(MAGIC, VERSION), RELEASE.pack(RELEASE_KIND, 9)],
        [WELCOME.pack(MAGIC, VERSION), b"\x04" * 1000],
        [],
    ],
    ids=["garbage", "version", "two welcomes", "verdict on nothing", "no word", "releases nothing", "long", "hangs up"],
)
async def test_answers_of_no_receiver_end_the_connection(answers: list[bytes]):
    listener = packets.listen("dvd-test-" + os.urandom(8).hex())
    name = listener.getsockname()[1:].decode()
    sender = ShmSender(shm.address_of(name), TransportLimits())
    _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
    send = asyncio.create_task(sender.send(packed, payload, SECONDS))
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    peer = RawPeer(connection)
    for answer in answers:
        assert await peer.hears() != b""
        await peer.says(answer)
    if not answers:
        peer.close()
    with pytest.raises(TransportFailed):
        await send
    peer.close()
    listener.close()
    await sender.close()
