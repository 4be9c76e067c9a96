"""Servers that die, hang, restart or refuse: their images are encoded elsewhere, or a moment later. Nobody notices."""

import asyncio

import pytest

from common.service import metrics
from common.service.errors import InternalError, Overloaded, Unavailable
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, WORKER_STATE_STARTING
from router import fleet as fleets
from router import workers
from router.retry_budget import FLOOR
from tests.router.conftest import error_of, png, running_system, user
from tests.router.fakes import FakeVision, digest

COLORS = ("red", "blue", "green", "black", "white", "pink", "gray", "gold", "navy", "teal")


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


def ask(system, color: str = "red") -> "asyncio.Task[None]":
    """A request whose answer must be right."""

    async def asking() -> None:
        response = await system.chat(messages=[user(png(color), "?")])
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == f"user: [{digest(png(color))}] ?"

    return asyncio.create_task(asking())


def worker_of(system, vision: FakeVision) -> workers.VisionWorker:
    return next(each for each in system.router.fleet.vision if each.address == vision.address)


def hold(system) -> None:
    for vision in system.visions:
        vision.at_encode.is_open.clear()


def release(*visions: FakeVision) -> None:
    for vision in visions:
        vision.at_encode.is_open.set()


def detections(kind: str) -> float:
    return metrics.FAILURE_DETECTION_SECONDS.labels("vision", kind)._sum.get()


async def test_a_burst_that_was_on_a_dying_server_is_encoded_elsewhere():
    """Far more than the retry budget holds: what was lost is not what failed."""
    async with running_system(num_vision=2) as system:
        hold(system)
        asking = [ask(system, COLORS[index % len(COLORS)]) for index in range(6 * FLOOR)]
        await until(lambda: sum(len(vision.requests) for vision in system.visions) == len(asking))
        dying, peer = sorted(system.visions, key=lambda vision: -len(vision.requests))
        assert len(dying.requests) > 2 * FLOOR
        release(peer)
        await dying.stop()
        await asyncio.gather(*asking)
        assert system.router.fleet.budgets["vision"].try_retry(asyncio.get_running_loop().time())
        await system.until_idle()


async def test_a_lost_server_gets_nothing_before_its_loss_is_seen():
    """A call knows sooner than the status stream, or later: no second request may run into it."""
    async with running_system(num_vision=2) as system:
        hold(system)
        asking = ask(system)
        await until(lambda: any(vision.requests for vision in system.visions))
        dying, peer = sorted(system.visions, key=lambda vision: -len(vision.requests))
        release(peer)
        await dying.stop()
        await asking
        assert not worker_of(system, dying).is_usable
        assert not system.router.fleet.quarantine.is_suspect(dying.requests[0].image_hash)  # it survived on the peer


async def test_a_silent_server_is_lost_within_three_seconds():
    async with running_system(num_vision=2) as system:
        hold(system)
        asking = ask(system)
        await until(lambda: any(vision.requests for vision in system.visions))
        hung, peer = sorted(system.visions, key=lambda vision: -len(vision.requests))
        before = detections("heartbeat")
        hung.is_silent = True
        release(peer)
        await asking
        assert 2 < detections("heartbeat") - before < 4
        assert worker_of(system, hung).state_name == "lost"
        assert system.router.fleet.quarantine.is_suspect(hung.requests[0].image_hash) is False
        hung.is_silent = False
        release(hung)
        await system.until(lambda: worker_of(system, hung).is_usable)


async def test_a_stuck_server_is_as_good_as_lost_until_it_gets_on():
    async with running_system(num_vision=2) as system:
        hold(system)
        asking = ask(system)
        await until(lambda: any(vision.requests for vision in system.visions))
        stuck, peer = sorted(system.visions, key=lambda vision: -len(vision.requests))
        before, stalls = detections("progress"), metrics.WATCHDOG_STALLS.labels("vision")._value.get()
        stuck.is_stuck = True
        release(peer)
        await asking
        assert metrics.WATCHDOG_STALLS.labels("vision")._value.get() == stalls + 1
        assert worker_of(system, stuck).state_name == "stuck"
        assert 1.5 < detections("progress") - before < 5
        await ask(system)
        assert len(stuck.requests) == 1
        stuck.is_stuck = False
        await system.until(lambda: worker_of(system, stuck).is_usable)


async def test_idle_servers_need_no_progress(monkeypatch):
    monkeypatch.setattr(workers, "STUCK_STATUSES", 1)
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.is_stuck = True
            for _ in range(3):
                vision.change()
                await system.until(lambda: True)
        await asyncio.sleep(1.7)
        assert all(worker.is_usable for worker in system.router.fleet.vision)


async def test_the_last_server_gets_more_time(system, monkeypatch):
    monkeypatch.setattr(fleets, "LAST_STUCK_SECONDS", 3.5)
    system.vision.at_encode.is_open.clear()
    asking = ask(system)
    await until(lambda: system.vision.requests)
    system.vision.is_stuck = True
    (worker,) = system.router.fleet.vision
    await system.until(lambda: worker.has_no_progress)
    assert worker.is_usable
    await system.until(lambda: worker.is_stuck)
    system.vision.is_stuck = False
    release(system.vision)
    await asking


async def test_a_request_waits_for_a_server_that_restarts(system):
    """With one vision server: it dies with the image, and comes back as another process."""
    hold(system)
    asking = ask(system)
    await until(lambda: system.vision.requests)
    await system.vision.stop()
    await system.until(lambda: not system.router.fleet.has_vision)
    later = ask(system, "blue")  # comes while there is none
    system.vision.incarnation = b"another one 2345"
    release(system.vision)
    await asyncio.sleep(0.3)
    assert not asking.done() and not later.done()
    await system.vision.start()
    await asyncio.gather(asking, later)
    assert [request.attempt for request in system.vision.requests if request.image == png()] == [0, 1]


async def test_two_servers_restart_one_after_the_other_under_load():
    async with running_system(num_vision=2) as system:
        is_over = False
        num_answers = 0

        async def client(first: int) -> None:
            nonlocal num_answers
            while not is_over:
                await ask(system, COLORS[(first + num_answers) % len(COLORS)])
                num_answers += 1

        clients = [asyncio.create_task(client(index)) for index in range(4)]
        for vision in system.visions:
            vision.failures = [Unavailable("x", code="draining") for _ in range(2)]  # before its status says so
            await until(lambda vision=vision: not vision.failures or any(task.done() for task in clients))
            vision.change(state=WORKER_STATE_DRAINING)
            await system.until(lambda vision=vision: not worker_of(system, vision).is_usable)
            await vision.stop()
            vision.incarnation = vision.name.encode().ljust(16)
            vision.state = WORKER_STATE_STARTING
            await vision.start()
            await asyncio.sleep(0.2)
            vision.change(state=WORKER_STATE_READY)
            await system.until(lambda vision=vision: worker_of(system, vision).is_usable)
        is_over = True
        await asyncio.gather(*clients)
        assert num_answers > 4


async def test_nobody_waits_for_a_server_that_has_been_gone_for_long(system, monkeypatch):
    monkeypatch.setattr(fleets, "RETURN_SECONDS", 0.3)
    await system.vision.stop()
    await system.until(lambda: not system.router.fleet.has_vision)
    asking = system.chat(messages=[user(png())])
    response = await asking
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
    await asyncio.sleep(0.3)
    assert not system.router.fleet.may_have("vision")
    response = await system.chat(messages=[user(png())])
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"
    assert (await system.chat()).status_code == 200


async def test_a_deadline_ends_the_waiting(system):
    await system.vision.stop()
    await system.until(lambda: not system.router.fleet.has_vision)
    body = {"messages": [user(png())]}
    response = await system.http.post("/v1/chat/completions", json=body, headers={"x-dvd-deadline-ms": "300"})
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")


async def test_three_servers_that_fail_are_enough():
    async with running_system(num_vision=4) as system:
        for vision in system.visions:
            vision.failures = [InternalError("x")]
        response = await system.chat(messages=[user(png())])
        assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
        assert sum(len(vision.requests) for vision in system.visions) == 3


async def test_errors_of_the_living_are_repeated_within_the_budget():
    async with running_system(num_vision=2) as system:
        before = metrics.RETRY_BUDGET_EXHAUSTED.labels("vision")._value.get()
        for vision in system.visions:
            vision.failures = [Overloaded("full") for _ in range(100)]
        for _ in range(2 * FLOOR):
            response = await system.chat(messages=[user(png())])
            assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        # Every request asks one server; so many ask the other one, too.
        assert sum(len(vision.requests) for vision in system.visions) == 3 * FLOOR
        assert metrics.RETRY_BUDGET_EXHAUSTED.labels("vision")._value.get() - before >= FLOOR


async def test_why_a_server_cannot_is_not_told_to_clients():
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.failures = [Unavailable("x", code="transport_failed") for _ in range(4)]
        response = await system.chat(messages=[user(png())])
        assert (response.status_code, error_of(response)["code"]) == (503, "worker_unavailable")


async def test_a_connection_that_was_cut_is_no_death(system):
    """The same process answers again: nothing on it is suspect."""
    quarantine = system.router.fleet.quarantine
    quarantine.died_with([b"image"], system.vision.incarnation)
    await system.vision.stop()
    await system.until(lambda: not system.router.fleet.has_vision)
    assert quarantine.is_suspect(b"image")
    await system.vision.start()
    await system.until(lambda: system.router.fleet.has_vision)
    assert not quarantine.is_suspect(b"image")


async def test_what_comes_from_a_server_that_was_given_up_is_dropped():
    """Its reply was on the way when it was lost: the image has another server by then."""
    async with running_system(num_vision=2) as system:
        late = metrics.LATE_RESULTS.labels("old_incarnation")
        before = late._value.get()
        hold(system)
        asking = ask(system)
        await until(lambda: any(vision.requests for vision in system.visions))
        lost, peer = sorted(system.visions, key=lambda vision: -len(vision.requests))
        for opened in worker_of(system, lost)._calls.values():
            opened.lost = workers.ServerLost("restarted", opened.death)
        release(lost)
        await until(lambda: peer.requests)
        assert late._value.get() == before + 1
        release(peer)
        await asking
        assert [request.attempt for request in (*lost.requests, *peer.requests)] == [0, 1]


async def test_a_server_that_ends_by_itself_makes_nothing_suspect():
    """Its grace was over: what it had is encoded elsewhere, and was not the reason."""
    async with running_system(num_vision=2) as system:
        hold(system)
        asking = ask(system)
        await until(lambda: any(vision.requests for vision in system.visions))
        ending, peer = sorted(system.visions, key=lambda vision: -len(vision.requests))
        ending.change(state=WORKER_STATE_DRAINING)
        await system.until(lambda: worker_of(system, ending).state_name == "draining")
        await ending.stop()
        await until(lambda: peer.requests)
        assert not system.router.fleet.quarantine.has_suspects
        release(peer)
        await asking


@pytest.mark.parametrize("kind", ["reset", "heartbeat"])
async def test_series_say_how_old_the_last_sign_of_life_is(system, kind):
    before = metrics.FAILURE_DETECTION_SECONDS.labels("vision", kind)._sum.get()
    if kind == "reset":
        await system.vision.stop()
    else:
        system.vision.is_silent = True
    await system.until(lambda: not system.router.fleet.has_vision)
    assert metrics.FAILURE_DETECTION_SECONDS.labels("vision", kind)._sum.get() > before
    ages = [line for line in metrics.exposition("router").decode().splitlines() if "heartbeat_age_seconds{" in line]
    assert any(f'server="{system.vision.name}",tier="vision"' in line for line in ages)
