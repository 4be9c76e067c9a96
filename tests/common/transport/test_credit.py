"""Byte credit: bounded, first come first served, and never lost, whoever gives up when."""

import asyncio

import pytest

from common.service import metrics
from common.service.errors import ConfigError, TransportFailed
from common.transport.sender import Credit, TransportLimits

LIMITS = TransportLimits(max_frame_bytes=1000, max_inflight_bytes=1000, max_inflight_frames=4)


async def start(*waits) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.sleep(0)
    return tasks


async def test_a_large_frame_is_not_overtaken_by_small_ones():
    credit = Credit("zmq", LIMITS)
    await credit.acquire(600)
    large, small = await start(credit.acquire(900), credit.acquire(10))
    assert not large.done() and not small.done()
    credit.release(600)
    await asyncio.gather(large, small)
    assert credit.inflight_bytes == 910


async def test_a_waiter_that_leaves_lets_the_next_one_through():
    credit = Credit("zmq", LIMITS)
    await credit.acquire(600)
    large, small = await start(credit.acquire(900), credit.acquire(10))
    large.cancel()
    await asyncio.wait({large})
    await small
    assert credit.inflight_bytes == 610


async def test_credit_granted_to_one_who_just_left_comes_back():
    credit = Credit("zmq", LIMITS)
    await credit.acquire(1000)
    (waiter,) = await start(credit.acquire(500))
    credit.release(1000)  # grants, but the waiter has not run yet
    waiter.cancel()
    await asyncio.wait({waiter})
    assert waiter.cancelled()
    assert (credit.inflight_bytes, credit.inflight_frames) == (0, 0)


async def test_frames_are_bounded_as_well():
    credit = Credit("zmq", LIMITS)
    for _ in range(4):
        await credit.acquire(1)
    (waiter,) = await start(credit.acquire(1))
    assert not waiter.done()
    credit.release(1)
    await waiter


async def test_close_fails_waiters_and_takes_everything_off_the_gauge():
    gauge = metrics.TRANSFER_INFLIGHT_BYTES.labels("zmq", "send")
    before = gauge._value.get()
    credit = Credit("zmq", LIMITS)
    await credit.acquire(800)
    waiting = await start(credit.acquire(800), credit.acquire(800))
    assert gauge._value.get() == before + 800
    credit.close("gone")
    assert gauge._value.get() == before
    for waiter in waiting:
        with pytest.raises(TransportFailed, match="gone"):
            await waiter
    with pytest.raises(TransportFailed, match="gone"):
        await credit.acquire(1)
    credit.release(800)  # too late to matter
    assert gauge._value.get() == before


@pytest.mark.parametrize("frame, inflight", [(0, 100), (200, 100), (10, 1000)])
def test_a_frame_that_could_never_be_sent_is_a_config_error(frame: int, inflight: int):
    with pytest.raises(ConfigError):
        TransportLimits(max_frame_bytes=frame, max_inflight_bytes=inflight)
