"""Each conformance test runs over every transport that this machine has, on TCP and on a unix socket if it has both."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Final

import pytest

from common.transport.base import FeatureReceiver
from common.transport.registry import TRANSPORTS, TransportName, make_receiver, make_sender, why_unavailable
from common.transport.sender import BoundedSender, TransportLimits
from protos.status_pb2 import Endpoint
from tests.common.transport.fakes import MemorySink, Relay, relayed
from tests.common.transport.shm_relay import ShmRelay

FAMILIES: Final = {"shm": ("unix",), "nixl": ("tcp",)}
"""What a receiver listens on, of transports that do not take both kinds of address."""
AVAILABLE: Final = [transport for transport in TRANSPORTS if not why_unavailable(transport)]
WIRES: Final = [f"{name}-{family}" for name in AVAILABLE for family in FAMILIES.get(name, ("tcp", "unix"))]
STREAMS: Final = [wire for wire in WIRES if not wire.startswith("nixl")]
"""Those whose payload passes through a ``Relay``, which can damage it there."""


@dataclass
class Wire:
    """Makes receivers and senders of one kind; closes what a test leaves open."""

    transport: TransportName
    listen: str
    directory: str
    cleanup: contextlib.AsyncExitStack
    receivers: list[FeatureReceiver] = field(default_factory=list)

    async def receiver(self, sink: MemorySink, limits: TransportLimits | None = None) -> Endpoint:
        receiver = make_receiver(self.transport, self.listen, limits=limits)
        self.receivers.append(receiver)
        self.cleanup.push_async_callback(receiver.close)
        return await receiver.start(sink)

    def sender(self, endpoint: Endpoint, limits: TransportLimits | None = None) -> BoundedSender:
        sender = make_sender(endpoint.transport, endpoint.address, limits or TransportLimits())
        self.cleanup.push_async_callback(sender.close)
        return sender

    async def process(self, role: str, where: str) -> asyncio.subprocess.Process:
        """See ``peer_process``; killed at the end, if not before."""
        command = (sys.executable, "-m", "tests.common.transport.peer_process", role, self.transport, where)
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        self.cleanup.push_async_callback(end, process)
        return process

    async def relay(self, endpoint: Endpoint) -> tuple[Relay | ShmRelay, Endpoint]:
        return await self.cleanup.enter_async_context(relayed(endpoint, self.directory))


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a process, stopped or not, and wait until it is gone."""
    if process.returncode is None:
        process.kill()
    await process.wait()


@pytest.fixture
def private_directory() -> Iterator[str]:
    """Short, as a socket's path is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dvd-") as directory:
        yield directory


@pytest.fixture
async def clean_loop() -> AsyncIterator[None]:
    """Fails a test that leaves a task behind; whatever is closed only by the collector becomes a warning, an error."""
    before = asyncio.all_tasks()
    yield
    async with asyncio.timeout(5):
        while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
            await asyncio.wait(left)
    gc.collect()


@pytest.fixture(params=WIRES)
async def wire(request: pytest.FixtureRequest, private_directory: str, clean_loop: None) -> AsyncIterator[Wire]:
    transport, _, family = request.param.partition("-")
    listen = "127.0.0.1:0" if family == "tcp" else f"unix-dir:{private_directory}"
    async with contextlib.AsyncExitStack() as cleanup:
        yield Wire(transport, listen, private_directory, cleanup)
