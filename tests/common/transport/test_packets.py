"""Messages and descriptors between two ends in this process: in order, bounded, and nothing left open."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from common.transport import packets
from common.transport.packets import PacketLink, ProtocolViolation

SECONDS = 20.0
pytestmark = pytest.mark.usefixtures("clean_loop")


@dataclass
class End:
    """One end, and what it heard."""

    link: PacketLink = field(init=False)
    heard: list[bytes] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    on_message: Callable[[bytes], None] = lambda message: None

    def hears(self, message: memoryview, descriptor: int) -> None:
        self.heard.append(bytes(message))
        if descriptor >= 0:
            self.descriptors.append(descriptor)
        self.on_message(bytes(message))


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    here, there = End(), End()
    for end, connected in zip((here, there), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), strict=True):
        end.link = PacketLink(
            connected, max_message_bytes=40_000, max_queued=100, on_message=end.hears, on_end=end.causes.append
        )
    yield here, there
    for end in (here, there):
        end.link.close()
        for descriptor in end.descriptors:
            os.close(descriptor)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def new_descriptor() -> int:
    return os.open("/dev/null", os.O_RDONLY)


async def test_order_holds_when_the_peer_reads_late(ends: tuple[End, End]):
    here, there = ends
    there.link.pause_reading()
    before = len(os.listdir("/proc/self/fd"))
    messages = [number.to_bytes(4, "little") + bytes(30_000) for number in range(150)]
    for message in messages:
        here.link.send(message[:4], memoryview(message)[4:], descriptor=new_descriptor())
    assert here.link._queue  # more than the socket takes
    there.link.resume_reading()
    await eventually(lambda: len(there.heard) == 150)
    assert there.heard == messages
    assert len(there.descriptors) == 150
    assert len(os.listdir("/proc/self/fd")) == before + 150
    here.link.send(b"still here")
    await eventually(lambda: there.heard[-1] == b"still here")


async def test_a_peer_that_does_not_read_costs_a_bounded_queue(ends: tuple[End, End]):
    here, there = ends
    there.link.pause_reading()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        here.link.send(bytes(30_000), descriptor=new_descriptor())
    assert here.causes == ["the peer does not read"]
    there.link.close()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) == before - 2)


async def test_the_end_of_one_is_told_to_the_other_after_what_was_said(ends: tuple[End, End]):
    here, there = ends
    here.link.send(b"a word")
    here.link.close()
    here.link.send(b"too late", descriptor=new_descriptor())
    await eventually(lambda: bool(there.causes))
    assert (there.heard, here.causes) == ([b"a word"], [])
    assert there.link.is_closed


async def test_a_message_longer_than_allowed_ends_it(ends: tuple[End, End]):
    here, there = ends
    here.link.send(bytes(40_001))
    await eventually(lambda: bool(there.causes) and bool(here.causes))
    assert there.causes == ["a message that does not fit"]


async def test_what_breaks_the_rules_ends_it(ends: tuple[End, End]):
    here, there = ends

    def refuse(message: bytes) -> None:
        raise ProtocolViolation("not that word")

    there.on_message = refuse
    here.link.send(b"a word")
    here.link.send(b"another")
    await eventually(lambda: bool(there.causes) and bool(here.causes))
    assert (there.causes, there.heard) == (["not that word"], [b"a word"])


def test_names_are_taken_once():
    name = f"dvd-test-{os.urandom(8).hex()}"
    listener = packets.listen(name)
    with pytest.raises(OSError, match="in use"):
        packets.listen(name)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        packets.connect(name)
