"""The gRPC face of the vision server and the way of one image through it: decode, tile, encode, deliver, reply.

Everything here runs on the event loop; pixels are handled in the decode pool, the device in ``compute.py``. Features
leave group by group while later tiles are still being encoded, straight to the language server named in the request.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import grpc.aio
import torch
from typing_extensions import Buffer

from common.model.config import InternVLConfig
from common.model.geometry import Tiling, count_tiles
from common.service import metrics
from common.service.errors import (
    Cancelled,
    DeadlineExceeded,
    DvdError,
    InternalError,
    InvalidRequest,
    TransportFailed,
    Unavailable,
)
from common.service.rpc import remaining_seconds
from common.service.status import StatusBoard
from protos import vision_pb2_grpc
from protos.frame import ITEM_SIZE, FeatureDtypeName, FrameHeader, FrameRejected, pack_header, with_checksum
from protos.status_pb2 import (
    FEATURE_DTYPE_BFLOAT16,
    FEATURE_DTYPE_FLOAT32,
    WORKER_STATE_READY,
    WORKER_STATE_STARTING,
    Endpoint,
    WatchStatusRequest,
    WorkerStatus,
)
from protos.vision_pb2 import EncodeReply, EncodeRequest, VisionTimings
from vision_server.batcher import ImageId
from vision_server.compute import ComputeThread, EncodedGroup
from vision_server.media import decode, open_image
from vision_server.settings import VisionSettings
from vision_server.tiling import Tiles, make_tiles

log = logging.getLogger(__name__)

_FRAME_BYTES: Final = 4 * 2**20
"""Aim for the payload of one frame: small enough to overlap with prefill, large enough that headers cost nothing."""
_ID_BYTES: Final = {"request_id": 16, "mm_hash": 32, "ticket": 32}
_MAX_ATTEMPT: Final = 2**16 - 1
_WIRE_DTYPE: Final[dict[int, FeatureDtypeName]] = {
    FEATURE_DTYPE_BFLOAT16: "bfloat16",
    FEATURE_DTYPE_FLOAT32: "float32",
}
_TORCH_DTYPE: Final[dict[FeatureDtypeName, torch.dtype]] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ENDED_AT_RECEIVER: Final = {"tombstone", "unknown_request", "stale"}

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_T = TypeVar("_T")


class FrameCourier(Protocol):
    """What the servicer needs of ``common.transport.select.SenderPool``."""

    async def send(self, endpoints: Sequence[Endpoint], packed_header: bytes, payload: Buffer, timeout: float) -> str:
        """Deliver one frame by the first way that works; returns the transport used."""
        ...


@dataclass(slots=True)
class _Passage:
    """Stations of one image, in ``time.monotonic`` seconds, for the reply's timings."""

    arrived: float = field(default_factory=time.monotonic)
    decoded: float = 0.0
    encode_started: float = 0.0
    encode_ended: float = 0.0
    send_started: float = 0.0
    acknowledged: float = 0.0

    def note_group(self, group: EncodedGroup) -> None:
        self.encode_started = self.encode_started or group.started
        self.encode_ended = group.ended
        self.send_started = self.send_started or time.monotonic()

    def timings(self) -> VisionTimings:
        return VisionTimings(
            decode_ms=1000 * (self.decoded - self.arrived),
            queue_ms=1000 * (self.encode_started - self.decoded),
            encode_ms=1000 * (self.encode_ended - self.encode_started),
            transfer_ms=1000 * (self.acknowledged - self.send_started),
        )


class VisionServicer(vision_pb2_grpc.VisionServicer):
    """Answers ``Encode`` and ``WatchStatus``.

    Args:
        fingerprint: of the checkpoint, carried by every frame.
        couriers: delivers frames; not owned.
    """

    def __init__(
        self,
        settings: VisionSettings,
        config: InternVLConfig,
        fingerprint: bytes,
        compute: ComputeThread,
        couriers: FrameCourier,
        board: StatusBoard,
    ) -> None:
        self._settings = settings
        self._config = config
        self._fingerprint = fingerprint
        self._compute = compute
        self._couriers = couriers
        self._board = board
        self._pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Encode(self, request: EncodeRequest, context: _Context) -> EncodeReply:
        self._check_state()
        tiling = self._check(request)
        remaining = remaining_seconds(context)
        with self._counted():
            try:
                async with asyncio.timeout(self._settings.encode_timeout if remaining is None else remaining):
                    return await self._serve(request, tiling)
            except TimeoutError:
                raise DeadlineExceeded("the image was not encoded in time") from None

    async def WatchStatus(self, request: WatchStatusRequest, context: _Context) -> AsyncIterator[WorkerStatus]:
        async for status in self._board.watch():
            yield status

    async def drained(self) -> None:
        """Returns once no ``Encode`` is running."""
        await self._idle.wait()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- before anything is spent

    def _check_state(self) -> None:
        if self._board.state == WORKER_STATE_READY:
            return
        is_starting = self._board.state == WORKER_STATE_STARTING
        raise Unavailable(
            "the vision server is starting" if is_starting else "the vision server is shutting down",
            code="not_ready" if is_starting else "draining",
        )

    def _check(self, request: EncodeRequest) -> Tiling:
        """Raises InvalidRequest with the field that is wrong."""
        for name, size in _ID_BYTES.items():
            if len(getattr(request, name)) != size:
                raise InvalidRequest(f"{name} must have {size} bytes", param=name)
        if not request.image:
            raise InvalidRequest("the image is empty", param="image", code="invalid_image")
        if not request.deliver_to:
            raise InvalidRequest("deliver_to is empty", param="deliver_to")
        if request.dtype not in _WIRE_DTYPE:
            raise InvalidRequest("dtype must be BFLOAT16 or FLOAT32", param="dtype")
        if request.attempt > _MAX_ATTEMPT:
            raise InvalidRequest(f"attempt must be at most {_MAX_ATTEMPT}", param="attempt")
        low, high = request.tiling.min_dynamic_patch, request.tiling.max_dynamic_patch
        limit = self._settings.max_tiles_per_image
        if not 1 <= low <= high <= limit:
            raise InvalidRequest(f"need 1 <= min <= max <= {limit} tiles, got {low} and {high}", param="tiling")
        model = self._config.tiling
        return Tiling(low, high, request.tiling.use_thumbnail, model.tile_size, model.dynamic)

    # --- the way of one image

    async def _serve(self, request: EncodeRequest, tiling: Tiling) -> EncodeReply:
        passage = _Passage()
        image = self._compute.admit()
        try:
            tiles = await self._decode(image, request.image, tiling)
            passage.decoded = time.monotonic()
            transport = await self._encode_and_deliver(image, request, tiles, passage)
        finally:
            self._compute.release(image)
        passage.acknowledged = time.monotonic()
        return self._reply(request, len(tiles), transport, passage)

    async def _decode(self, image: ImageId, data: bytes, tiling: Tiling) -> Tiles:
        """Header first: the image's cost is known, and may be refused, before a pixel is decoded."""
        try:
            opened = await self._in_pool(lambda: open_image(data, max_pixels=self._settings.max_pixels))
            self._compute.resize(image, count_tiles(opened.width, opened.height, tiling))
            return await self._in_pool(lambda: make_tiles(decode(opened), tiling))
        except InvalidRequest as error:
            metrics.VISION_DECODE_REJECTED.labels(error.code).inc()
            raise

    async def _encode_and_deliver(self, image: ImageId, request: EncodeRequest, tiles: Tiles, passage: _Passage) -> str:
        """Send each group the moment it is encoded; returns the transport of the last acknowledged frame."""
        dtype = _WIRE_DTYPE[request.dtype]
        sends: list[asyncio.Task[str]] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                async for group in self._compute.encode(image, tiles, _TORCH_DTYPE[dtype]):
                    passage.note_group(group)
                    for header, payload in self._frames(request, dtype, group, len(tiles)):
                        sends.append(tasks.create_task(self._send(request, header, payload)))
        except ExceptionGroup as failures:
            ours = failures.subgroup(DvdError) or failures  # what failed first tells why, not what failed with it
            raise ours.exceptions[0] from None
        return sends[-1].result()

    async def _send(self, request: EncodeRequest, header: FrameHeader, payload: memoryview) -> str:
        packed = pack_header(with_checksum(header, payload), request.ticket)
        try:
            return await self._couriers.send(request.deliver_to, packed, payload, self._settings.encode_timeout)
        except FrameRejected as rejection:
            raise _refused(rejection.reason) from None

    def _frames(
        self, request: EncodeRequest, dtype: FeatureDtypeName, group: EncodedGroup, num_image_tiles: int
    ) -> Iterator[tuple[FrameHeader, memoryview]]:
        """Cut a group into frames of some 4 MiB, at least one tile each. Payloads are views, nothing is copied."""
        num_tiles, tokens_per_tile, hidden_size = group.features.shape
        step = max(1, _FRAME_BYTES // (tokens_per_tile * hidden_size * ITEM_SIZE[dtype]))
        for start in range(0, num_tiles, step):
            part = group.features[start : start + step]
            header = FrameHeader(
                fingerprint=self._fingerprint,
                request_id=request.request_id,
                image_index=request.image_index,
                attempt=request.attempt,
                first_tile=group.first_tile + start,
                num_image_tiles=num_image_tiles,
                hidden_size=hidden_size,
                dtype=dtype,
                tokens_per_tile=(tokens_per_tile,) * len(part),
                payload_crc32c=0,
            )
            yield header, _bytes_of(part)

    def _reply(self, request: EncodeRequest, num_tiles: int, transport: str, passage: _Passage) -> EncodeReply:
        timings = passage.timings()
        metrics.VISION_ITEM_TILES.observe(num_tiles)
        metrics.VISION_DECODE_SECONDS.observe(timings.decode_ms / 1000)
        metrics.VISION_QUEUE_SECONDS.observe(timings.queue_ms / 1000)
        metrics.VISION_ITEM_DURATION_SECONDS.observe(passage.acknowledged - passage.arrived)
        num_tokens = num_tiles * self._config.tokens_per_tile
        item_size = ITEM_SIZE[_WIRE_DTYPE[request.dtype]]
        return EncodeReply(
            num_tiles=num_tiles,
            tokens_per_tile=[self._config.tokens_per_tile] * num_tiles,
            feature_bytes=num_tokens * self._config.text_hidden_size * item_size,
            transport=transport,
            timings=timings,
        )

    async def _in_pool(self, function: Callable[[], _T]) -> _T:
        """Pillow lets other threads run while it decodes and resizes. At most one entry per admitted image."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the image under its outcome, and keep ``drained`` informed."""
        self._num_running += 1
        self._idle.clear()
        outcome = "error"
        try:
            yield
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            metrics.CANCELLED.labels("encode").inc()
            raise
        except DvdError as error:
            outcome = error.code
            raise
        finally:
            metrics.VISION_ITEMS.labels(outcome).inc()
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()


def _bytes_of(features: torch.Tensor) -> memoryview:
    """The features as they lie in memory; numpy knows no bfloat16, so the view goes through bytes."""
    return features.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _refused(reason: str) -> DvdError:
    """What a refusal by the language server means to the caller of ``Encode``."""
    if reason in _ENDED_AT_RECEIVER:
        return Cancelled("the language server no longer waits for this image")
    if reason == "checksum":
        return TransportFailed("features were damaged on their way")
    return InternalError(f"the language server refused the features: {reason[:64]}")
