"""The one thread that talks to the device: takes batches from the batcher, encodes, hands results to the event loop.

The device works synchronously here; asyncio stays on the other side of ``ComputeThread``. Where copies and arithmetic
can overlap, the next batch is launched before the last one is waited for. A batch that fails costs its images, never
the thread; if the thread dies all the same, ``ended`` says so. Knows nothing of gRPC, bytes or sockets.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from common.service import failpoints, metrics
from common.service.errors import DvdError, InternalError, Overloaded, Unavailable
from common.service.priority import yield_to_others
from vision_server.batcher import Batcher, ImageId, TileGroup
from vision_server.device_jobs import EncodedGroup, Group, ImageJob, ProjectionJob, SeenGroup, Times
from vision_server.encoder import Kind, Projected, Seen
from vision_server.host_link import Pending
from vision_server.tiling import Tiles

log = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 0.5
"""An idle thread shows a sign of life this often, well inside the router's patience of 3 s."""
_RATE_WEIGHT: Final = 0.1
"""Share of the newest batch in the moving average of tiles per second."""
_PROJECTION_GRACE_SECONDS: Final = 0.005
_POLL_SECONDS: Final = 0.001
_T = TypeVar("_T")


class TileEncoder(Protocol):
    """What the thread needs of ``VisionEncoder``; see there."""

    @property
    def depth(self) -> int: ...
    def launch(self, kind: Kind, parts: Sequence[Tiles]) -> Pending[Sequence[Tensor | Seen]]: ...
    def project(self, patches: Sequence[Tensor], compressed: Sequence[bool]) -> Pending[Projected]: ...
    def release_memory(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _TileBatch:
    """Groups of tiles that were launched together, and whose they are."""

    parts: Sequence[tuple[TileGroup, ImageJob]]
    pending: Pending[Sequence[Tensor | Seen]]
    started: float


class ComputeThread:
    """Owns the device thread and the queue before it. Public methods belong to the event loop.

    Args:
        nice: OS priority of the thread, and of the threads that compute for it.
        on_progress: called from the thread at least every half second while it is alive inside.
        turn: entered for each batch, before its tiles are chosen: whoever shares the device may be using it.
    """

    def __init__(
        self,
        encoder: TileEncoder,
        batcher: Batcher,
        *,
        nice: int = 0,
        on_progress: Callable[[], None] = lambda: None,
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self._encoder = encoder
        self._batcher = batcher
        self._on_progress = on_progress
        self._turn = turn or nullcontext()
        self._depth = 1 if turn else encoder.depth  # what is under way at the end of a turn would not be over
        self._executor = ThreadPoolExecutor(1, "compute", initializer=yield_to_others, initargs=(nice,))
        self._wake = threading.Condition()  # guards the batcher and the fields up to _is_stopping
        self._jobs: dict[ImageId, ImageJob] = {}
        self._projections: deque[ProjectionJob] = deque()  # bounded: each belongs to an admitted image
        self._is_stopping = False
        self._launched: deque[_TileBatch] = deque()  # of the thread
        self._running_tiles = 0
        self._tiles_per_second = 0.0
        self._last_ended = 0.0
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
        """Images between decode and the last of their results."""
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

    def admit(self, *, is_encoded: bool = False) -> ImageId:
        """Raises Overloaded when the queue is full. ``is_encoded``: only a place is needed, nothing will be encoded."""
        image = next(self._ids)
        with self._wake:
            self._batcher.admit(image, is_encoded=is_encoded)
        return image

    def resize(self, image: ImageId, num_tiles: int) -> None:
        """The image's number of tiles is known now. Raises Overloaded as ``admit`` does."""
        with self._wake:
            self._batcher.resize(image, num_tiles)

    async def encode(
        self,
        image: ImageId,
        tiles: Tiles,
        dtype: torch.dtype,
        kind: Kind = "features",
        *,
        offset: int = 0,
        num_image_tiles: int | None = None,
    ) -> AsyncIterator[Group]:
        """Results of an admitted image, group by group in tile order, as soon as each is there.

        ``EncodedGroup`` in ``dtype``, or ``SeenGroup`` where ``kind`` is patches.

        Args:
            offset: number of the first of ``tiles``.
            num_image_tiles: how many the image has, where ``tiles`` are not all.

        Raises:
            Overloaded: the device ran out of memory, also for a single tile.
            InternalError: the device failed on this image.
            Unavailable: the thread has died.
        """
        job = ImageJob(kind, tiles, dtype, offset, num_image_tiles)
        if self.ended.done():
            raise _died()
        with self._wake:
            self._jobs[image] = job
            self._batcher.make_ready(image, kind)
            self._wake.notify()
        num_left = len(tiles)
        while num_left > 0:
            result = await job.results.get()
            if isinstance(result, DvdError):
                raise result
            num_left -= result.num_tiles
            yield result
        with self._wake:
            self._jobs.pop(image, None)  # and with it the tiles, which are larger than what came of them

    async def project(
        self, groups: Sequence[SeenGroup], compressed: Sequence[bool], dtype: torch.dtype
    ) -> EncodedGroup:
        """The rows of neighbouring groups, now that it is known which of their tiles are compressed.

        Raises as ``encode`` does.
        """
        if self.ended.done():
            raise _died()
        patches = [tile for group in groups for tile in group.seen.patches]
        job = ProjectionJob(patches, compressed, dtype, self._loop.create_future())
        with self._wake:
            self._projections.append(job)
            self._wake.notify()
        either: list[asyncio.Future[Any]] = [job.result, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not job.result.done():
            raise _died()
        projected = job.result.result()
        first = groups[0]
        times = replace(first.times, ended=time.monotonic())
        return EncodedGroup(first.first_tile, first.num_image_tiles, projected.tokens_per_tile, projected.rows, times)

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
        while self._wait_for_work():
            with self._turn:
                self._advance()
            self._running_tiles = sum(group.num_tiles for batch in self._launched for group, _ in batch.parts)
            self._on_progress()

    def _wait_for_work(self) -> bool:
        """False when the thread is to stop."""
        with self._wake:
            while not self._is_stopping and not self._launched and not self._has_work():
                self._wake.wait(_IDLE_SECONDS)
                self._on_progress()
            return not self._is_stopping

    def _has_work(self) -> bool:
        return bool(self._projections) or any(job.num_waiting for job in self._jobs.values())

    def _advance(self) -> None:
        """Launch what there is; wait for what was launched first when enough is under way, or nothing else to do.

        Projections go first: they end an image, and cost a fraction of what a batch does. An image that was just seen
        to its end is about to be projected: its caller gets a moment to say so, rather than a batch in its way.
        """
        if projections := self._take_projections():
            self._project(projections)
        elif len(self._launched) < self._depth and (groups := self._next_batch()):
            self._launch(groups)
        if self._launched and not self._work_comes():
            batch = self._launched.popleft()
            self._finish(batch)
            if not self._launched and any(job.kind == "patches" and job.num_pending == 0 for _, job in batch.parts):
                with self._wake:
                    self._wake.wait_for(lambda: self._projections or self._is_stopping, _PROJECTION_GRACE_SECONDS)

    def _work_comes(self) -> bool:
        """Whether there is something to launch before the oldest batch is done: tiles while there is room are uploaded
        beside it, and projections never wait for it."""
        pending, has_room = self._launched[0].pending, len(self._launched) < self._depth
        with self._wake:
            while not (pending.is_done() or self._is_stopping):
                if self._projections or (has_room and self._has_work()):
                    return True
                self._wake.wait(_POLL_SECONDS)
        return False

    def _take_projections(self) -> list[ProjectionJob]:
        """Those that wait, as many as make a batch."""
        taken: list[ProjectionJob] = []
        room = self._batcher.max_batch_tiles
        with self._wake:
            while self._projections and (not taken or room >= len(self._projections[0].patches)):
                taken.append(self._projections.popleft())
                room -= len(taken[-1].patches)
        return taken

    def _next_batch(self) -> list[TileGroup]:
        """What is ready now; empty when its images have left, or the thread is to stop."""
        with self._wake:
            groups = [] if self._is_stopping else self._batcher.take()
            self._running_tiles += sum(group.num_tiles for group in groups)
            for group in groups:
                if (job := self._jobs.get(group.image)) is not None:
                    job.num_waiting -= group.num_tiles
            return groups

    # --- tiles

    def _launch(self, groups: Sequence[TileGroup]) -> None:
        """Start one pass over the batch; a batch that cannot even be started is tried again apart."""
        try:
            batch = self._start(groups)
        except torch.AcceleratorError:
            raise  # the device's context is gone: only a new process helps
        except Exception as error:  # noqa: BLE001 - the seam to the device: whatever it raises costs this batch only
            while self._launched:  # an image's groups keep their order, and the device gets its memory back
                self._finish(self._launched.popleft())
            self._retry_apart(groups, error)
        else:
            self._launched.extend([batch] if batch is not None else [])

    def _start(self, groups: Sequence[TileGroup]) -> _TileBatch | None:
        """None if nobody waits for these tiles any more."""
        with self._wake:
            parts = [(group, job) for group in groups if (job := self._jobs.get(group.image)) is not None]
        if not parts:
            return None
        tiles = [job.tiles[group.first_tile : group.first_tile + group.num_tiles] for group, job in parts]
        started = time.monotonic()
        if failpoints.ARE_ON:
            failpoints.hit("vision.batch")
        pending = self._encoder.launch(parts[0][1].kind, tiles)
        return _TileBatch(parts, pending, started)

    def _finish(self, batch: _TileBatch) -> None:
        """Wait for a batch and hand out what came of it; what failed together is tried again apart, once."""
        try:
            self._hand_out(batch, batch.pending.result())
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - as in _launch
            self._retry_apart([group for group, _ in batch.parts], error)

    def _retry_apart(self, groups: Sequence[TileGroup], error: Exception) -> None:
        is_out_of_memory = _is_out_of_memory(error)
        if is_out_of_memory:
            metrics.OUT_OF_MEMORY.labels("encode").inc()
        pieces = list(_single_tiles(groups)) if is_out_of_memory else groups
        if len(pieces) == 1:
            self._fail(pieces[0], error)
            return
        log.warning("a batch of %d images failed, trying its parts one by one", len(groups), exc_info=error)
        self._encoder.release_memory()
        for piece in pieces:
            try:
                if (batch := self._start([piece])) is not None:
                    self._hand_out(batch, batch.pending.result())
            except torch.AcceleratorError:
                raise
            except Exception as failure:  # noqa: BLE001 - as in _launch
                self._fail(piece, failure)

    def _hand_out(self, batch: _TileBatch, results: Sequence[Tensor | Seen]) -> None:
        ended = time.monotonic()
        self._measure(batch, ended)
        for (group, job), result in zip(batch.parts, results, strict=True):
            news: Group | DvdError
            try:
                times = Times(job.queued, batch.started, ended)
                news = job.group(group.first_tile, result, times)
                job.num_pending -= group.num_tiles
                if isinstance(news, EncodedGroup) and job.kind == "features":
                    _count_tiles(news.tokens_per_tile)
            except InternalError as error:
                news = error
            self._post(job, news)

    def _fail(self, group: TileGroup, error: Exception) -> None:
        log.error("an image cannot be encoded", exc_info=error)
        with self._wake:
            job = self._jobs.pop(group.image, None)
        if job is not None:
            self._post(job, _translated(error))

    def _post(self, job: ImageJob, news: Group | DvdError) -> None:
        self._loop.call_soon_threadsafe(job.results.put_nowait, news)

    def _measure(self, batch: _TileBatch, ended: float) -> None:
        num_tiles = sum(group.num_tiles for group, _ in batch.parts)
        # Batches overlap: the device gave this one the time since the last one ended.
        seconds = ended - max(batch.started, self._last_ended)
        self._last_ended = ended
        rate = num_tiles / max(seconds, 1e-6)
        previous = self._tiles_per_second or rate
        self._tiles_per_second = previous + _RATE_WEIGHT * (rate - previous)
        metrics.VISION_ENCODE_SECONDS.observe(ended - batch.started)
        metrics.VISION_BATCH_TILES.observe(num_tiles)
        metrics.VISION_BATCH_ITEMS.observe(len(batch.parts))

    # --- projections

    def _project(self, jobs: Sequence[ProjectionJob]) -> None:
        """Together; what fails together is tried again apart, once."""
        jobs = [job for job in jobs if not job.result.done()]
        try:
            self._try_projections(jobs)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(jobs) > 1:
                self._encoder.release_memory()
                for job in jobs:
                    self._project([job])
                return
            log.error("tiles cannot be projected", exc_info=error)
            self._loop.call_soon_threadsafe(_settle, jobs[0], _translated(error))

    def _try_projections(self, jobs: Sequence[ProjectionJob]) -> None:
        if not jobs:
            return
        patches = [tile for job in jobs for tile in job.patches]
        compressed = [is_compressed for job in jobs for is_compressed in job.compressed]
        projected = self._encoder.project(patches, compressed).result()
        tokens = iter(projected.tokens_per_tile)
        own_tokens = [tuple(itertools.islice(tokens, len(job.patches))) for job in jobs]
        rows = torch.split(projected.rows, [sum(counts) for counts in own_tokens])
        results = [job.own(own, counts) for job, own, counts in zip(jobs, rows, own_tokens, strict=True)]
        _count_tiles(projected.tokens_per_tile)
        for job, result in zip(jobs, results, strict=True):
            self._loop.call_soon_threadsafe(_settle, job, result)


def _settle(job: ProjectionJob, result: Projected | DvdError) -> None:
    if job.result.done():  # its caller has left
        return
    if isinstance(result, DvdError):
        job.result.set_exception(result)
    else:
        job.result.set_result(result)


def _count_tiles(tokens_per_tile: Sequence[int]) -> None:
    for num_tokens in tokens_per_tile:
        metrics.VISION_TILES.labels(str(num_tokens)).inc()
    metrics.VISION_FEATURE_TOKENS.inc(sum(tokens_per_tile))


def _single_tiles(groups: Sequence[TileGroup]) -> Iterator[TileGroup]:
    for group in groups:
        for tile in range(group.first_tile, group.first_tile + group.num_tiles):
            yield TileGroup(group.image, tile, 1)


def _translated(error: Exception) -> DvdError:
    if isinstance(error, InternalError):
        return error
    return Overloaded("out of device memory") if _is_out_of_memory(error) else InternalError("encoding failed")


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator of torch has no exception type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _died() -> Unavailable:
    return Unavailable("the vision server's device thread has ended")
