"""Compressed bytes -> tiles, in processes that a broken or malicious file may take down without harm to anybody else.

A worker does one medium at a time; callers queue for the next free one, first come first served. Whatever ends a worker
costs the medium it was at, which is refused like any other broken file, and a new worker takes its place. Bytes and
tiles travel through memory that both sides see. Everything here runs on the event loop; admission bounds the queue.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from common.model.geometry import Tiling
from common.service import metrics
from common.service.errors import StartupError, Unavailable
from vision_server.decode_job import Kind, MediaOptions, Outcome, VideoFacts
from vision_server.decode_process import DiedIdle, WorkerLost, WorkerProcess
from vision_server.media import invalid_image
from vision_server.tiling import Tiles

__all__ = ["DecodePool", "MediaOptions", "VideoFacts"]

log = logging.getLogger(__name__)

_BYTES_PER_PIXEL: Final = 20
"""WebP takes 16 while it is decoded, a progressive CMYK JPEG 12, the others 8 to 10 (measured at 50 megapixels)."""
_SPARE_BYTES: Final = 256 * 2**20
_SLOWNESS: Final = 6.0
"""Seconds on the clock for each second of processor time: workers may have to wait for a core."""
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_T = TypeVar("_T")
_ANY: Final = MediaOptions(Tiling(1, 1, use_thumbnail=False))


def memory_for(max_pixels: int, max_tiles: int) -> int:
    """Bytes a worker may take for one medium."""
    return _BYTES_PER_PIXEL * max_pixels + (max_tiles + 1) * 448 * 448 * 3 + _SPARE_BYTES


class DecodePool:
    """Decodes, measures and probes media. Start it from a thread that lives as long as it does: workers die with it.

    Args:
        num_workers: media decoded at the same time.
        max_pixels: of one image, or one frame of a video.
        max_tiles: of one medium, thumbnail not counted.
        memory_bytes: one worker may take for one medium; default: what the largest image takes.
        seconds: of processor time for one medium.
        wall_seconds: on the clock; default: six times as many.
        abandoned_seconds: on the clock for a medium whose caller has left; then the worker is replaced.
        nice: OS priority of the workers.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        max_pixels: int,
        max_tiles: int,
        memory_bytes: int | None = None,
        seconds: float = 10.0,
        wall_seconds: float | None = None,
        abandoned_seconds: float = 0.5,
        nice: int = 0,
    ) -> None:
        self.num_workers = num_workers
        self._max_pixels = max_pixels
        self._memory_bytes = memory_bytes or memory_for(max_pixels, max_tiles)
        self._seconds = seconds
        self._wall_seconds = wall_seconds or _SLOWNESS * seconds
        self._abandoned_seconds = abandoned_seconds
        self._nice = nice
        self._workers: set[WorkerProcess] = set()
        self._free = _FreeWorkers()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_missing = 0
        self._is_closed = False
        self.num_crashes = 0
        """Workers that died or hung so far."""

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        return [worker.pid for worker in self._workers]

    @property
    def is_starved(self) -> bool:
        """No worker starts."""
        return self._free.is_starved

    async def start(self) -> None:
        """Raises StartupError if workers cannot run here."""
        launches = [asyncio.create_task(self._launch()) for _ in range(self.num_workers)]
        try:
            workers = await asyncio.gather(*launches)
        except BaseException:
            for launch in launches:
                launch.cancel()
            await asyncio.gather(*launches, return_exceptions=True)
            await self.close()
            raise
        for worker in workers:
            self._free.give(worker)
            self._own(self._keep(worker))
        if not all(worker.is_filtered for worker in workers):
            log.warning("decode workers run without a filter of system calls: the system does not offer it")

    async def close(self) -> None:
        """Ends all workers, whatever they are at."""
        self._is_closed = True
        self._free.starve()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()

    async def measure(self, data: bytes, options: MediaOptions) -> int:
        """How many tiles the medium has; reads headers only. Raises InvalidRequest as ``tiles`` does."""
        outcome, _ = await self._ask(Kind.MEASURE, data, options)
        return outcome.num_tiles

    async def tiles(self, data: bytes, options: MediaOptions) -> Tiles:
        """The wanted tiles of an image, or of those that a video has, one for each frame.

        Raises:
            InvalidRequest: ``invalid_image``: broken, too large, or more than a worker could bear. ``invalid_value``:
                it has not all the tiles that are wanted.
                ``unsupported_media``: a video in a container or codec that is not taken.
            Unavailable: workers do not come up.
        """
        _, tiles = await self._ask(Kind.TILES, data, options)
        return tiles

    async def probe(self, data: bytes) -> VideoFacts:
        """How long a video is. Raises InvalidRequest as ``tiles`` does."""
        outcome, _ = await self._ask(Kind.PROBE, data, _ANY)
        return VideoFacts(outcome.seconds, outcome.num_frames)

    async def _ask(self, kind: Kind, data: bytes, options: MediaOptions) -> tuple[Outcome, Tiles]:
        while True:
            worker = await self._free.take()
            task = self._own(self._run(worker, kind, data, options))
            try:
                return await asyncio.shield(task)
            except DiedIdle:
                continue
            except asyncio.CancelledError:
                self._own(self._abandon(worker, task))
                raise

    async def _abandon(self, worker: WorkerProcess, task: asyncio.Task[tuple[Outcome, Tiles]]) -> None:
        """Its caller has left. Most media are done in a moment, sooner than a new worker would be there; nobody reads
        the outcome. At any other the worker would be busy for nobody."""
        await asyncio.wait([task], timeout=self._abandoned_seconds)
        if not task.done():
            worker.is_abandoned = True
            worker.kill()

    async def _run(
        self, worker: WorkerProcess, kind: Kind, data: bytes, options: MediaOptions
    ) -> tuple[Outcome, Tiles]:
        try:
            return await worker.run(kind, data, options, self._wall_seconds)
        except WorkerLost as loss:
            if worker.is_abandoned:
                raise _unavailable() from None  # to nobody
            self.num_crashes += 1
            metrics.VISION_DECODER_CRASHES.inc()
            log.warning("a decode worker %s at a medium of %d bytes; it is replaced", loss, len(data))
            worker.kill()
            raise invalid_image("the medium cannot be decoded") from None
        except DiedIdle:
            worker.kill()  # or it closed its end, and lives
            raise
        finally:
            if worker.is_alive and not self._is_closed:
                self._free.give(worker)

    async def _keep(self, worker: WorkerProcess) -> None:
        """Replace a worker whenever it has ended."""
        while True:
            await worker.ended()
            await worker.end()
            self._workers.discard(worker)
            worker = await self._relaunch()
            self._free.give(worker)

    async def _relaunch(self) -> WorkerProcess:
        delay, is_missing = _FIRST_DELAY, False
        while True:
            try:
                worker = await self._launch()
            except StartupError as error:
                log.error("%s; next try in %.1f s", error, delay)
                self._num_missing += not is_missing
                is_missing = True
                if self._num_missing == self.num_workers:
                    self._free.starve()
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                self._num_missing -= is_missing
                return worker

    async def _launch(self) -> WorkerProcess:
        worker = await WorkerProcess.start(self._memory_bytes, self._max_pixels, self._seconds, self._nice)
        self._workers.add(worker)
        return worker

    def _own(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody has to


class _FreeWorkers:
    """Who waits gets the next one, first come first served; nobody waits where none will come."""

    def __init__(self) -> None:
        self._workers: deque[WorkerProcess] = deque()
        self._waiting: deque[asyncio.Future[WorkerProcess]] = deque()
        self.is_starved = True

    async def take(self) -> WorkerProcess:
        """Raises Unavailable."""
        if self.is_starved:
            raise _unavailable()
        while self._workers:
            worker = self._workers.popleft()
            if worker.is_alive:
                return worker
        waiting: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self.give(waiting.result())  # it came as the caller left
            raise

    def give(self, worker: WorkerProcess) -> None:
        self.is_starved = False
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(worker)
                return
        self._workers.append(worker)

    def starve(self) -> None:
        self.is_starved = True
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(_unavailable())


def _unavailable() -> Unavailable:
    return Unavailable("images cannot be decoded at the moment")
