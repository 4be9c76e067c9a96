"""The vision server as a program: ``start`` (listen), ``load`` (weights, warm-up), serve, ``drain``.

Puts the parts together and knows nothing of images. Routers see it from the first moment, in state STARTING.
"""

import asyncio
import logging
import threading
import time
from contextlib import AbstractContextManager
from importlib.metadata import version

from common.model import memory
from common.model.checkpoint import Checkpoint
from common.model.config import InternVLConfig, load_config
from common.model.device import choose_device, export_memory
from common.service import announce, metrics, rpc
from common.service.errors import Cancelled
from common.service.health import add_health
from common.service.keys import Keys
from common.service.program import DRAIN_NOTICE_SECONDS, Progress
from common.service.status import StatusBoard
from common.transport.select import SenderPool
from common.transport.sender import TransportLimits
from protos import frame, vision_pb2_grpc
from protos.status_pb2 import (
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    ModelInfo,
    VisionLoad,
)
from vision_server.batcher import Batcher
from vision_server.compute import ComputeThread
from vision_server.decode_pool import DecodePool
from vision_server.delivery import Delivery, FrameCourier
from vision_server.encoder import VisionEncoder
from vision_server.pipeline import ImagePipeline
from vision_server.servicer import VisionServicer
from vision_server.settings import VisionSettings

log = logging.getLogger(__name__)

_TITLE = "vision server"
_LINGER_SECONDS = 0.25
"""For replies already made to reach their callers; ``WatchStatus`` streams would never end by themselves."""
_STOP_SECONDS = 5.0
"""For the device thread to finish the batch it is in."""


class VisionServer:
    """All parts of one vision server. Construction reads headers only, and raises StartupError on what cannot work.

    Args:
        courier: delivers frames, instead of the transports that ``settings`` name.
        turn: of whoever computes on the same device in this process; entered for each batch.
    """

    def __init__(
        self,
        settings: VisionSettings,
        *,
        courier: FrameCourier | None = None,
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self.settings = settings
        self.config = load_config(settings.model)
        checkpoint = Checkpoint.open(settings.model)
        fingerprint = checkpoint.fingerprint(self.config)
        self._metrics_address = _start_metrics(settings)
        self.board = StatusBoard(
            settings.name, fingerprint, _model_info(settings, self.config), self._load_report, self._metrics_address
        )
        self.encoder = VisionEncoder(
            self.config,
            settings.device,
            settings.dtype,
            is_batch_invariant=settings.batch_invariant,
            use_cuda_graphs=settings.cuda_graphs,
            compile_layers=settings.compile and choose_device(settings.device).type != "cpu",
            on_progress=self.board.bump,
        )
        weights = memory.weight_bytes(checkpoint, "vision", self.encoder.dtype)
        memory.check_fits(_TITLE, {"weights": weights}, self.encoder.device)
        batch_tiles = settings.max_batch_tiles or self.encoder.preferred_batch_tiles
        self._batch_tiles = min(batch_tiles, settings.max_queued_tiles)
        batcher = Batcher(self._batch_tiles, settings.max_queued_tiles)
        self.compute = ComputeThread(self.encoder, batcher, nice=settings.nice, on_progress=self.board.bump, turn=turn)
        self._keys = Keys.given(settings.keys, "vision")
        self._senders = SenderPool(transports=settings.transports, limits=TransportLimits(keys=self._keys))
        self._decoder = DecodePool(
            settings.decode_workers,
            max_pixels=settings.max_pixels,
            max_tiles=settings.max_tiles_per_image,
            nice=settings.nice,
        )
        self._servicer = VisionServicer(
            settings,
            self.config,
            ImagePipeline(self._decoder, self.compute, settings.feature_cache_bytes),
            Delivery(courier or self._senders, fingerprint),
            self.board,
        )
        self._grpc = rpc.make_server()
        add_health(self._grpc, self.board)
        vision_pb2_grpc.add_VisionServicer_to_server(self._servicer, self._grpc)  # type: ignore[no-untyped-call]
        self._is_load_aborted = threading.Event()
        self.address = ""
        metrics.VISION_TILES_WAITING.set_function(lambda: self.compute.queued_tiles)
        metrics.VISION_ITEMS_WAITING.set_function(lambda: self.compute.num_waiting)
        metrics.VISION_ITEMS_RUNNING.set_function(lambda: self.compute.num_running)

    async def start(self) -> None:
        """Listen, answering that the server is not ready. Raises ConfigError if the address cannot be had."""
        self.address = rpc.bind(self._grpc, self.settings.listen, self._keys, guard=self.settings.guard)
        await self._grpc.start()
        await self._decoder.start()

    async def load(self, progress: Progress = lambda done, total: None) -> None:
        """Read the weights, encode one tile to warm up, and open the doors.

        Raises:
            CheckpointError: the checkpoint does not fit its config.
            ConfigError: memory ran out.
            Cancelled: ``abort_load`` was called.
        """

        def watched(done: int, total: int) -> None:
            if self._is_load_aborted.is_set():
                raise Cancelled("stopped while loading")
            self.board.bump()
            progress(done, total)

        started = time.monotonic()
        with memory.explained(_TITLE, self.encoder.device):
            await self.compute.call(lambda: self.encoder.load(self.settings.model, watched))
            loaded = time.monotonic()
            await self.compute.call(lambda: self.encoder.warm_up(self._batch_tiles))
        export_memory(self.encoder.device)
        metrics.LOAD_SECONDS.labels("weights").set(loaded - started)
        metrics.LOAD_SECONDS.labels("warmup").set(time.monotonic() - loaded)
        if self.encoder.device.type == "cpu":
            self.board.count_cpu_time(await self.compute.call(threading.get_ident))
        self.compute.start()
        self.board.state = WORKER_STATE_READY
        announce.write(
            self.settings.announce,
            name=self.settings.name,
            role="vision",
            address=self.address,
            metrics_address=self._metrics_address,
        )

    def abort_load(self) -> None:
        """Make ``load`` fail at the next tensor."""
        self._is_load_aborted.set()

    async def drain(self) -> None:
        """Refuse new images and wait for the admitted ones, at most ``shutdown_timeout`` seconds."""
        self.board.state = WORKER_STATE_DRAINING
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                await asyncio.gather(self._servicer.drained(), asyncio.sleep(DRAIN_NOTICE_SECONDS))
        except TimeoutError:
            log.warning("images still in work after %g s are dropped", self.settings.shutdown_timeout)

    async def close(self) -> bool:
        """Let go of everything; what is still in work fails. False if the device thread is stuck."""
        await self._grpc.stop(_LINGER_SECONDS)
        has_ended = await self.compute.stop(_STOP_SECONDS)
        await self._senders.close()
        await self._decoder.close()
        return has_ended

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the device thread is."""
        return self.compute.ended

    @property
    def ready_line(self) -> str:
        """What the operator reads."""
        encoder = self.encoder
        return (
            f"vision server ready at {self.address} model {self.settings.model_name}"
            f" device {encoder.device} dtype {str(encoder.dtype).removeprefix('torch.')}"
            f" weights {encoder.weight_bytes / 1e6:.1f} MB"
        )

    def _load_report(self) -> VisionLoad:
        return VisionLoad(
            queued_tiles=self.compute.queued_tiles,
            running_tiles=self.compute.running_tiles,
            max_queued_tiles=self.settings.max_queued_tiles,
            tiles_per_second=self.compute.tiles_per_second,
            max_batch_tiles=self._batch_tiles,
        )


def _model_info(settings: VisionSettings, config: InternVLConfig) -> ModelInfo:
    return ModelInfo(
        model=settings.model_name,
        image_size=config.tiling.tile_size,
        tokens_per_tile=config.tokens_per_tile,
        min_dynamic_patch=config.tiling.min_tiles,
        max_dynamic_patch=config.tiling.max_tiles,
        use_thumbnail=config.tiling.use_thumbnail,
        dynamic_image_size=config.tiling.dynamic,
        vocab_size=config.vocab_size,
        is_flash=config.flash is not None,
        vir_relative_threshold=config.flash.relative_threshold if config.flash else 0.0,
        vir_absolute_threshold=config.flash.absolute_threshold if config.flash else 0.0,
    )


def _start_metrics(settings: VisionSettings) -> str:
    metrics.set_model(settings.model_name)
    metrics.BUILD_INFO.labels(version("dvd-serve"), str(frame.VERSION)).set(1)
    return metrics.start_server(settings.metrics_listen, "vision") if settings.metrics_listen else ""
