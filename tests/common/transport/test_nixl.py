"""What only NIXL's transport promises. Transfers are real ones, between processes, over UCX's TCP and shared memory."""

import asyncio
import logging
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.service.errors import ConfigError, DeadlineExceeded, TransportFailed
from common.transport import nixl_agent
from common.transport.nixl import NixlReceiver, receiver_at, why_not_auto
from common.transport.nixl_sender import NixlSender
from common.transport.records import Kind
from common.transport.registry import why_unavailable
from common.transport.sender import TransportLimits
from tests.common.transport.conftest import end
from tests.common.transport.fakes import MIB, MIB_TOKENS, MemorySink, key, make_frame

if reason := why_unavailable("nixl"):
    pytest.skip(f"nixl cannot be tested on this machine: {reason}", allow_module_level=True)

SECONDS = 30.0  # a deadline that only a hang can reach
HEAD = struct.Struct("<BxxxI")


@pytest.fixture(params=["tcp", ""], ids=["tcp", "shared-memory"])
def ucx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """UCX's choice of transports: TCP alone, as between machines without RDMA, or all, which is memory of the other."""
    if request.param:
        monkeypatch.setenv("UCX_TLS", request.param)
    return request.param


@pytest.fixture
async def receiver(clean_loop: None) -> AsyncIterator[NixlReceiver]:
    receiver = receiver_at("127.0.0.1:0", TransportLimits())
    yield receiver
    await receiver.close()


async def eventually(condition) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def peer(role: str, where: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "tests.common.transport.peer_process", role, "nixl", where)
    return await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)


async def send_one(address: str, number: int, num_tokens: int = 16) -> None:
    sender = NixlSender(address, TransportLimits())
    _, packed, payload = make_frame(number=number, num_tokens=num_tokens)
    try:
        await sender.send(packed, payload, SECONDS)
    finally:
        await sender.close()


# --- peers that die or stand still while their memory is read


@pytest.mark.parametrize(
    ("ucx", "cause"), [("tcp", signal.SIGKILL), ("tcp", signal.SIGSTOP), ("", signal.SIGKILL)], indirect=["ucx"]
)
async def test_a_sender_lost_in_a_transfer_leaves_nothing(receiver: NixlReceiver, ucx: str, cause: signal.Signals):
    sink = MemorySink()
    endpoint = await receiver.start(sink)
    await send_one(endpoint.address, 2**31)
    await eventually(lambda: not receiver._serving)
    process = await peer("send", endpoint.address)
    baseline = open_files()  # with those of the process, which has not connected yet
    sink.on_place = lambda: process.send_signal(cause) if sink.num_placed == 12 else None

    try:
        await eventually(lambda: sink.num_placed >= 12)
        await eventually(lambda: not receiver._serving and open_files() <= baseline)
        placed = list(sink._open.values())
        before = [bytes(memory) for memory in placed]
        if cause == signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            await process.wait()
    finally:
        await end(process)

    await send_one(endpoint.address, 2**31 + 1)
    assert [bytes(memory) for memory in placed] == before  # no late write
    for (request_id, _, _), payload in sink.ready.items():
        number = int.from_bytes(request_id, "big")
        assert payload == make_frame(number=number, num_tokens=len(payload) // 128)[2]


async def test_a_receiver_killed_while_it_reads_costs_only_its_frames(ucx: str, clean_loop: None):
    process = await peer("receive", "127.0.0.1:0")
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    sender = NixlSender(address, TransportLimits())
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    frames = [make_frame(number=number, num_tokens=16 * MIB_TOKENS) for number in range(1, 9)]
    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await asyncio.wait(sends, return_when=asyncio.FIRST_COMPLETED)
    await end(process)
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    await sender.close()
    assert {type(outcome) for outcome in outcomes} <= {type(None), TransportFailed}
    assert outcomes[-1] is not None and sender.inflight_bytes == 0


async def test_a_receiver_that_stands_still_is_noticed(clean_loop: None):
    process = await peer("receive", "127.0.0.1:0")
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    sender = NixlSender(address, TransportLimits())
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        await sender.send(packed, payload, 0.1)
    with pytest.raises(TransportFailed):
        await sender.send(packed, payload, SECONDS)
    await sender.close()
    await end(process)


# --- transfers


async def test_64_mb_frames_and_many_small_ones_at_once(receiver: NixlReceiver, ucx: str):
    sink = MemorySink()
    endpoint = await receiver.start(sink)
    sender = NixlSender(endpoint.address, TransportLimits())
    frames = [make_frame(number=number, num_tokens=64 * MIB_TOKENS) for number in range(2)]
    frames += [make_frame(number=number, num_tokens=number % 300 + 1) for number in range(2, 500)]
    await asyncio.gather(*(sender.send(packed, payload, SECONDS) for _, packed, payload in frames))
    await sender.close()
    assert sink.ready == {key(header): payload for header, _, payload in frames}


async def test_an_open_connection_without_frames_needs_no_processor(receiver: NixlReceiver):
    endpoint = await receiver.start(MemorySink())
    sender = NixlSender(endpoint.address, TransportLimits())
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    begin = time.process_time()
    await asyncio.sleep(1)
    assert time.process_time() - begin < 0.2
    await sender.close()


async def test_over_a_unix_socket(clean_loop: None, private_directory: str):
    sink = MemorySink()
    receiver = receiver_at(f"unix-dir:{private_directory}", TransportLimits())
    endpoint = await receiver.start(sink)
    assert endpoint.address.startswith(f"unix:{private_directory}/")
    await send_one(endpoint.address, 1, num_tokens=MIB_TOKENS)
    await receiver.close()
    assert len(sink.ready) == 1 and os.listdir(private_directory) == []


async def test_a_bug_in_the_sink_costs_the_connection_and_is_logged(
    receiver: NixlReceiver, caplog: pytest.LogCaptureFixture
):
    header, _, _ = make_frame(number=1)
    sink = MemorySink(crash_on=header.request_id)
    endpoint = await receiver.start(sink)
    with pytest.raises(TransportFailed):
        await send_one(endpoint.address, 1)
    await send_one(endpoint.address, 2)
    await eventually(lambda: "a bug in the sink" in caplog.text)


# --- strangers


class Stranger:
    """Speaks the control connection by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, kind: int, body: bytes) -> None:
        self.writer.write(HEAD.pack(kind, len(body)) + body)

    def greet(self, metadata: bytes = b"not metadata", num_bytes: int = MIB) -> None:
        self.say(Kind.HELLO, struct.pack("<8sQQ", b"DVDNIXL1", 4096, num_bytes) + metadata)

    def offer(self, packed: bytes, payload_bytes: int, offset: int = 0) -> None:
        self.say(Kind.FRAME, struct.pack("<QQQ", 7, offset, payload_bytes) + packed)

    async def hear(self) -> tuple[int, bytes]:
        """The next record but beats."""
        async with asyncio.timeout(SECONDS):
            while True:
                kind, num_bytes = HEAD.unpack(await self.reader.readexactly(HEAD.size))
                body = await self.reader.readexactly(num_bytes)
                if kind != Kind.BEAT:
                    return kind, body

    async def is_hung_up_on(self) -> bool:
        async with asyncio.timeout(SECONDS):
            try:
                while await self.reader.read(4096):
                    pass
            except ConnectionError:
                pass
        return True


@pytest.fixture
async def stranger(receiver: NixlReceiver) -> AsyncIterator[Stranger]:
    endpoint = await receiver.start(MemorySink())
    host, _, port = endpoint.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    yield Stranger(reader, writer)
    writer.transport.abort()


async def test_metadata_are_not_looked_at_before_a_valid_ticket(stranger: Stranger):
    stranger.greet()
    assert (await stranger.hear())[0] == Kind.WELCOME
    baseline = open_files()
    for _ in range(3):
        _, packed, payload = make_frame(ticket=b"x" * 32)
        stranger.offer(packed, len(payload))
        assert await stranger.hear() == (Kind.VERDICT, struct.pack("<Q", 7) + b"ticket")
    assert open_files() == baseline  # no agent was made


async def test_metadata_of_no_use_cost_only_their_connection(stranger: Stranger, receiver: NixlReceiver):
    stranger.greet()
    assert (await stranger.hear())[0] == Kind.WELCOME
    _, packed, payload = make_frame()
    stranger.offer(packed, len(payload))
    assert await stranger.is_hung_up_on()
    host, port = stranger.writer.get_extra_info("peername")
    await send_one(f"{host}:{port}", 1)


@pytest.mark.parametrize(
    "misbehave",
    [
        lambda stranger: stranger.greet(metadata=bytes(2**16 + 1)),
        lambda stranger: stranger.say(Kind.HELLO, b"GET / HTTP/1.1"),
        lambda stranger: stranger.say(Kind.FRAME, bytes(100)),
        lambda stranger: stranger.say(99, b""),
        lambda stranger: stranger.writer.write(HEAD.pack(Kind.HELLO, 2**32 - 1)),
        lambda stranger: (stranger.greet(), stranger.say(Kind.FRAME, b"short")),
        lambda stranger: (stranger.greet(), stranger.offer(b"", 1, offset=MIB)),
        lambda stranger: (stranger.greet(), stranger.offer(b"", 2**64 - 1, offset=2**64 - 1)),
        lambda stranger: (stranger.greet(), stranger.offer(bytes(4096), 1)),
        lambda stranger: (stranger.greet(num_bytes=2**63), stranger.offer(b"", 2**40)),
    ],
)
async def test_what_no_sender_would_say_ends_the_connection(stranger: Stranger, misbehave):
    misbehave(stranger)
    assert await stranger.is_hung_up_on()


async def test_a_stranger_who_says_nothing_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, receiver: NixlReceiver, stranger: Stranger
):
    monkeypatch.setattr("common.transport.records.SILENCE_SECONDS", 0.2)
    stranger.greet()
    assert await stranger.is_hung_up_on()
    await eventually(lambda: not receiver._serving)


async def test_connections_are_bounded(receiver: NixlReceiver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.transport.nixl._MAX_CONNECTIONS", 2)
    sink = MemorySink()
    endpoint = await receiver.start(sink)
    senders = [NixlSender(endpoint.address, TransportLimits()) for _ in range(3)]
    frames = [make_frame(number=number) for number in range(3)]
    for number in range(2):
        await senders[number].send(*frames[number][1:], SECONDS)
    with pytest.raises(TransportFailed):
        await senders[2].send(*frames[2][1:], SECONDS)
    await senders[0].close()
    await eventually(lambda: len(receiver._serving) < 2)
    await send_one(endpoint.address, 3)
    for sender in senders:
        await sender.close()
    assert len(sink.ready) == 3


# --- the library


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in ("nixl_cu13", "nixl_cu12"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"dvd-serve\[nixl\]"):
        nixl_agent.load_library.__wrapped__()
    monkeypatch.setattr(nixl_agent, "_MODULES", ("nixl_cu99",))
    for make in (receiver_at, NixlSender):
        with pytest.raises(ConfigError, match=r"dvd-serve\[nixl\]"):
            make("127.0.0.1:0", TransportLimits())


async def test_a_machine_where_nixl_cannot_work_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "none-of-this-name")
    monkeypatch.setenv("UCX_TLS", "tcp")
    receiver = receiver_at("127.0.0.1:0", TransportLimits())
    with pytest.raises(ConfigError, match="NIXL cannot start"):
        await receiver.start(MemorySink())
    await receiver.close()


def test_auto_leaves_it_to_the_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(nixl_agent, "_RDMA_DEVICES", tmp_path / "infiniband")
    assert why_not_auto() == "this machine has no RDMA device"
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert why_not_auto().startswith("mlx5_0 found: name nixl")
    assert nixl_agent.ucx_settings("192.0.2.1") == ""


def test_it_leaves_crash_reports_and_standard_output_to_us():
    program = (
        "import faulthandler, os, signal; faulthandler.enable()\n"
        "from common.transport.nixl_agent import ExposedMemory\n"
        "memory = ExposedMemory(4096, '')\n"
        "os.kill(os.getpid(), signal.SIGSEGV)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith("Fatal Python error: Segmentation fault")
    assert done.stdout == ""


async def test_a_failure_of_the_library_is_logged_and_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), pytest.raises(TransportFailed):
        nixl_agent.RemoteMemory(b"not metadata", "")
    assert "nixl" in caplog.text


def test_ports_are_opened_only_where_the_connection_is():
    assert nixl_agent.ucx_settings("127.0.0.1") == nixl_agent.ucx_settings("::1") == "NET_DEVICES=lo"
    assert nixl_agent.ucx_settings("") == "NET_DEVICES=lo"
    before = listening()
    memory = nixl_agent.ExposedMemory(4096, "127.0.0.1")
    opened = listening() - before
    memory.close()
    assert {address for address, _ in opened} == {"0100007F"}
    assert listening() == before


def listening() -> set[tuple[str, str]]:
    """Address and port, as the kernel writes them, of the TCP sockets that this process listens on."""
    inodes = {str(os.fstat(int(name)).st_ino) for name in os.listdir("/proc/self/fd") if is_socket(int(name))}
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, port))
    return found


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # the directory's own, closed again
        return False
