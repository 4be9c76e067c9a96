"""gRPC's standard health service, for probes that know no routers: serving means that the status board says ready."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.service.status import StatusBoard
from protos.status_pb2 import WORKER_STATE_READY


class BoardHealth(health_pb2_grpc.HealthServicer):
    """One answer for whatever service is asked after: a worker is ready as a whole."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """The state now."""
        return self._reply()

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """The state now and every change of it."""
        last = None
        async with aclosing(self._board.watch()) as statuses:
            async for _ in statuses:
                reply = self._reply()
                if reply.status != last:
                    last = reply.status
                    yield reply

    def _reply(self) -> Any:
        is_ready = self._board.state == WORKER_STATE_READY
        serving = health_pb2.HealthCheckResponse
        return serving(status=serving.SERVING if is_ready else serving.NOT_SERVING)


def add_health(server: grpc.aio.Server, board: StatusBoard) -> None:
    """Let ``server`` answer health checks with the state on ``board``."""
    health_pb2_grpc.add_HealthServicer_to_server(BoardHealth(board), server)
