"""A call that is cancelled, or whose time is up, leaves nothing behind wherever it was: decode, queue or delivery."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import grpc
import pytest

from protos.status_pb2 import Endpoint
from protos.vision_pb2 import EncodeRequest
from tests.vision_server.neighbours import Neighbourhood, encoded, picture

# A peer that cannot be reached in the time that is left is unavailable, should that be noticed first.
ENDS = {
    "cancelled": {grpc.StatusCode.CANCELLED},
    "deadline": {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE},
}


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A decode worker that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def end(near: Neighbourhood, request: EncodeRequest, how: str, while_at) -> None:
    """Call, and end the call from the caller's side once ``while_at`` holds."""
    seconds = 5 if how == "deadline" else 60
    call = near.stub.Encode(request, timeout=seconds)
    waiting = asyncio.ensure_future(call)
    await until(while_at)
    if how == "cancelled":
        call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await call.code() in ENDS[how]


def is_empty(near: Neighbourhood) -> bool:
    compute = near.server.compute
    return compute.queued_tiles == compute.num_running == near.server._servicer._num_running == 0


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_while_another_image_is_decoded(neighbourhood, how):
    """It waits for the only worker, and loses its place."""
    near: Neighbourhood = await neighbourhood()
    decoder = near.server._decoder
    with stopped(decoder.pids[0]):
        first = asyncio.create_task(near.encode(near.request(encoded(picture())), 60))
        await until(lambda: near.server.compute.num_waiting == 1)
        await end(near, near.request(encoded(picture(900, 900))), how, lambda: near.server.compute.num_waiting == 2)
        await until(lambda: near.server.compute.num_waiting == 1)
    assert (await first).num_tiles == 1
    await until(lambda: is_empty(near))
    assert decoder.num_crashes == 0


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_while_it_is_decoded(neighbourhood, how):
    """The worker that is busy with it is replaced."""
    near: Neighbourhood = await neighbourhood()
    (worker,) = near.server._decoder.pids
    os.kill(worker, signal.SIGSTOP)
    # Not only admitted: a worker that never got the job is not replaced for it.
    await end(near, near.request(encoded(picture())), how, lambda: not near.server._decoder._free._workers)
    await until(lambda: is_empty(near) and worker not in near.server._decoder.pids)
    assert (await near.encode(near.request(encoded(picture(900, 900))), 60)).num_tiles == 5


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_while_frames_are_on_their_way(neighbourhood, how):
    """To somebody who takes the connection and nothing else."""
    near: Neighbourhood = await neighbourhood("grpc")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        nobody = Endpoint(transport="grpc", address=f"127.0.0.1:{silent.getsockname()[1]}")
        request = near.request(encoded(picture(900, 900)), deliver_to=[nobody])

        accepted = asyncio.Event()

        def has_connected() -> bool:
            with contextlib.suppress(BlockingIOError):
                connections.enter_context(silent.accept()[0])
                accepted.set()
            return accepted.is_set()

        with contextlib.ExitStack() as connections:
            await end(near, request, how, has_connected)
            await until(lambda: is_empty(near))
    assert (await near.encode(near.request(encoded(picture())), 60)).num_tiles == 1
