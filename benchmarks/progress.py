"""The progress bar of a run: requests done, in flight, failed, per second. Nothing where nobody watches a terminal."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from benchmarks.runner import Progress

_REFRESH_SECONDS: Final = 0.25


class ProgressBar:
    """An observer of the runner. Drawn by a task of the event loop: a thread would delay the measured streams."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.asynccontextmanager
    async def watching(self, progress: Progress) -> AsyncIterator[None]:
        """Shows ``progress`` until the block ends."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=self._console, auto_refresh=False) as bar:
            drawing = asyncio.create_task(_draw(bar, progress))
            try:
                yield
            finally:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)


async def _draw(bar: Bar, progress: Progress) -> None:
    """One bar for each phase, one below the other."""
    shown: TaskID | None = None
    phase = ""
    try:
        while True:
            if progress.phase != phase:
                _finish(bar, shown)
                phase = progress.phase
                shown = bar.add_task(phase, total=None, state="")
            if shown is not None:  # nothing runs yet
                _update(bar, shown, progress)
                bar.refresh()
            await asyncio.sleep(_REFRESH_SECONDS)
    finally:
        _finish(bar, shown)
        bar.refresh()


def _finish(bar: Bar, task: TaskID | None) -> None:
    if task is not None:
        bar.update(task, state="done")
        bar.stop_task(task)


def _update(bar: Bar, task: TaskID, progress: Progress) -> None:
    elapsed = time.perf_counter() - progress.opened_at
    if elapsed <= 0:
        bar.update(task, state=f"warming up, {progress.num_in_flight} in flight")
        return
    if progress.is_draining:
        bar.update(task, state=f"waiting for the last {progress.num_in_flight}, {progress.num_failed} failed")
        return
    state = f"{progress.num_in_flight} in flight, {progress.num_failed} failed, {progress.num_done / elapsed:.1f}/s"
    total = progress.num_requests
    if total is None and progress.duration:  # ended by the clock: the bar shows seconds
        done = round(min(elapsed, progress.duration))
        bar.update(task, completed=done, total=round(progress.duration), state=f"s, {progress.num_done} done, {state}")
    else:
        bar.update(task, completed=progress.num_done, total=total, state=state)
