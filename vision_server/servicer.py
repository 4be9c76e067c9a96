"""The gRPC face of the vision server: ``Encode`` for language servers, ``Score`` for routers, ``Extract`` for anybody.

Features leave group by group while later tiles are still being encoded, straight to the language server named in the
request. Everything here runs on the event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
import torch

from common.model.config import InternVLConfig
from common.service import failpoints, metrics, tracing
from common.service.errors import DeadlineExceeded, DvdError, InvalidRequest, Unavailable
from common.service.rpc import remaining_seconds
from common.service.status import StatusBoard
from protos import vision_pb2_grpc
from protos.status_pb2 import WORKER_STATE_READY, WORKER_STATE_STARTING, WatchStatusRequest, WorkerStatus
from protos.vision_pb2 import (
    EncodeReply,
    EncodeRequest,
    ExtractReply,
    ExtractRequest,
    ProbeReply,
    ProbeRequest,
    ScoreReply,
    ScoreRequest,
    TileGroup,
    VisionTimings,
)
from vision_server.delivery import Delivered, Delivery, Sending, bytes_of
from vision_server.device_jobs import EncodedGroup, Group, SeenGroup
from vision_server.encoder import Kind
from vision_server.pipeline import ImagePipeline, Medium, Passage
from vision_server.request import TORCH_DTYPE, RequestReader
from vision_server.settings import VisionSettings
from vision_server.vir import VirChoice

if TYPE_CHECKING:
    from opentelemetry.context import Context

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(slots=True)
class _Journey:
    """Stations of one image, in ``time.monotonic`` seconds, for the reply's timings."""

    arrived: float = field(default_factory=time.monotonic)
    queued: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    send_started: float = 0.0
    acknowledged: float = 0.0
    groups: list[TileGroup] = field(default_factory=list)

    def note(self, group: EncodedGroup) -> None:
        """What another call had begun before this one came did not take any of this one's time."""
        self.queued = self.queued or max(self.arrived, group.times.queued)
        self.started = self.started or max(self.arrived, group.times.started)
        self.ended = max(self.arrived, group.times.ended)
        self.send_started = self.send_started or time.monotonic()
        self.groups.append(
            TileGroup(
                first_tile=group.first_tile,
                num_tiles=group.num_tiles,
                queued_ms=self._since_arrival(group.times.queued),
                started_ms=self._since_arrival(group.times.started),
                ended_ms=self._since_arrival(group.times.ended),
            )
        )

    def note_sendings(self, sendings: Sequence[Sending]) -> None:
        """When the frames of each group were on their way."""
        for group, sending in zip(self.groups, sendings, strict=True):
            group.sent_ms = self._since_arrival(sending.started)
            group.acknowledged_ms = self._since_arrival(sending.acknowledged)

    def timings(self) -> VisionTimings:
        return VisionTimings(
            decode_ms=1000 * (self.queued - self.arrived),
            queue_ms=1000 * (self.started - self.queued),
            encode_ms=1000 * (self.ended - self.started),
            transfer_ms=1000 * (self.acknowledged - self.send_started),
        )

    def _since_arrival(self, at: float) -> float:
        return 1000 * max(0.0, at - self.arrived)


class VisionServicer(vision_pb2_grpc.VisionServicer):
    """Answers what protos/vision.proto names."""

    def __init__(
        self,
        settings: VisionSettings,
        config: InternVLConfig,
        pipeline: ImagePipeline,
        delivery: Delivery,
        board: StatusBoard,
    ) -> None:
        self._settings = settings
        self._is_flash = config.flash is not None
        self._reader = RequestReader(config, settings.max_tiles_per_image)
        self._pipeline = pipeline
        self._delivery = delivery
        self._board = board
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Encode(self, request: EncodeRequest, context: _Context) -> EncodeReply:
        async with self._admitted(context) as deadline:
            return await self._encode(request, deadline, tracing.parent_of(context.invocation_metadata()))

    async def Score(self, request: ScoreRequest, context: _Context) -> ScoreReply:
        async with self._admitted(context):
            options = self._reader.score(request)
            medium = Medium(request.image, options, request.image_hash)
            async with self._pipeline.enter(medium, "patches", torch.float32) as passage:
                scores = [group.seen.scores async for group in passage.groups if isinstance(group, SeenGroup)]
                return ScoreReply(scores=torch.cat(scores).float().tolist(), cache_hit=passage.is_cached)

    async def Extract(self, request: ExtractRequest, context: _Context) -> AsyncIterator[ExtractReply]:
        async with self._admitted(context):
            options, dtype, choice, is_states = self._reader.extract(request)
            kind: Kind = "states" if is_states else self._kind
            async with self._pipeline.enter(Medium(request.image, options), kind, TORCH_DTYPE[dtype]) as passage:
                async for group in self._rows(passage, kind, choice, TORCH_DTYPE[dtype]):
                    for reply in _replies(group):
                        yield reply

    async def Probe(self, request: ProbeRequest, context: _Context) -> ProbeReply:
        async with self._admitted(context):
            if not request.video:
                raise InvalidRequest("the video is empty", param="video", code="invalid_image")
            facts = await self._pipeline.probe(request.video)
            return ProbeReply(seconds=facts.seconds, num_frames=facts.num_frames)

    async def WatchStatus(self, request: WatchStatusRequest, context: _Context) -> AsyncIterator[WorkerStatus]:
        async for status in self._board.watch():
            yield status

    async def drained(self) -> None:
        """Returns once no call but ``WatchStatus`` is running."""
        await self._idle.wait()

    # --- the way of one image

    async def _encode(self, request: EncodeRequest, deadline: float, trace: "Context | None") -> EncodeReply:
        journey = _Journey()
        if failpoints.ARE_ON:
            await failpoints.reach("vision.encode.before", request.image)
        options, dtype, choice = self._reader.encode(request)
        medium = Medium(request.image, options, request.image_hash)
        async with self._pipeline.enter(medium, self._kind, TORCH_DTYPE[dtype]) as passage:
            rows = _noted(self._rows(passage, self._kind, choice, TORCH_DTYPE[dtype]), journey)
            delivered = await self._delivery.deliver(request, dtype, rows, deadline)
        journey.acknowledged = time.monotonic()
        journey.note_sendings(delivered.sendings)
        if failpoints.ARE_ON:
            await failpoints.reach("vision.encode.after", request.image)
        reply = _reply(delivered, passage, journey)
        if trace is not None:
            _trace(trace, request, reply, journey)
        return reply

    @property
    def _kind(self) -> Kind:
        return "patches" if self._is_flash else "features"

    def _rows(self, passage: Passage, kind: Kind, choice: VirChoice, dtype: torch.dtype) -> AsyncIterator[EncodedGroup]:
        if kind == "patches":
            return self._pipeline.routed(passage.groups, choice, dtype)
        return _encoded(passage.groups)

    # --- around every call

    @asynccontextmanager
    async def _admitted(self, context: _Context) -> AsyncIterator[float]:
        """A call that may run: counted, and bounded by the caller's deadline or our own, on the monotonic clock."""
        self._check_state()
        remaining = remaining_seconds(context)
        seconds = self._settings.encode_timeout if remaining is None else remaining
        with self._counted():
            try:
                async with asyncio.timeout(seconds):
                    yield time.monotonic() + seconds
            except TimeoutError:
                raise DeadlineExceeded("the image was not encoded in time") from None

    def _check_state(self) -> None:
        if self._board.state == WORKER_STATE_READY:
            return
        is_starting = self._board.state == WORKER_STATE_STARTING
        raise Unavailable(
            "the vision server is starting" if is_starting else "the vision server is shutting down",
            code="not_ready" if is_starting else "draining",
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the call under its outcome, and keep ``drained`` informed."""
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


async def _encoded(groups: AsyncIterator[Group]) -> AsyncIterator[EncodedGroup]:
    async for group in groups:
        assert isinstance(group, EncodedGroup)  # of every kind but patches
        yield group


async def _noted(groups: AsyncIterator[EncodedGroup], journey: _Journey) -> AsyncIterator[EncodedGroup]:
    async for group in groups:
        journey.note(group)
        yield group


def _reply(delivered: Delivered, passage: Passage, journey: _Journey) -> EncodeReply:
    metrics.VISION_ITEM_TILES.observe(len(delivered.tokens_per_tile))
    metrics.VISION_ITEM_DURATION_SECONDS.observe(journey.acknowledged - journey.arrived)
    timings = journey.timings()
    if not passage.is_cached:
        metrics.VISION_DECODE_SECONDS.observe(timings.decode_ms / 1000)
        metrics.VISION_QUEUE_SECONDS.observe(timings.queue_ms / 1000)
    return EncodeReply(
        num_tiles=len(delivered.tokens_per_tile),
        tokens_per_tile=delivered.tokens_per_tile,
        feature_bytes=delivered.num_bytes,
        transport=delivered.transport,
        cache_hit=passage.is_cached,
        timings=timings,
        groups=journey.groups,
    )


def _trace(parent: "Context", request: EncodeRequest, reply: EncodeReply, journey: _Journey) -> None:
    """The stages of an image as spans. Features that were cached were not decoded or encoded now."""
    item: dict[str, tracing.Attribute] = {
        "dvd__item": request.image_index,
        "dvd__attempt": request.attempt,
        "dvd__tiles": reply.num_tiles,
        "dvd__cache_hit": reply.cache_hit,
    }
    if not reply.cache_hit:
        tracing.span("media.decode", journey.arrived, journey.queued, parent, **item)
        tracing.span("vision.queue", journey.queued, journey.started, parent, **item)
        tracing.span("vision.encode", journey.started, journey.ended, parent, **item)
    way: dict[str, tracing.Attribute] = {"dvd__transport": reply.transport, "dvd__bytes": reply.feature_bytes}
    tracing.span("feature.transfer", journey.send_started, journey.acknowledged, parent, **item, **way)


def _replies(group: EncodedGroup) -> Iterator[ExtractReply]:
    """A tile each: a message stays far below gRPC's limit, whatever the batch was."""
    parts = torch.split(group.features, list(group.tokens_per_tile))
    for first_tile, rows in enumerate(parts, group.first_tile):
        yield ExtractReply(
            first_tile=first_tile,
            num_image_tiles=group.num_image_tiles,
            tokens_per_tile=[len(rows)],
            hidden_size=rows.shape[-1],
            features=bytes(bytes_of(rows)),
        )
