"""Regions of one buffer: none overlaps another, nobody waits forever, order is kept."""

import asyncio
import random

import pytest

from common.service.errors import TransportFailed
from common.transport.staging import ALIGNMENT, Staging

SIZE = 64 * ALIGNMENT


async def test_regions_never_overlap_and_all_of_it_comes_back():
    """A few hundred random regions, taken by tasks that hold each for some turns of the loop."""
    random.seed(7)
    staging = Staging(SIZE)
    owners = bytearray(SIZE)
    num_held = 0

    async def hold(num_bytes: int) -> None:
        nonlocal num_held
        start = await staging.acquire(num_bytes)
        num_held += 1
        assert start % ALIGNMENT == 0 and start + num_bytes <= SIZE
        assert not any(owners[start : start + num_bytes])
        owners[start : start + num_bytes] = b"x" * num_bytes
        for _ in range(random.randrange(5)):
            await asyncio.sleep(0)
        owners[start : start + num_bytes] = bytes(num_bytes)
        staging.release(start, num_bytes)

    sizes = [random.choice((0, 1, 63, 64, 65, 1000, SIZE // 2, SIZE)) for _ in range(500)]
    await asyncio.gather(*(hold(num_bytes) for num_bytes in sizes))
    assert (num_held, staging.num_free_bytes) == (500, SIZE)


async def test_a_large_region_is_not_overtaken_by_small_ones():
    staging = Staging(SIZE)
    held = await staging.acquire(1)
    large = asyncio.create_task(staging.acquire(SIZE))
    await asyncio.sleep(0)
    small = asyncio.create_task(staging.acquire(1))
    await asyncio.sleep(0)
    assert not large.done() and not small.done()

    staging.release(held, 1)
    start = await large
    assert not small.done()
    staging.release(start, SIZE)
    await small


async def test_who_gives_up_leaves_the_line_and_takes_nothing():
    staging = Staging(SIZE)
    start = await staging.acquire(SIZE)
    first, second = (asyncio.create_task(staging.acquire(num_bytes)) for num_bytes in (SIZE, 1))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    staging.release(start, SIZE)
    staging.release(await second, 1)

    start = await staging.acquire(SIZE)
    granted_then_cancelled = asyncio.create_task(staging.acquire(1))
    await asyncio.sleep(0)
    staging.release(start, SIZE)
    granted_then_cancelled.cancel()
    await asyncio.wait({granted_then_cancelled})
    assert staging.num_free_bytes == SIZE


async def test_closing_fails_whoever_waits():
    staging = Staging(SIZE)
    await staging.acquire(SIZE)
    waiting = asyncio.create_task(staging.acquire(1))
    await asyncio.sleep(0)
    staging.close("over")
    with pytest.raises(TransportFailed, match="over"):
        await waiting
