"""Each conformance test runs over every transport, on TCP and on a unix socket."""

import asyncio
import contextlib
import gc
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from common.transport.base import FeatureReceiver
from common.transport.grpc import GrpcSender
from common.transport.registry import make_receiver
from common.transport.sender import BoundedSender, TransportLimits
from common.transport.zmq import ZmqSender
from protos.status_pb2 import Endpoint
from tests.common.transport.fakes import MemorySink, Relay, relayed


@dataclass
class Wire:
    """Makes receivers and senders of one kind; closes what a test leaves open."""

    transport: str
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
        kind = ZmqSender if endpoint.transport == "zmq" else GrpcSender
        sender = kind(endpoint.address, limits or TransportLimits())
        self.cleanup.push_async_callback(sender.close)
        return sender

    async def relay(self, endpoint: Endpoint) -> tuple[Relay, Endpoint]:
        return await self.cleanup.enter_async_context(relayed(endpoint, self.directory))


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


@pytest.fixture(params=["zmq-tcp", "zmq-unix", "grpc-tcp", "grpc-unix"])
async def wire(request: pytest.FixtureRequest, private_directory: str, clean_loop: None) -> AsyncIterator[Wire]:
    transport, _, family = request.param.partition("-")
    listen = "127.0.0.1:0" if family == "tcp" else f"unix-dir:{private_directory}"
    async with contextlib.AsyncExitStack() as cleanup:
        yield Wire(transport, listen, private_directory, cleanup)
