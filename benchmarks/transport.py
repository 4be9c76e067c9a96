"""How fast features travel: every transport beside a blocking socket and a memory copy, between two processes.

    python -m benchmarks transport --rounds 9

A message of 34 MB is an image of 13 tiles of the 38B model, one of 2.6 MB is one tile of it. The raw socket is a
blocking ``sendall`` to a blocking ``recv_into``, always into the same memory, without a word said about it; a transport
carries signed headers, checks a CRC32C, puts each payload in memory of its own and has it acknowledged. ``zmq, bare``
are the sockets of ``zmq`` with nothing of that. What is ``sealed`` is encrypted before it is sent, message by message,
and decrypted by its receiver instead of the CRC32C. All of them take turns in every round; a ratio is the median of
those of the rounds, so that what else the machine does falls on both sides of it.

The sending process has one half of the cores, the receiving ones have the other, as if they were two servers: where
the kernel wakes a receiver on the core of its sender, both share it for tens of milliseconds, more than a batch takes.
"""

import argparse
import asyncio
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Protocol

import zmq
import zmq.asyncio
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.transport_peer import BARE_ZMQ, BATCH, RAW, TICKET
from common.service.errors import ConfigError
from common.service.heap import freeze_heap, keep_freed_memory
from common.transport.listen import PRIVATE_DIRECTORY
from common.transport.registry import TRANSPORTS, make_sender, why_unavailable
from common.transport.sender import BoundedSender, TransportLimits
from protos.frame import ID_BYTES, FrameHeader
from protos.seal import pack_frame

MEMCPY: Final = "memcpy"
_TIMEOUT: Final = 120.0
"""Seconds in which a message must have arrived."""
_TOKENS_PER_TILE: Final = 256
_MAX_BATCH: Final = 1_000
_BEYOND_CACHE_BYTES: Final = 128 * 2**20
_ON_ONE_HOST: Final = ("shm",)
_ALSO_SEALED: Final = ("tcp", "zmq")
_CORES: Final = sorted(os.sched_getaffinity(0))
SENDING: Final = frozenset(_CORES[: len(_CORES) // 2] or _CORES)
"""Where the process that measures must run."""
_RECEIVING: Final = frozenset(_CORES[len(_CORES) // 2 :])


@dataclass(frozen=True, slots=True)
class Message:
    """A frame of ``num_tiles`` x 256 tokens x ``hidden_size`` in bfloat16; ``count`` of them make a batch."""

    name: str
    num_tiles: int
    hidden_size: int
    count: int
    header: FrameHeader = field(repr=False)
    payload: bytearray = field(repr=False)
    packed_header: bytes = field(repr=False)


def make_message(num_tiles: int, hidden_size: int, batch_bytes: int) -> Message:
    """A batch is at least one message, and about ``batch_bytes`` unless the messages are tiny."""
    header = FrameHeader(
        fingerprint=bytes(ID_BYTES),
        request_id=bytes(ID_BYTES),
        image_index=0,
        attempt=0,
        first_tile=0,
        num_image_tiles=num_tiles,
        hidden_size=hidden_size,
        dtype="bfloat16",
        tokens_per_tile=(_TOKENS_PER_TILE,) * num_tiles,
        payload_crc32c=0,
    )
    payload = bytearray(os.urandom(header.payload_bytes // 2) * 2)
    payload[1::2] = bytes(len(payload) // 2)  # small numbers, so that none is NaN or infinite
    packed_header, _ = pack_frame(header, memoryview(payload), TICKET, is_sealed=False)
    name = f"{len(payload) / 1e6:.3g} MB"
    count = min(_MAX_BATCH, max(1, batch_bytes // len(payload)))
    return Message(name, num_tiles, hidden_size, count, header, payload, packed_header)


class Subject(Protocol):
    """Something that moves messages."""

    async def move(self, message: Message) -> None:
        """A whole batch; returns when all of it is there."""
        ...


@dataclass(frozen=True, slots=True)
class Transport:
    """One of ours, with ``in_flight`` messages on their way at a time, as far as its credit allows."""

    sender: BoundedSender
    in_flight: int
    is_sealed: bool

    async def move(self, message: Message) -> None:
        turns = iter(range(message.count))
        await asyncio.gather(*(self._send(message, turns) for _ in range(self.in_flight)))

    async def _send(self, message: Message, turns: Iterator[int]) -> None:
        packed, payload = message.packed_header, memoryview(message.payload)
        for _ in turns:
            if self.is_sealed:
                packed, payload = pack_frame(message.header, memoryview(message.payload), TICKET, is_sealed=True)
            await self.sender.send(packed, payload, _TIMEOUT)


@dataclass(frozen=True, slots=True)
class RawSocket:
    connected: socket.socket

    async def move(self, message: Message) -> None:
        await asyncio.to_thread(self._move, message)

    def _move(self, message: Message) -> None:
        self.connected.sendall(BATCH.pack(len(message.payload), message.count))
        for _ in range(message.count):
            self.connected.sendall(message.payload)
        if not self.connected.recv(1):
            raise ConnectionError("the receiving process has left")


@dataclass(frozen=True, slots=True)
class BareZmq:
    dealer: zmq.asyncio.Socket

    async def move(self, message: Message) -> None:
        await self.dealer.send(BATCH.pack(len(message.payload), message.count))
        for _ in range(message.count):
            await self.dealer.send(message.payload, copy=False)
        await self.dealer.recv()


class MemoryCopy:
    """Into one place after the other, as messages go: to the same one again, a small copy would not leave the cache."""

    def __init__(self) -> None:
        self._targets: dict[int, list[memoryview]] = {}

    async def move(self, message: Message) -> None:
        num_bytes = len(message.payload)
        if num_bytes not in self._targets:
            num_targets = max(2, _BEYOND_CACHE_BYTES // num_bytes)
            self._targets[num_bytes] = [memoryview(bytearray(message.payload)) for _ in range(num_targets)]
        targets = itertools.cycle(self._targets[num_bytes])
        for target, _ in zip(targets, range(message.count), strict=False):
            target[:] = message.payload


@dataclass(slots=True)
class Case:
    """One subject and one message. Ratios are absent where there is nothing to compare with."""

    message: str
    subject: str
    gb_per_s: float
    of_raw_socket: float | None
    of_memcpy: float | None
    of_bare_zmq: float | None
    microseconds: float
    rounds: list[float]


async def measure(
    transports: Sequence[str], messages: Sequence[Message], num_rounds: int, in_flight: int, show: Callable[[str], None]
) -> list[Case]:
    """All subjects in turn, message by message, ``num_rounds`` times after one to warm up."""
    rates: dict[tuple[str, str], list[float]] = {}
    async with AsyncExitStack() as open_subjects:
        subjects: dict[str, Subject] = {
            MEMCPY: MemoryCopy(),
            RAW: await open_subjects.enter_async_context(_raw_socket()),
        }
        for name in transports:
            if name == "zmq":
                subjects[BARE_ZMQ] = await open_subjects.enter_async_context(_bare_zmq())
            subjects[name] = await open_subjects.enter_async_context(_transport(name, in_flight))
            if name in _ALSO_SEALED:
                sealed = _transport(name, in_flight, is_sealed=True)
                subjects[f"{name}, sealed"] = await open_subjects.enter_async_context(sealed)
        for number in range(num_rounds + 1):
            show(f"round {number} of {num_rounds}")
            for message in messages:
                for name, subject in subjects.items():
                    started = time.perf_counter()
                    await subject.move(message)
                    seconds = time.perf_counter() - started
                    if number:
                        rate = message.count * len(message.payload) / seconds / 1e9
                        rates.setdefault((message.name, name), []).append(rate)
    sizes = {message.name: len(message.payload) for message in messages}
    return [_case(message, subject, rates, sizes[message]) for message, subject in rates]


def _case(message: str, subject: str, rates: dict[tuple[str, str], list[float]], num_bytes: int) -> Case:
    found = rates[message, subject]

    def ratio(other: str) -> float | None:
        others = rates.get((message, other))
        if others is None or other == subject:
            return None
        return statistics.median(rate / under for rate, under in zip(found, others, strict=True))

    rate = statistics.median(found)
    bare = ratio(BARE_ZMQ) if subject == "zmq" else None
    return Case(message, subject, rate, ratio(RAW), ratio(MEMCPY), bare, num_bytes / rate / 1e3, found)


@asynccontextmanager
async def _transport(name: str, in_flight: int, is_sealed: bool = False) -> AsyncIterator[Transport]:
    with tempfile.TemporaryDirectory(prefix="dvd-") as directory:
        listen = f"{PRIVATE_DIRECTORY}{directory}" if name in _ON_ONE_HOST else "127.0.0.1:0"
        with _process("benchmarks.transport_sink", name, listen) as address:
            sender = make_sender(name, address, TransportLimits())
            try:
                yield Transport(sender, in_flight, is_sealed)
            finally:
                await sender.close()


@asynccontextmanager
async def _raw_socket() -> AsyncIterator[RawSocket]:
    with (
        _process("benchmarks.transport_peer", RAW) as port,
        socket.create_connection(("127.0.0.1", int(port))) as connected,
    ):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield RawSocket(connected)


@asynccontextmanager
async def _bare_zmq() -> AsyncIterator[BareZmq]:
    with (
        _process("benchmarks.transport_peer", BARE_ZMQ) as port,
        zmq.asyncio.Context() as context,
        context.socket(zmq.DEALER) as dealer,
    ):
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        yield BareZmq(dealer)


@contextmanager
def _process(module: str, *arguments: str) -> Iterator[str]:
    """A receiving process on cores of its own, and where it listens."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, _RECEIVING)
    try:
        assert process.stdout is not None  # asked for
        address = process.stdout.readline().strip()
        if not address:
            raise ConfigError(f"{module} {' '.join(arguments)} did not start")
        yield address
    finally:
        try:
            process.communicate(timeout=10)  # closes its input
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def print_cases(cases: Sequence[Case]) -> None:
    table = Table("message", "subject", "GB/s", "µs each", "of raw socket", "of memcpy", "of bare zmq")
    for case in cases:
        ratios = (case.of_raw_socket, case.of_memcpy, case.of_bare_zmq)
        shown = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        table.add_row(case.message, case.subject, f"{case.gb_per_s:.2f}", f"{case.microseconds:.0f}", *shown)
    Console(width=120).print(table)


def _shape(text: str) -> tuple[int, int]:
    tiles, hidden = text.split("x")
    return int(tiles), int(hidden)


def main(argv: Sequence[str]) -> None:
    available = [name for name in TRANSPORTS if not why_unavailable(name)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks transport",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--transports", nargs="+", choices=available, default=available, metavar="NAME", help="default: all there are"
    )
    parser.add_argument(
        "--messages",
        nargs="+",
        type=_shape,
        default=[(13, 5120), (1, 5120), (1, 128)],
        metavar="TILESxHIDDEN",
        help="tiles and hidden size of each; default: 13x5120 1x5120 1x128",
    )
    parser.add_argument("--batch-mb", type=float, default=340.0, help="sent between two looks at the clock, about")
    parser.add_argument("--in-flight", type=int, default=8, help="messages of a transport on their way, at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    messages = [make_message(tiles, hidden, int(1e6 * arguments.batch_mb)) for tiles, hidden in arguments.messages]
    console = Console()
    keep_freed_memory()  # as servers do, as is the next
    freeze_heap()
    os.sched_setaffinity(0, SENDING)
    cases = asyncio.run(measure(arguments.transports, messages, arguments.rounds, arguments.in_flight, console.print))
    print_cases(cases)
    if arguments.results:
        print(write_record(arguments.results, "transport", argv, [asdict(case) for case in cases]))
