"""Bodies come in order and in bounded numbers, built before they are asked for."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import ahead
from benchmarks.ahead import Ahead, body_builders
from benchmarks.arrivals import ClosedLoop, OpenLoop
from benchmarks.plan import Source
from benchmarks.workload import Size, Workload, recipes, render
from tests.benchmarks.conftest import TEXT


@pytest.fixture
def builders():
    with body_builders() as pool:
        yield pool


def make(builders: ThreadPoolExecutor, workload: Workload = TEXT, number: int | None = None, arrivals=None) -> Ahead:
    source = Source("s", arrivals or ClosedLoop(1), workload, number)
    return Ahead(recipes(workload, 0), source, "nano", builders)


async def test_in_order_and_as_rendered(builders):
    bodies = make(builders)
    expected = list(itertools.islice(recipes(TEXT, 0), 200))
    taken = [await bodies.take() for _ in range(200)]
    bodies.close()
    assert taken == [(recipe, render(recipe, TEXT, "nano")) for recipe in expected]


async def test_no_more_than_fit_into_memory(builders, monkeypatch):
    monkeypatch.setattr(ahead, "_AHEAD_BYTES", 20 * 2**20)
    large = make(builders, Workload(((Size(1920, 1080), 1.0),)))
    await large.take()
    assert ahead._MIN_AHEAD - 1 <= len(large._coming) <= 60
    large.close()
    small = make(builders)
    await small.take()
    assert len(small._coming) == ahead._MAX_AHEAD - 1
    small.close()


async def test_ready_before_the_start(builders):
    """A steady load needs some, one that sends everything at once needs all."""
    for arrivals, number in ((ClosedLoop(1), ahead._READY_BODIES), (OpenLoop(float("inf")), 200)):
        bodies = make(builders, number=200, arrivals=arrivals)
        await bodies.until_ready()
        assert sum(future.done() for future in list(bodies._coming)[:number]) == number
        bodies.close()


async def test_a_trace_ends(builders):
    source = Source("s", ClosedLoop(1), TEXT)
    bodies = Ahead(itertools.islice(recipes(TEXT, 0), 2), source, "nano", builders)
    assert [(await bodies.take())[0].number for _ in range(2)] == [1, 2]
    assert not bodies._coming
