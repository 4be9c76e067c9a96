"""The bar says where the run is; without a terminal it says nothing."""

import asyncio
import io
import time

import pytest
from rich.console import Console

from benchmarks import progress as bar
from benchmarks.progress import ProgressBar
from benchmarks.runner import Progress
from tests.benchmarks.conftest import DEADLINE


def running(**values) -> Progress:
    return Progress(phase="load", opened_at=time.perf_counter() - 10, num_done=3, num_in_flight=2, **values)


async def drawn(progress: Progress, *expected: str) -> None:
    """Wait until all that is expected stands on the terminal."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    async with asyncio.timeout(DEADLINE), ProgressBar(console).watching(progress):
        while not all(words in screen.getvalue() for words in expected):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_requests": 8, "num_failed": 1}, ("load", "3/8", "2 in flight, 1 failed", "/s")),
        ({"duration": 60.0}, ("/60", "3 done, 2 in flight")),
        ({"num_requests": 8, "is_draining": True}, ("waiting for the last 2",)),
    ],
)
async def test_what_is_shown(values, expected):
    await drawn(running(**values), *expected)


async def test_the_warm_up():
    await drawn(Progress(phase="load", opened_at=time.perf_counter() + 60, num_in_flight=4), "warming up, 4 in flight")


async def test_the_next_phase_gets_a_bar_of_its_own(monkeypatch):
    monkeypatch.setattr(bar, "_REFRESH_SECONDS", 0.01)
    progress = running(num_requests=8)
    screen = io.StringIO()
    async with asyncio.timeout(DEADLINE), ProgressBar(Console(file=screen, force_terminal=True)).watching(progress):
        while "load" not in screen.getvalue():
            await asyncio.sleep(0.01)
        progress.phase = "another"
        while "another" not in screen.getvalue():
            await asyncio.sleep(0.01)


async def test_no_terminal():
    screen = io.StringIO()
    async with ProgressBar(Console(file=screen)).watching(running(num_requests=8)):
        await asyncio.sleep(0)
    assert screen.getvalue() == ""
