"""An encode that takes unusually long is begun a second time, on an idle server, within the budget."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.service import metrics
from common.service.errors import InternalError
from protos.vision_pb2 import ProbeRequest
from router.hedging import MIN_SAMPLES, EncodeTimes
from router.vision_calls import call_vision
from tests.router.conftest import png, running_system, user
from tests.router.fakes import digest


def test_too_few_times_say_nothing():
    times = EncodeTimes(0.95)
    for _ in range(MIN_SAMPLES - 1):
        times.observe(1, 0.1)
    assert times.patience(1) is None
    times.observe(1, 0.1)
    assert times.patience(1) == 0.1


def test_images_are_compared_with_images_of_their_size():
    times = EncodeTimes(0.95)
    for _ in range(MIN_SAMPLES):
        times.observe(1, 0.1)
        times.observe(13, 1.0)
    assert (times.patience(1), times.patience(8), times.patience(2)) == (0.1, 1.0, None)


def test_it_may_be_switched_off():
    times = EncodeTimes(0.0)
    for _ in range(MIN_SAMPLES):
        times.observe(1, 0.1)
    assert times.patience(1) is None


def test_old_times_are_forgotten():
    times = EncodeTimes(0.95)
    for seconds in [5.0] * 100 + [0.1] * 300:
        times.observe(1, seconds)
    assert times.patience(1) == 0.1


@given(st.lists(st.floats(0, 100), min_size=MIN_SAMPLES, max_size=200), st.floats(0.5, 0.99))
def test_as_few_as_asked_for_take_longer(seconds, quantile):
    times = EncodeTimes(quantile)
    for each in seconds:
        times.observe(4, each)
    patience = times.patience(4)
    assert patience is not None
    assert sum(each > patience for each in seconds) <= (1 - quantile) * len(seconds) + 1e-6


def counted(outcome: str) -> float:
    return metrics.HEDGES.labels(outcome)._value.get()


def know_times(system, seconds: float = 0.05) -> None:
    for _ in range(MIN_SAMPLES):
        system.router.fleet.encode_times.observe(1, seconds)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def busy_and_idle(system):
    """Who has the only image, and who has nothing."""
    await until(lambda: any(vision.requests for vision in system.visions))
    return sorted(system.visions, key=lambda vision: -len(vision.requests))


async def begin(system):
    for vision in system.visions:
        vision.at_encode.is_open.clear()
    asking = asyncio.create_task(system.chat(messages=[user(png())]))
    slow, peer = await busy_and_idle(system)
    return asking, slow, peer


@pytest.mark.parametrize("winner", ["won", "lost"])
async def test_two_work_and_the_first_one_wins(winner):
    async with running_system(num_vision=2) as system:
        know_times(system)
        before = counted(winner)
        asking, slow, peer = await begin(system)
        await until(lambda: peer.requests)
        assert [request.attempt for request in (*slow.requests, *peer.requests)] == [0, 1]
        first, second = (peer, slow) if winner == "won" else (slow, peer)
        first.at_encode.is_open.set()
        response = await asking
        assert response.json()["choices"][0]["message"]["content"] == f"user: [{digest(png())}]"
        await second.at_encode.wait_for(lambda gate: gate.num_cancelled == 1)
        assert counted(winner) == before + 1
        await system.until_idle()
        assert all(worker.num_calls == 0 and worker.load == 0 for worker in system.router.fleet.vision)


async def test_a_failing_hedge_costs_nothing():
    async with running_system(num_vision=2) as system:
        know_times(system)
        asking, slow, peer = await begin(system)
        peer.failures = [InternalError("x")]
        peer.at_encode.is_open.set()
        await until(lambda: peer.at_encode.num_passed == 1)
        slow.at_encode.is_open.set()
        assert (await asking).status_code == 200
        assert [len(vision.requests) for vision in (slow, peer)] == [1, 1]


async def test_a_server_that_dies_while_two_work_costs_nothing():
    async with running_system(num_vision=2) as system:
        know_times(system)
        asking, slow, peer = await begin(system)
        await until(lambda: peer.requests)
        await slow.stop()
        peer.at_encode.is_open.set()
        assert (await asking).status_code == 200
        assert len(peer.requests) == 1


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
async def test_what_ends_at_once_is_told_apart(failing):
    async with running_system(num_vision=2) as system:
        know_times(system)
        ends, begun = asyncio.Event(), []

        async def call(vision, attempt: int) -> int:
            begun.append(vision)
            with vision._open(vision._stub.Probe(ProbeRequest()), 4):
                await ends.wait()
            if attempt in failing:
                raise InternalError(f"{attempt}")
            return attempt

        working = asyncio.create_task(
            call_vision(system.router.fleet, bytes(32), call, param="x", num_tiles=1, is_hedged=True)
        )
        await until(lambda: len(begun) == 2)
        ends.set()
        if len(failing) == 1:
            assert await working == 1 - failing[0]
        else:
            with pytest.raises(InternalError):
                await working
        assert len(begun) == 2


async def test_no_hedge_on_a_server_that_has_work_of_its_own():
    async with running_system(num_vision=2) as system:
        before = counted("no_peer")
        know_times(system, 1.0)  # for both to be sent
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        asking = [asyncio.create_task(system.chat(messages=[user(png(color))])) for color in ("red", "blue")]
        await until(lambda: counted("no_peer") == before + 2)
        assert [len(vision.requests) for vision in system.visions] == [1, 1]
        for vision in system.visions:
            vision.at_encode.is_open.set()
        assert {response.status_code for response in await asyncio.gather(*asking)} == {200}


async def test_no_hedge_beyond_the_budget():
    async with running_system(num_vision=2) as system:
        know_times(system)
        budget, before = system.router.fleet.budgets["vision"], counted("no_budget")
        while budget.try_hedge(asyncio.get_running_loop().time()):
            pass
        asking, slow, peer = await begin(system)
        await until(lambda: counted("no_budget") == before + 1)
        slow.at_encode.is_open.set()
        assert (await asking).status_code == 200
        assert peer.requests == []


async def test_a_client_that_leaves_ends_both():
    async with running_system(num_vision=2) as system:
        know_times(system)
        asking, slow, peer = await begin(system)
        await until(lambda: peer.requests)
        asking.cancel()
        for vision in (slow, peer):
            await vision.at_encode.wait_for(lambda gate: gate.num_cancelled == 1)
        await system.until_idle()
        assert all(worker.load == 0 for worker in system.router.fleet.workers)


async def test_off_means_off():
    async with running_system(num_vision=2, hedge_quantile=0) as system:
        know_times(system)
        asking, slow, peer = await begin(system)
        await asyncio.sleep(0.3)
        slow.at_encode.is_open.set()
        assert (await asking).status_code == 200
        assert peer.requests == []
