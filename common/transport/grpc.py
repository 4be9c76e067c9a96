"""The feature plane over gRPC: ``FeaturePlane.Deliver``, one call per frame, on a server of its own.

Slower than ZeroMQ (protobuf copies the payload on both sides), but always there and made of one library.
"""

import asyncio
import re
from typing import Any, Final

import grpc
import grpc.aio

from common.service import rpc
from common.service.errors import DeadlineExceeded, TransportFailed, from_grpc
from common.transport.base import FrameSink, receive_frame
from common.transport.listen import PRIVATE_DIRECTORY, check_host_port, new_socket_path, remove_socket
from common.transport.meter import ReceiveMeter
from common.transport.sender import BoundedSender, TransportLimits
from protos.features_pb2 import FrameAck, FrameMessage
from protos.features_pb2_grpc import FeaturePlaneServicer, FeaturePlaneStub, add_FeaturePlaneServicer_to_server
from protos.frame import MAX_HEADER_BYTES
from protos.status_pb2 import Endpoint

NAME: Final = "grpc"
_FRAMING_BYTES: Final = MAX_HEADER_BYTES + 64
_CLOSE_SECONDS: Final = 5.0
# One host or socket; not the resolvers, proxies and lists that gRPC also understands.
_ADDRESS: Final = re.compile(r"(unix:/[^\s]+|(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5})", re.ASCII)
_SETTLED: Final = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
    grpc.ChannelConnectivity.SHUTDOWN,
)


class GrpcReceiver:
    """A ``FeatureReceiver`` on ``host:port`` (port 0: any free one) or ``unix:/path``."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        self._address = address
        self._limits = limits
        self._server: grpc.aio.Server | None = None

    async def start(self, sink: FrameSink) -> Endpoint:
        """Listen.

        Raises:
            ConfigError: the address is taken or not one of this machine.
        """
        server = rpc.make_server(max_message_bytes=self._limits.max_frame_bytes + _FRAMING_BYTES)
        add_FeaturePlaneServicer_to_server(_FeaturePlane(sink), server)  # type: ignore[no-untyped-call]
        # Whoever comes without a ticket is not heard, here as on the other transports, which know no keys.
        address = rpc.bind(server, self._address, self._limits.keys, guard="tickets")
        await server.start()
        self._server = server
        return Endpoint(transport=NAME, address=address)

    async def close(self) -> None:
        """Stop listening; frames in flight are dropped and their senders notice."""
        if self._server is not None:
            await asyncio.wait_for(self._server.stop(grace=None), _CLOSE_SECONDS)
        remove_socket(self._address)


class _FeaturePlane(FeaturePlaneServicer):
    def __init__(self, sink: FrameSink) -> None:
        self._sink = sink
        self._meter = ReceiveMeter(NAME)

    async def Deliver(self, request: FrameMessage, context: grpc.aio.ServicerContext[Any, Any]) -> FrameAck:
        verdict = receive_frame(self._sink, request.header, request.payload)
        self._meter.received(verdict, len(request.payload))
        return FrameAck(verdict=verdict)


class GrpcSender(BoundedSender):
    """A ``FeatureSender`` for one peer."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        super().__init__(NAME, limits)
        if not _ADDRESS.fullmatch(address):
            self._credit.close("not an address of this transport")
        max_message_bytes = limits.max_frame_bytes + _FRAMING_BYTES
        self._channel = rpc.make_channel(address, limits.keys, "language", max_message_bytes=max_message_bytes)
        self._deliver_frame = FeaturePlaneStub(self._channel).Deliver  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""
        self._credit.close("this end was closed")
        await asyncio.wait_for(self._channel.close(grace=None), _CLOSE_SECONDS)

    async def _connect(self) -> None:
        """A refused connection fails its calls at once; only one that is never answered must be waited for here."""
        state = self._channel.get_state(try_to_connect=True)
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                while state not in _SETTLED:
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise TransportFailed("the peer cannot be reached") from None

    async def _exchange(self, packed_header: bytes, payload: memoryview, deadline: float) -> str:
        remaining = deadline - asyncio.get_running_loop().time()
        try:
            message = FrameMessage(header=packed_header, payload=bytes(payload))
            ack: FrameAck = await self._deliver_frame(message, timeout=remaining)
            return ack.verdict
        except grpc.aio.AioRpcError as status:
            error = from_grpc(status)
            raise error if isinstance(error, DeadlineExceeded) else TransportFailed(error.message) from None
        except asyncio.CancelledError:
            # Closing a channel cancels its calls, which looks to the caller as if it had been cancelled itself.
            task = asyncio.current_task()
            if self._credit.failure is None or (task is not None and task.cancelling()):
                raise
            raise TransportFailed(self._credit.failure) from None
        finally:
            self._credit.release(len(payload))


def receiver_at(listen: str, limits: TransportLimits) -> GrpcReceiver:
    """See ``common.transport.registry``. Raises ConfigError."""
    if listen.startswith(PRIVATE_DIRECTORY):
        return GrpcReceiver(f"unix:{new_socket_path(listen, NAME)}", limits)
    return GrpcReceiver(check_host_port(listen), limits)


sender_to = GrpcSender
