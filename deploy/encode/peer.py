"""A vision server as the one who asks it for features sees it."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, cast

import grpc
import grpc.aio

from common.service.errors import (
    ConfigError,
    DeadlineExceeded,
    DvdError,
    InternalError,
    Overloaded,
    Unavailable,
    from_grpc,
)
from common.service.keys import Keys
from common.service.rpc import make_channel
from deploy.encode.order import Order
from protos.status_pb2 import WatchStatusRequest, WorkerStatus
from protos.vision_pb2 import ExtractReply
from protos.vision_pb2_grpc import VisionStub

_CONNECT_SECONDS: Final = 10.0
_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Features:
    """Of one image: row-major little-endian ``[sum(tokens_per_tile), hidden_size]``, in one piece a tile."""

    tokens_per_tile: tuple[int, ...]
    hidden_size: int
    parts: list[bytes]

    @property
    def num_tiles(self) -> int:
        return len(self.tokens_per_tile)

    def shape(self, order: Order) -> list[int]:
        """``[tokens, hidden]``, or ``[tiles, tokens of a tile, hidden]`` where nothing is projected."""
        tokens = sum(self.tokens_per_tile)
        if order.is_projected:
            return [tokens, self.hidden_size]
        return [self.num_tiles, tokens // self.num_tiles, self.hidden_size]


@asynccontextmanager
async def connect(address: str, timeout: float | None, keys: Keys | None = None) -> AsyncIterator["VisionPeer"]:
    """A server at ``host:port`` or ``unix:/path``; ``timeout`` as ``VisionPeer`` takes it.

    Raises:
        ConfigError: no such address can be.
    """
    host, _, port = address.rpartition(":")
    if not address.startswith("unix:") and not (host and port.isdecimal()):
        raise ConfigError(f"--server {address[:64]}: expected host:port or unix:/path")
    async with make_channel(address, keys, "vision") as channel:
        yield VisionPeer(VisionStub(channel), address, timeout)  # type: ignore[no-untyped-call]


class VisionPeer:
    """Asks for features.

    Args:
        timeout: seconds for one image, in which a server that is full is asked again; None: as long as it takes, and
            once.
    """

    def __init__(self, stub: VisionStub, address: str, timeout: float | None) -> None:
        self._stub = stub
        self._address = address
        self._timeout = timeout

    async def status(self) -> WorkerStatus:
        """What it says of itself, also while it loads. Raises Unavailable if nobody answers, or no vision server."""
        call = self._stub.WatchStatus(WatchStatusRequest(router_id="dvd encode"), timeout=_CONNECT_SECONDS)
        try:
            async for status in call:
                return cast(WorkerStatus, status)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise Unavailable(f"what answers at {self._address} is no vision server") from None
        finally:
            call.cancel()
        raise Unavailable(f"no vision server answers at {self._address}")

    async def extract(self, image: bytes, order: Order) -> Features:
        """The features of one image.

        Raises:
            InvalidRequest: the server does not take the image, or what is asked of it.
            Unavailable: it is gone, not ready, or knows nothing of this call.
            DeadlineExceeded: the time is used up.
        """
        started = asyncio.get_running_loop().time()
        while True:
            used = asyncio.get_running_loop().time() - started
            try:
                return await self._extract_once(image, order, None if self._timeout is None else self._timeout - used)
            except Overloaded:
                pause = random.uniform(0.5, 1.5) * _PAUSE_SECONDS
                if self._timeout is None or used + pause >= self._timeout:
                    raise
                await asyncio.sleep(pause)

    async def _extract_once(self, image: bytes, order: Order, timeout: float | None) -> Features:
        call = self._stub.Extract(order.request(image), timeout=timeout)
        tokens: list[int] = []
        parts: list[bytes] = []
        num_tiles = hidden_size = 0
        try:
            async for reply in call:
                num_tiles, hidden_size = num_tiles or reply.num_image_tiles, hidden_size or reply.hidden_size
                _check(reply, len(tokens), num_tiles, hidden_size, order.item_size)
                tokens += reply.tokens_per_tile
                parts.append(reply.features)
        except grpc.aio.AioRpcError as error:
            raise _explained(error, self._timeout) from None
        finally:
            call.cancel()
        if not tokens or len(tokens) != num_tiles:
            raise InternalError(f"the server sent {len(tokens)} of {num_tiles} tiles")
        return Features(tuple(tokens), hidden_size, parts)


def _check(reply: ExtractReply, num_seen: int, num_tiles: int, hidden_size: int, item_size: int) -> None:
    """Whatever wrote it, only what is whole is written to a file."""
    num_bytes = sum(reply.tokens_per_tile) * hidden_size * item_size
    is_next = reply.first_tile == num_seen and reply.num_image_tiles == num_tiles and reply.hidden_size == hidden_size
    if not is_next or not num_bytes or len(reply.features) != num_bytes:
        raise InternalError("the server sent features that do not fit together")


def _explained(error: grpc.aio.AioRpcError, timeout: float | None) -> DvdError:
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable("the server knows nothing of Extract: it is of another version")
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
        return DeadlineExceeded(f"it was not encoded within {timeout:g} s")
    return from_grpc(error)
