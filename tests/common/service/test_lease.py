"""A caller that is stopped says nothing and closes nothing; its calls end all the same, and nobody else's do."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.service import rpc
from common.service.leases import LEASE_SECONDS

SLACK_SECONDS = 10.0
"""Of a loaded machine, beyond the lease."""


class Calls(health_pb2_grpc.HealthServicer):
    """Counts calls that are open; a call says one word and then lasts, quiet or with a word now and then."""

    def __init__(self, pause: float) -> None:
        self.num_open = 0
        self._pause = pause

    async def Watch(self, request, context) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        self.num_open += 1
        try:
            while True:
                yield health_pb2.HealthCheckResponse()
                await asyncio.sleep(self._pause)
        finally:
            self.num_open -= 1


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with a call open."""
    arguments = ("-m", "tests.common.service.waiting_caller", address)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"connected\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until_open(calls: Calls, num_left: int) -> None:
    async with asyncio.timeout(LEASE_SECONDS + SLACK_SECONDS):
        while calls.num_open > num_left:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("pause", [0.2, 1000.0])
async def test_the_calls_of_a_stopped_process_end(pause):
    calls = Calls(pause)
    async with AsyncExitStack() as stack:
        server = rpc.make_server()
        health_pb2_grpc.add_HealthServicer_to_server(calls, server)
        address = rpc.bind(server, "127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        stopped, other = [await stack.enter_async_context(calling(address)) for _ in range(2)]
        assert calls.num_open == 2
        stopped.send_signal(signal.SIGSTOP)
        await until_open(calls, 1)
        await asyncio.sleep(1)
        assert calls.num_open == 1  # whoever lives has lost nothing
        other.kill()
        await until_open(calls, 0)
