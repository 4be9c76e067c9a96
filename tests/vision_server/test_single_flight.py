"""One computation for many: everyone gets everything, nobody's leaving harms another, and all is given back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from common.service.errors import InternalError, Overloaded
from vision_server.single_flight import SingleFlight


class Source:
    """Yields 0, 1, ... as often as it is let, and counts how often it was started, and what was given back."""

    def __init__(self, length: int = 3) -> None:
        self.length = length
        self.steps = asyncio.Semaphore(0)
        self.num_started = 0
        self.num_cancelled = 0
        self.num_returned = 0
        self.error: Exception | None = None

    async def __call__(self, held: ExitStack) -> AsyncIterator[int]:
        self.num_started += 1
        held.callback(self._give_back)
        try:
            for number in range(self.length):
                await self.steps.acquire()
                if self.error is not None:
                    raise self.error
                yield number
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.release()

    def _give_back(self) -> None:
        self.num_returned += 1


@pytest.fixture
def flights() -> SingleFlight[int]:
    return SingleFlight()


async def ride(flights: SingleFlight[int], source: Source, key: str = "a") -> list[int]:
    async with asyncio.timeout(10), flights.board(key, source) as flight:
        return [item async for item in flight.items()]


async def test_all_who_board_get_everything_of_one_run(flights):
    source = Source()
    early = [asyncio.create_task(ride(flights, source)) for _ in range(3)]
    source.let(2)
    await asyncio.sleep(0.01)
    late = asyncio.create_task(ride(flights, source))
    await asyncio.sleep(0)
    assert "a" in flights
    source.let(1)
    assert [await task for task in (*early, late)] == [[0, 1, 2]] * 4
    assert (source.num_started, source.num_returned, len(flights)) == (1, 1, 0)


async def test_other_keys_fly_apart(flights):
    first, second = Source(1), Source(2)
    first.let(1)
    second.let(2)
    rides = await asyncio.gather(ride(flights, first, "a"), ride(flights, second, "b"))
    assert list(rides) == [[0], [0, 1]]


async def test_one_who_leaves_takes_nobody_along(flights):
    source = Source()
    leaving, staying = (asyncio.create_task(ride(flights, source)) for _ in range(2))
    source.let(1)
    await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert source.num_cancelled == 0
    source.let(2)
    assert await staying == [0, 1, 2]


async def test_the_last_who_leaves_ends_it(flights):
    source = Source()
    tasks = [asyncio.create_task(ride(flights, source)) for _ in range(2)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (source.num_cancelled, source.num_returned, len(flights)) == (1, 1, 0)


async def test_what_it_holds_is_held_while_somebody_is_aboard(flights):
    source = Source(1)
    source.let(1)
    async with flights.board("a", source) as flight:
        assert [item async for item in flight.items()] == [0]
        assert source.num_returned == 0
        async with flights.board("a", source) as same:
            assert same is flight
        assert source.num_returned == 0
    assert source.num_returned == 1


@pytest.mark.parametrize(("raised", "seen"), [(Overloaded("full"), Overloaded), (ValueError("0x7f"), InternalError)])
async def test_a_failure_reaches_everyone_and_the_next_one_starts_anew(flights, raised, seen):
    source = Source()
    source.error = raised
    async with flights.board("a", source) as flight:
        source.let(1)
        for _ in range(2):
            with pytest.raises(seen) as failure:
                [item async for item in flight.items()]
            assert "0x" not in failure.value.message
        assert "a" not in flights
        fresh = Source(1)
        fresh.let(1)
        assert await ride(flights, fresh) == [0]
    assert source.num_returned == fresh.num_returned == 1


async def test_a_passenger_who_is_cancelled_twice_leaves_nothing_behind():
    flights: SingleFlight[int] = SingleFlight()
    is_ending, may_end = asyncio.Event(), asyncio.Event()
    given_back: list[str] = []

    async def source(held: ExitStack) -> AsyncIterator[int]:
        held.callback(given_back.append, "place")
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            is_ending.set()
            await may_end.wait()

    async def travel() -> None:
        async with flights.board("key", source) as flight:
            async for _ in flight.items():
                pass

    passenger = asyncio.create_task(travel())
    await asyncio.sleep(0.01)
    passenger.cancel()
    await is_ending.wait()
    passenger.cancel()
    with pytest.raises(asyncio.CancelledError):
        await passenger
    assert given_back == []  # still in use
    may_end.set()
    async with asyncio.timeout(10):
        while not given_back:
            await asyncio.sleep(0)
    assert given_back == ["place"]
