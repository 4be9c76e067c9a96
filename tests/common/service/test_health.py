"""A probe that knows only gRPC's health protocol sees a worker that loads or drains as not serving."""

import asyncio

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.service.health import add_health
from common.service.rpc import bind, make_channel, make_server
from common.service.status import StatusBoard
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, ModelInfo, VisionLoad

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def worker():
    board = StatusBoard("v0", bytes(16), ModelInfo(), VisionLoad)
    server = make_server()
    add_health(server, board)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with make_channel(address) as channel:
        yield board, health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


async def test_check_follows_the_board(worker):
    board, stub = worker
    request = health_pb2.HealthCheckRequest()
    assert (await stub.Check(request, timeout=10)).status == NOT_SERVING
    board.state = WORKER_STATE_READY
    assert (await stub.Check(request, timeout=10)).status == SERVING
    board.state = WORKER_STATE_DRAINING
    assert (await stub.Check(request, timeout=10)).status == NOT_SERVING


async def test_watch_tells_changes_only(worker):
    board, stub = worker
    stream = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
    seen = [(await stream.read()).status]
    for state in (WORKER_STATE_READY, WORKER_STATE_DRAINING):
        reading = asyncio.ensure_future(stream.read())
        board.state = state
        seen.append((await asyncio.wait_for(reading, 10)).status)
    stream.cancel()
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]
