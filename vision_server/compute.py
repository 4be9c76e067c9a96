"""The one thread that talks to the device: takes batches from the batcher, encodes, hands features to the event loop.

The device works synchronously here; asyncio stays on the other side of ``ComputeThread``. A batch that fails costs its
images, never the thread; if the thread dies all the same, ``ended`` says so. Knows nothing of gRPC, bytes or sockets.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.service import metrics
from common.service.errors import DvdError, InternalError, Overloaded, Unavailable
from vision_server.batcher import Batcher, ImageId, TileGroup
from vision_server.tiling import Tiles

log = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 0.5
"""An idle thread shows a sign of life this often, well inside the router's patience of 3 s."""
_RATE_WEIGHT: Final = 0.1
"""Share of the newest batch in the moving average of tiles per second."""
_T = TypeVar("_T")


class TileEncoder(Protocol):
    """What the thread needs of ``VisionEncoder``."""

    def encode(self, tiles: Tiles) -> Tensor:
        """Tiles ``[n, S, S, 3]`` uint8 -> features ``[n, tokens per tile, hidden]`` in host memory."""
        ...

    def release_memory(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """Features ``[num_tiles, tokens per tile, hidden]`` of neighbouring tiles; times are ``time.monotonic`` seconds."""

    first_tile: int
    features: Tensor
    started: float
    ended: float


@dataclass(slots=True)
class _Job:
    """An image between decode and the last of its features."""

    tiles: Tiles
    dtype: torch.dtype
    results: asyncio.Queue[EncodedGroup | DvdError]
    num_waiting: int  # tiles not yet in a batch


class ComputeThread:
    """Owns the device thread and the queue before it. Public methods belong to the event loop.

    Args:
        on_progress: called from the thread at least every half second while it is alive inside.
        turn: entered for each batch, before its tiles are chosen: whoever shares the device may be using it.
    """

    def __init__(
        self,
        encoder: TileEncoder,
        batcher: Batcher,
        *,
        on_progress: Callable[[], None] = lambda: None,
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self._encoder = encoder
        self._batcher = batcher
        self._on_progress = on_progress
        self._turn = turn or nullcontext()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._wake = threading.Condition()  # guards the batcher, the jobs and the two fields below
        self._jobs: dict[ImageId, _Job] = {}
        self._running_tiles = 0
        self._is_stopping = False
        self._tiles_per_second = 0.0
        self._ids = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to take batches."""
        self._ended = self._loop.run_in_executor(self._executor, self._run)
        self._ended.add_done_callback(self._fail_all)

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the started thread is: with an exception, unless ``stop`` was called."""
        if self._ended is None:
            raise RuntimeError("the compute thread was not started")
        return self._ended

    async def call(self, function: Callable[[], _T]) -> _T:
        """Run something in the device thread before ``start``: loading, warm-up."""
        return await self._loop.run_in_executor(self._executor, function)

    async def stop(self, timeout: float) -> bool:
        """End the thread after the batch it is in; False if that takes longer than ``timeout`` seconds."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._executor.shutdown(wait=False)
        if self._ended is None:
            return True
        done, _ = await asyncio.wait([self._ended], timeout=timeout)
        return bool(done)

    # --- load

    @property
    def queued_tiles(self) -> int:
        with self._wake:
            return self._batcher.queued_tiles

    @property
    def num_waiting(self) -> int:
        with self._wake:
            return self._batcher.num_waiting

    @property
    def num_running(self) -> int:
        """Images between decode and the last of their features."""
        with self._wake:
            return len(self._jobs)

    @property
    def running_tiles(self) -> int:
        return self._running_tiles

    @property
    def tiles_per_second(self) -> float:
        """Moving average over batches; 0 before the first."""
        return self._tiles_per_second

    # --- an image: admit, resize, encode, release

    def admit(self) -> ImageId:
        """Raises Overloaded when the queue is full."""
        image = next(self._ids)
        with self._wake:
            self._batcher.admit(image)
        return image

    def resize(self, image: ImageId, num_tiles: int) -> None:
        """The image's number of tiles is known now. Raises Overloaded as ``admit`` does."""
        with self._wake:
            self._batcher.resize(image, num_tiles)

    async def encode(self, image: ImageId, tiles: Tiles, dtype: torch.dtype) -> AsyncIterator[EncodedGroup]:
        """Features of an admitted image in ``dtype``, group by group in tile order, as soon as each is there.

        Raises:
            Overloaded: the device ran out of memory, also for a single tile.
            InternalError: the device failed on this image.
            Unavailable: the thread has died.
        """
        results: asyncio.Queue[EncodedGroup | DvdError] = asyncio.Queue(len(tiles) + 1)  # a tile each, and our death
        job = _Job(tiles, dtype, results, num_waiting=len(tiles))
        if self.ended.done():
            raise _died()
        with self._wake:
            self._jobs[image] = job
            self._batcher.make_ready(image)
            self._wake.notify()
        num_left = len(tiles)
        while num_left:
            result = await job.results.get()
            if isinstance(result, DvdError):
                raise result
            num_left -= len(result.features)
            yield result

    def release(self, image: ImageId) -> int:
        """Forget an image; returns how many tiles were dropped unencoded."""
        with self._wake:
            self._jobs.pop(image, None)
            return self._batcher.release(image)

    def _fail_all(self, _: asyncio.Future[None]) -> None:
        with self._wake:
            for job in self._jobs.values():
                job.results.put_nowait(_died())

    # --- in the thread

    def _run(self) -> None:
        while self._wait_for_tiles():
            with self._turn:
                self._encode_batch(self._next_batch())
            self._running_tiles = 0
            self._on_progress()

    def _wait_for_tiles(self) -> bool:
        """False when the thread is to stop."""
        with self._wake:
            while not self._is_stopping and not any(job.num_waiting for job in self._jobs.values()):
                self._wake.wait(_IDLE_SECONDS)
                self._on_progress()
            return not self._is_stopping

    def _next_batch(self) -> list[TileGroup]:
        """What is ready now; empty when its images have left, or the thread is to stop."""
        with self._wake:
            groups = [] if self._is_stopping else self._batcher.take()
            self._running_tiles = sum(group.num_tiles for group in groups)
            for group in groups:
                if (job := self._jobs.get(group.image)) is not None:
                    job.num_waiting -= group.num_tiles
            return groups

    def _encode_batch(self, groups: list[TileGroup]) -> None:
        """One pass over the batch; what fails together is tried again apart, once."""
        error = self._try(groups)
        if error is None:
            return
        pieces = list(_single_tiles(groups)) if _is_out_of_memory(error) else groups
        if len(pieces) == 1:
            self._fail(pieces[0], error)
            return
        log.warning("a batch of %d images failed, trying its parts one by one", len(groups), exc_info=error)
        self._encoder.release_memory()
        for piece in pieces:
            if (error := self._try([piece])) is not None:
                self._fail(piece, error)

    def _try(self, groups: list[TileGroup]) -> Exception | None:
        """Encode groups as one batch and hand out the features; returns what went wrong."""
        with self._wake:
            alive = [(group, job) for group in groups if (job := self._jobs.get(group.image)) is not None]
        if not alive:
            return None
        tiles = [job.tiles[group.first_tile : group.first_tile + group.num_tiles] for group, job in alive]
        started = time.monotonic()
        try:
            features = self._encoder.encode(np.concatenate(tiles) if len(tiles) > 1 else tiles[0])
            sizes = [group.num_tiles for group, _ in alive]
            parts = [part.to(job.dtype) for part, (_, job) in zip(torch.split(features, sizes), alive, strict=True)]
        except torch.AcceleratorError:
            raise  # the device's context is gone: only a new process helps
        except Exception as error:  # noqa: BLE001 - the seam to the device: whatever it raises costs this batch only
            return error
        ended = time.monotonic()
        self._measure(features, len(alive), ended - started)
        for part, (group, job) in zip(parts, alive, strict=True):
            self._hand_out(job, EncodedGroup(group.first_tile, part, started, ended))
        return None

    def _hand_out(self, job: _Job, group: EncodedGroup) -> None:
        if not torch.isfinite(group.features).all():
            metrics.VISION_NONFINITE.inc()
            self._post(job, InternalError("the image's features are not finite"))
        else:
            self._post(job, group)

    def _fail(self, group: TileGroup, error: Exception) -> None:
        log.error("an image cannot be encoded", exc_info=error)
        with self._wake:
            job = self._jobs.pop(group.image, None)
        if job is not None:
            is_memory = _is_out_of_memory(error)
            self._post(job, Overloaded("out of device memory") if is_memory else InternalError("encoding failed"))

    def _post(self, job: _Job, result: EncodedGroup | DvdError) -> None:
        self._loop.call_soon_threadsafe(job.results.put_nowait, result)

    def _measure(self, features: Tensor, num_images: int, seconds: float) -> None:
        num_tiles, tokens_per_tile = features.shape[:2]
        rate = num_tiles / max(seconds, 1e-6)
        previous = self._tiles_per_second or rate
        self._tiles_per_second = previous + _RATE_WEIGHT * (rate - previous)
        metrics.VISION_ENCODE_SECONDS.observe(seconds)
        metrics.VISION_BATCH_TILES.observe(num_tiles)
        metrics.VISION_BATCH_ITEMS.observe(num_images)
        metrics.VISION_TILES.labels(str(tokens_per_tile)).inc(num_tiles)
        metrics.VISION_FEATURE_TOKENS.inc(num_tiles * tokens_per_tile)


def _single_tiles(groups: list[TileGroup]) -> Iterator[TileGroup]:
    for group in groups:
        for tile in range(group.first_tile, group.first_tile + group.num_tiles):
            yield TileGroup(group.image, tile, 1)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator of torch has no exception type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _died() -> Unavailable:
    return Unavailable("the vision server's device thread has ended")
