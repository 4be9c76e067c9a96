"""Servers that come, go, come back and restart while requests run: what is open there ends well, nothing is left."""

import asyncio
import json
from functools import partial

from common.service import metrics
from protos.status_pb2 import WORKER_STATE_READY, WORKER_STATE_STARTING
from router import fleet
from router.fleet import Fleet, Reminder
from tests.router.conftest import png, running_system, user
from tests.router.fakes import FakeLanguage, digest


def test_a_reminder_is_rare():
    reminder = Reminder(first=3, every=60)
    due = [now for now in range(200) if reminder.is_due(now)]
    assert due == [3, 63, 123, 183]
    reminder.reset()
    assert [now for now in range(300, 400) if reminder.is_due(now)] == [303, 363]


def addresses(servers):
    return [server.address for server in servers]


async def ask(system, color="red") -> str:
    """An image in, its digest out."""
    response = await system.chat(messages=[user(png(color))])
    assert response.status_code == 200
    return response.json()["choices"][0]["message"]["content"]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_server_that_comes_gets_work(tmp_path):
    """By file, while the router runs; named twice it is still one server."""
    path = tmp_path / "vision"
    async with running_system(wait=False, vision=[f"file:{path}"]) as system:
        await system.until(lambda: system.router.fleet.has_language)
        assert (await system.http.get("/health")).status_code == 503
        path.write_text(f"{system.vision.address}\n{system.vision.address}\n")
        await system.until(lambda: system.router.fleet.is_ready)
        assert (await system.http.get("/health")).status_code == 200
        assert addresses(system.router.fleet.vision) == [system.vision.address]
        assert digest(png()) in await ask(system)


async def test_a_vision_server_that_goes_finishes_what_it_has():
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        asking = asyncio.create_task(ask(system))
        await until(lambda: any(vision.requests for vision in system.visions))
        going, staying = sorted(system.visions, key=lambda vision: -len(vision.requests))
        system.router.fleet.set_vision([staying.address])
        staying.at_encode.is_open.set()
        for color in ("blue", "green", "yellow"):
            await ask(system, color)
        assert len(going.requests) == 1
        assert going.num_watching == 1  # it is still followed: if it died its call would be repeated elsewhere
        assert {worker.state_name for worker in system.router.fleet.vision} == {"ready", "leaving"}
        going.at_encode.is_open.set()
        assert digest(png()) in await asking
        await system.until(lambda: addresses(system.router.fleet.vision) == [staying.address])
        await until(lambda: going.num_watching == 0)
        assert [len(vision.requests) for vision in (going, staying)] == [1, 3]


async def test_a_language_server_that_goes_finishes_its_streams():
    async with running_system(num_language=2) as system:
        for language in system.languages:
            language.at_token.closes_after = 1
        body = {"messages": [user("a b c")], "stream": True}
        async with system.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            going, staying = sorted(system.languages, key=lambda language: -len(language.requests))
            system.router.fleet.set_language([staying.address])
            staying.at_token.closes_after = None
            assert (await system.chat()).status_code == 200
            going.at_token.is_open.set()
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert [len(language.requests) for language in (going, staying)] == [1, 1]
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
        await until(lambda: going.num_watching == 0)


async def test_who_is_replaced_works_until_its_successor_is_ready():
    """Otherwise there is nobody for as long as it takes to get in touch with the new one."""
    async with running_system(num_vision=2, num_language=2) as system:
        known = system.router.fleet
        for _, new in (system.visions, system.languages):
            new.change(state=WORKER_STATE_STARTING)
        await system.until(lambda: [worker.is_usable for worker in known.workers].count(True) == 2)
        (old_vision, new_vision), (old_language, new_language) = system.visions, system.languages
        known.set_vision([new_vision.address])
        known.set_language([new_language.address])
        assert digest(png()) in await ask(system)
        assert [len(server.requests) for server in (old_vision, new_vision)] == [1, 0]
        new_vision.change(state=WORKER_STATE_READY)
        new_language.change(state=WORKER_STATE_READY)
        await system.until(lambda: addresses(known.workers) == [new_vision.address, new_language.address])
        await ask(system, "blue")
        assert [len(server.requests) for server in (old_vision, new_vision)] == [1, 1]
        assert [len(server.requests) for server in (old_language, new_language)] == [1, 1]


async def test_a_list_may_change_completely_without_a_gap():
    async with running_system(num_vision=2, num_language=2) as system:
        known = system.router.fleet
        for vision, language in zip(system.visions * 10, system.languages * 10, strict=True):
            known.set_vision([vision.address])
            await ask(system)
            known.set_language([language.address])
            await ask(system)


async def test_nobody_waits_for_ever_for_a_successor(monkeypatch, unused_tcp_port):
    monkeypatch.setattr(fleet, "_STAND_IN_SECONDS", 0.05)
    async with running_system() as system:
        system.router.fleet.set_vision([f"127.0.0.1:{unused_tcp_port}"])
        assert system.router.fleet.has_vision
        await system.until(lambda: system.vision.address not in addresses(system.router.fleet.vision))
        assert not system.router.fleet.has_vision


async def test_nobody_stands_in_where_nobody_is_listed(unused_tcp_port):
    async with running_system() as system:
        system.router.fleet.set_vision([f"127.0.0.1:{unused_tcp_port}"])
        assert system.router.fleet.has_vision
        system.router.fleet.set_vision([])
        assert not system.router.fleet.has_vision


async def test_a_server_that_comes_back_before_its_end_is_the_same_one(system):
    gate = system.language.at_token
    gate.is_open.clear()
    first = asyncio.create_task(system.chat())
    await gate.wait_for(lambda gate: gate.num_entered == 1)
    (worker,) = system.router.fleet.language
    for _ in range(3):
        system.router.fleet.set_language([])
        assert (await system.chat()).status_code == 503
        system.router.fleet.set_language([system.language.address])
    second = asyncio.create_task(system.chat())
    await gate.wait_for(lambda gate: gate.num_entered == 2)
    gate.is_open.set()
    assert [response.status_code for response in await asyncio.gather(first, second)] == [200, 200]
    assert system.router.fleet.language == [worker]
    assert system.language.num_watching == 1


async def test_a_server_that_comes_back_after_its_end_is_a_new_one(system):
    (worker,) = system.router.fleet.vision
    system.router.fleet.set_vision([])
    await system.until(lambda: system.router.fleet.vision == [])
    system.router.fleet.set_vision([system.vision.address])
    await system.until(lambda: system.router.fleet.is_ready)
    assert system.router.fleet.vision != [worker]
    await ask(system)


async def test_a_server_that_dies_while_it_leaves_costs_nobody_anything():
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        asking = asyncio.create_task(ask(system))
        await until(lambda: any(vision.requests for vision in system.visions))
        going, staying = sorted(system.visions, key=lambda vision: -len(vision.requests))
        system.router.fleet.set_vision([staying.address])
        await going.stop()
        staying.at_encode.is_open.set()
        assert digest(png()) in await asking
        await system.until(lambda: addresses(system.router.fleet.vision) == [staying.address])


async def test_leaving_takes_no_longer_than_a_request_may(monkeypatch):
    async with running_system(num_vision=2) as system:
        monkeypatch.setattr(system.router.fleet, "_leave_timeout", 0.05)
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        asking = asyncio.create_task(ask(system))
        await until(lambda: any(vision.requests for vision in system.visions))
        going, staying = sorted(system.visions, key=lambda vision: -len(vision.requests))
        staying.at_encode.is_open.set()
        system.router.fleet.set_vision([staying.address])
        assert digest(png()) in await asking  # cut off there, repeated here
        await system.until(lambda: addresses(system.router.fleet.vision) == [staying.address])
        await going.at_encode.wait_for(lambda gate: gate.num_cancelled == 1)


async def test_closing_while_a_server_leaves():
    async with running_system() as system:
        system.vision.at_encode.is_open.clear()
        asking = asyncio.create_task(ask(system))
        await system.vision.at_encode.wait_for(lambda gate: gate.num_entered == 1)
        system.router.fleet.set_vision([])
        await asyncio.sleep(0)
        await system.router.fleet.close()
        await until(lambda: system.vision.num_watching == 0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_a_restarted_server_owes_nothing():
    """Another incarnation at the same address: what was open on the last one is lost at once, and weighs nothing."""
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        asking = asyncio.create_task(ask(system))
        await until(lambda: any(vision.requests for vision in system.visions))
        restarted, other = sorted(system.visions, key=lambda vision: -len(vision.requests))
        (worker,) = [each for each in system.router.fleet.vision if each.address == restarted.address]
        assert worker.load > 0
        other.at_encode.is_open.set()
        restarted.change(incarnation=b"another one 2345")
        assert digest(png()) in await asking
        assert (worker.load, worker.num_calls, worker.is_usable) == (0, 0, True)


async def test_series_of_servers_that_left_are_gone():
    async with running_system(num_vision=2) as system:
        for color in ("red", "blue", "green", "yellow", "black", "white", "pink"):
            await ask(system, color)
        going, staying = system.visions
        text = (await system.http.get("/metrics")).text
        assert f'server="{going.name}"' in text
        assert 'state="leaving",tier="vision"} 0.0' in text
        system.router.fleet.set_vision([staying.address])
        assert 'state="leaving",tier="vision"} 1.0' in metrics.exposition("router").decode()
        await system.until(lambda: addresses(system.router.fleet.vision) == [staying.address])
        text = (await system.http.get("/metrics")).text
        assert f'server="{going.name}"' not in text
        assert f'server="{staying.name}"' in text
        staying.change(name="renamed")
        await system.until(lambda: system.router.fleet.vision[0].name == "renamed")
        await ask(system)
        text = (await system.http.get("/metrics")).text
        assert f'server="{staying.name}"' in text
        assert 'server="vision-1"' not in text


async def test_namesakes_share_their_series():
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.change(name="vision-0")
        await system.until(lambda: {worker.name for worker in system.router.fleet.vision} == {"vision-0"})
        await ask(system)
        system.router.fleet.set_vision([system.visions[0].address])
        await system.until(lambda: len(system.router.fleet.vision) == 1)
        assert 'server="vision-0"' in (await system.http.get("/metrics")).text


async def test_who_leaves_has_no_vote():
    """Another checkpoint is taken up as soon as the servers of the last one are no longer listed."""
    async with running_system(num_vision=2) as system:
        new = system.visions[1]
        new.change(fingerprint=b"n" * 16)
        await system.until(lambda: system.router.fleet.vision[1].is_refused)
        system.language.at_token.is_open.clear()
        running = asyncio.create_task(system.chat())
        await system.language.at_token.wait_for(lambda gate: gate.num_entered == 1)
        system.router.fleet.set_language([])
        system.router.fleet.set_vision([new.address])
        await system.until(lambda: system.router.fleet.has_vision)
        assert system.router.fleet.fingerprint == b"n" * 16
        system.language.at_token.is_open.set()
        assert (await running).status_code == 200


async def test_a_server_nobody_hears_of_is_said_to_be_missing(caplog, monkeypatch, unused_tcp_port):
    monkeypatch.setattr(fleet, "Reminder", partial(Reminder, first=0))
    language = FakeLanguage()
    await language.start()
    known = Fleet()
    free = f"127.0.0.1:{unused_tcp_port}"
    known.set_vision([free, "unix:/no/such.sock", "no-such-host.invalid:9001", language.address])
    await until(lambda: caplog.text.count("waiting for vision server") == 4)
    assert f"waiting for vision server {free}: cannot be reached (connection refused)" in caplog.text
    assert "waiting for vision server unix:/no/such.sock: cannot be reached (no such socket)" in caplog.text
    assert "waiting for vision server no-such-host.invalid:9001: cannot be reached (its name has no" in caplog.text
    assert f"waiting for vision server {language.address}: is not a vision server" in caplog.text
    assert not known.is_ready
    await known.close()
    await language.stop()


async def test_a_watcher_that_dies_takes_its_server_out(system, monkeypatch, caplog):
    def broken(worker, status):
        raise RuntimeError("a bug")

    monkeypatch.setattr(system.router.fleet, "_update", broken)
    system.vision.change()
    await system.until(lambda: not system.router.fleet.has_vision)
    assert "is not followed any more" in caplog.text
