"""Servers that die, hang or refuse, and clients that leave: an answer or a status, never a hang, nothing left."""

import asyncio
import json

import httpx
import pytest

from common.service import metrics
from common.service.errors import InternalError, Overloaded, Unavailable
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, WORKER_STATE_STARTING
from tests.router.conftest import CHAT, error_of, png, running_system, user
from tests.router.fakes import digest


def num_dropped() -> float:
    (family,) = metrics.SLOW_READERS_DROPPED.collect()
    return family.samples[0].value


async def leave(system, **body) -> None:
    """Begin a request and close the connection while it runs."""
    request = asyncio.create_task(system.chat(**body))
    await body_gate(system, body).wait_for(lambda gate: gate.num_entered > 0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


def body_gate(system, body):
    held = [gate for gate in gates(system) if not gate.is_open.is_set()]
    return held[0]


def gates(system):
    for language in system.languages:
        yield language.at_admission
        yield language.at_token
    for vision in system.visions:
        yield vision.at_encode


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_before_admission(system, stream):
    gate = system.language.at_admission
    gate.is_open.clear()
    await leave(system, stream=stream)
    await gate.wait_for(lambda gate: gate.num_cancelled == 1)
    await system.until_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_during_encode(system, stream):
    gate = system.vision.at_encode
    gate.is_open.clear()
    await leave(system, messages=[user(png("red"), png("blue"))], stream=stream)
    await gate.wait_for(lambda gate: gate.num_cancelled == gate.num_entered > 0)
    assert gate.num_passed == 0
    await system.until_idle()
    assert all(worker.load == 0 for worker in system.router.fleet.workers)


async def test_client_leaves_before_the_first_token(system):
    gate = system.language.at_token
    gate.is_open.clear()
    await leave(system)
    await gate.wait_for(lambda gate: gate.num_cancelled == 1)
    await system.until_idle()


async def test_client_leaves_in_the_middle_of_a_stream(system):
    gate = system.language.at_token
    gate.closes_after = 1
    async with (
        httpx.AsyncClient(base_url=system.url, timeout=20) as client,
        client.stream("POST", CHAT, json={"messages": [user("a b c")], "stream": True}) as response,
    ):
        assert "assistant" in await anext(response.aiter_lines())
    await gate.wait_for(lambda gate: gate.num_cancelled == 1)
    await system.until_idle()


async def test_client_leaves_while_sending_its_body(system):
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(system.url).port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    while not system.router.admission.held_bytes:
        await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()
    await system.until_idle()
    assert system.language.requests == []
    assert reader.at_eof() or await reader.read() == b""


def unread_bytes() -> float:
    (family,) = metrics.STREAM_BUFFER_BYTES.collect()
    return family.samples[0].value


async def test_a_client_that_does_not_read_is_dropped():
    """The router buffers little for it, waits a while, and then frees everything."""
    async with running_system(slow_reader_timeout=0.3) as system:
        dropped_before = num_dropped()
        system.language.words = ["x" * 100_000] * 1000
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(system.url).port, limit=1000)
        body = json.dumps({"messages": [user("x")], "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        await system.language.at_token.wait_for(lambda gate: gate.num_entered > 0)
        await system.until(lambda: unread_bytes() > 50_000)
        await system.until_idle()
        assert system.language.at_token.num_passed < 1000
        assert num_dropped() == dropped_before + 1
        writer.transport.abort()
        assert reader.exception() is None


async def test_lost_vision_server_is_replaced():
    """Zero failed requests when one of two vision servers dies while it encodes."""
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        request = asyncio.create_task(system.chat(messages=[user(png(), "?")]))
        first = await first_entered(system)
        await first.stop()
        other = next(vision for vision in system.visions if vision is not first)
        other.at_encode.is_open.set()
        response = await request
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == f"user: [{digest(png())}] ?"
        assert [call.attempt for call in (*first.requests, *other.requests)] == [0, 1]
        await system.until_idle()


async def first_entered(system):
    async with asyncio.timeout(10):
        while True:
            for vision in system.visions:
                if vision.at_encode.num_entered:
                    return vision
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("failure", [Unavailable("x"), Overloaded("x"), InternalError("x")])
async def test_refusing_vision_server_is_replaced(failure):
    async with running_system(num_vision=3) as system:
        for vision in system.visions:
            vision.failures = [failure]
        system.visions[2].failures = []
        response = await system.chat(messages=[user(png())])
        assert response.status_code == 200
        await system.until_idle()


async def test_all_vision_servers_refuse():
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.failures = [Overloaded("full")]
        response = await system.chat(messages=[user(png())])
        assert response.status_code == 503
        assert error_of(response)["code"] == "overloaded"
        await system.until_idle()


async def test_lost_language_server_is_replaced_before_the_first_token():
    async with running_system(num_language=2) as system:
        for language in system.languages:
            language.at_token.is_open.clear()
        request = asyncio.create_task(system.chat(messages=[user(png(), "?")], stream=True))
        async with asyncio.timeout(10):
            while not (busy := [language for language in system.languages if language.at_token.num_entered]):
                await asyncio.sleep(0.01)
        await busy[0].stop()
        for language in system.languages:
            language.at_token.is_open.set()
        response = await request
        assert response.status_code == 200
        assert digest(png()) in response.text
        assert response.text.endswith("data: [DONE]\n\n")
        await system.until_idle()


@pytest.fixture
def impatience(monkeypatch):
    """Nobody waits for a lost server to come back."""
    monkeypatch.setattr("router.language_search.PATIENCE_SECONDS", 0.2)


async def test_language_servers_that_are_all_lost_after_the_first_token_are_an_error_event(impatience):
    async with running_system(num_language=2) as system:
        for language in system.languages:
            language.break_after = 1
        response = await system.chat(stream=True)
        assert response.status_code == 200
        blocks = response.text.strip().split("\n\n")
        assert json.loads(blocks[-2].removeprefix("event: error\ndata: "))["error"]["code"] == "worker_unavailable"
        await system.until_idle()


async def test_the_only_language_server_is_lost(system, impatience):
    system.language.break_after = 0
    response = await system.chat()
    assert response.status_code == 503
    assert error_of(response)["code"] == "worker_unavailable"
    await system.until_idle()


async def test_a_silent_server_loses_its_calls(monkeypatch, impatience):
    """A hang: the connection lives, no status comes. Its calls end now, not at their deadlines."""
    monkeypatch.setattr("router.workers.HEARTBEAT_TIMEOUT_SECONDS", 1.5)
    async with running_system() as system:
        system.language.at_token.is_open.clear()
        request = asyncio.create_task(system.chat())
        await system.language.at_token.wait_for(lambda gate: gate.num_entered == 1)
        system.language.is_silent = True
        response = await request
        assert response.status_code == 503
        assert error_of(response)["code"] == "worker_unavailable"
        assert (await system.http.get("/health")).status_code == 503
        await system.until_idle()


async def test_health_follows_the_servers(system):
    assert (await system.http.get("/health")).status_code == 200
    for worker in (system.language, system.vision):
        for state in (WORKER_STATE_STARTING, WORKER_STATE_DRAINING):
            worker.change(state=state)
            await system.until(lambda: not system.router.fleet.is_ready)
            response = await system.http.get("/health")
            assert (response.status_code, response.content) == (503, b"")
            assert (await system.http.get("/live")).status_code == 200
        worker.change(state=WORKER_STATE_READY)
        await system.until(lambda: system.router.fleet.is_ready)
    assert (await system.http.get("/health")).status_code == 200


async def test_text_needs_no_vision_server(system, monkeypatch):
    monkeypatch.setattr("router.fleet.RETURN_SECONDS", 0)
    system.vision.change(state=WORKER_STATE_DRAINING)
    await system.until(lambda: not system.router.fleet.has_vision)
    assert (await system.chat()).status_code == 200
    refused = await system.chat(messages=[user(png())])
    assert (refused.status_code, error_of(refused)["code"]) == (503, "not_ready")


async def test_before_any_server_is_there():
    async with running_system(start_workers=False) as system:
        assert (await system.http.get("/health")).status_code == 503
        assert (await system.http.get("/v1/models")).json() == {"object": "list", "data": []}
        response = await system.chat(model="whatever")
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
        for worker in (system.language, system.vision):
            await worker.start()
        await system.until(lambda: system.router.fleet.is_ready)
        assert (await system.chat()).status_code == 200


async def test_a_server_comes_back(system):
    await system.language.stop()
    await system.until(lambda: not system.router.fleet.has_language)
    assert (await system.http.get("/v1/models")).json()["data"][0]["id"] == "fake"
    await system.language.start()
    await system.until(lambda: system.router.fleet.has_language)
    assert (await system.chat()).status_code == 200


async def test_another_checkpoint_gets_no_work(caplog):
    async with running_system(num_vision=2) as system:
        odd = system.visions[1]
        odd.change(fingerprint=b"x" * 16)
        await system.until(lambda: system.router.fleet.vision[1].is_refused)
        for _ in range(4):
            assert (await system.chat(messages=[user(png())])).status_code == 200
        assert odd.requests == []
        assert "serves another checkpoint" in caplog.text
        assert b"x".hex() in caplog.text
        odd.change(fingerprint=system.vision.fingerprint)
        await system.until(lambda: not system.router.fleet.vision[1].is_refused)


async def test_equal_images_meet_on_one_server_while_it_is_not_busy():
    async with running_system(num_vision=3) as system:
        for _ in range(4):
            assert (await system.chat(messages=[user(png())])).status_code == 200
        assert sorted(vision.at_encode.num_entered for vision in system.visions) == [0, 0, 4]


async def test_equal_images_spread_rather_than_wait():
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        requests = [asyncio.create_task(system.chat(messages=[user(png())])) for _ in range(4)]
        async with asyncio.timeout(10):
            while sum(vision.at_encode.num_entered for vision in system.visions) < 4:
                await asyncio.sleep(0.01)
        entered = [vision.at_encode.num_entered for vision in system.visions]
        for vision in system.visions:
            vision.at_encode.is_open.set()
        assert {response.status_code for response in await asyncio.gather(*requests)} == {200}
        assert sorted(entered) == [2, 2]


async def test_admission_is_bounded_per_class():
    async with running_system(max_num_queued_reqs=2, max_num_queued_image_reqs=1) as system:
        gate = system.language.at_admission
        gate.is_open.clear()
        waiting = [asyncio.create_task(system.chat()) for _ in range(2)]
        waiting.append(asyncio.create_task(system.chat(messages=[user(png())])))
        await gate.wait_for(lambda gate: gate.num_entered == 3)
        for body in ({}, {"messages": [user(png())]}):
            refused = await system.chat(**body)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert 750 <= int(refused.headers["retry-after-ms"]) <= 1250
        gate.is_open.set()
        assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}
        assert (await system.chat()).status_code == 200


async def test_streams_that_have_begun_make_room():
    async with running_system(max_num_queued_reqs=1) as system:
        gate = system.language.at_token
        gate.closes_after = 1
        async with system.http.stream("POST", CHAT, json={"messages": [user("a b c")], "stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            second = asyncio.create_task(system.chat())
            await gate.wait_for(lambda gate: gate.num_entered == 3)
            gate.is_open.set()
            assert (await second).status_code == 200
            assert [line async for line in lines][-2] == "data: [DONE]"


async def test_drain(system):
    gate = system.language.at_token
    gate.is_open.clear()
    running = asyncio.create_task(system.chat())
    await gate.wait_for(lambda gate: gate.num_entered == 1)
    drain = asyncio.create_task(system.router.drain())
    await asyncio.sleep(0)
    refused = await system.chat()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
    assert refused.headers["connection"] == "close"
    assert (await system.http.get("/health")).status_code == 503
    assert (await system.http.get("/live")).status_code == 200
    gate.is_open.set()
    assert (await running).status_code == 200
    await asyncio.wait_for(drain, 10)


async def test_a_drain_ends(monkeypatch):
    """What does not end within the grace is told so."""
    async with running_system(shutdown_timeout=0.1) as system:
        gate = system.language.at_token
        gate.is_open.clear()
        running = asyncio.create_task(system.chat())
        await gate.wait_for(lambda gate: gate.num_entered == 1)
        await system.router.drain()
        response = await running
        assert (response.status_code, error_of(response)["code"]) == (503, "draining")
        await gate.wait_for(lambda gate: gate.num_cancelled == 1)
