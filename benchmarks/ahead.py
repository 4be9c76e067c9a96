"""Request bodies built before they are due, in threads: a picture takes longer to encode than a small model to answer.

Bounded in bytes. Knows neither when a request leaves nor what comes back.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from benchmarks.arrivals import Arrivals, OpenLoop
from benchmarks.plan import Source
from benchmarks.workload import Recipe, Workload, body_bytes, render

_AHEAD_BYTES: Final = 256 * 2**20
_MIN_AHEAD, _MAX_AHEAD = 16, 1024
_READY_BODIES: Final = 64
"""Bodies that must be built before a source starts; all that may be held, where everything is sent at once."""
_MAX_BUILDERS: Final = 4


class Ahead:
    """Bodies built before they are needed, as many as fit into a fixed amount of memory."""

    def __init__(self, order: Iterator[Recipe], source: Source, model: str, builders: ThreadPoolExecutor) -> None:
        self._order = order
        self._workload: Workload = source.workload
        self._model = model
        self._builders = builders
        depth = min(_MAX_AHEAD, max(_MIN_AHEAD, _AHEAD_BYTES // body_bytes(source.workload)))
        self._depth = depth if source.num_requests is None else min(depth, source.num_requests)
        self._num_ready = self._depth if _is_all_at_once(source.arrivals) else min(_READY_BODIES, self._depth)
        self._coming: deque[asyncio.Future[tuple[Recipe, bytes]]] = deque()

    async def until_ready(self) -> None:
        """Until the first bodies are there."""
        self._fill()
        await asyncio.gather(*list(self._coming)[: self._num_ready])

    async def take(self) -> tuple[Recipe, bytes]:
        """The next one, as soon as it is built."""
        self._fill()
        return await self._coming.popleft()

    def close(self) -> None:
        """Build nothing more. What was taken is still built."""
        for future in self._coming:
            future.cancel()
        self._coming.clear()

    def _fill(self) -> None:
        while len(self._coming) < max(1, self._depth) and (recipe := next(self._order, None)) is not None:
            loop = asyncio.get_running_loop()
            self._coming.append(loop.run_in_executor(self._builders, self._build, recipe))

    def _build(self, recipe: Recipe) -> tuple[Recipe, bytes]:
        return recipe, render(recipe, self._workload, self._model)


def _is_all_at_once(arrivals: Arrivals) -> bool:
    return isinstance(arrivals, OpenLoop) and arrivals.rate == float("inf")


@contextlib.contextmanager
def body_builders() -> Iterator[ThreadPoolExecutor]:
    """One core is left to the event loop."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(max(1, min(_MAX_BUILDERS, num_cores - 1)), thread_name_prefix="builder")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
