"""Over real HTTP: every way in which an answer can fail has a name, and none of them is a success."""

import asyncio
import json
import socket
import time

import pytest

from benchmarks.client import Client
from benchmarks.plan import Target
from benchmarks.samples import Failure, Sample
from common.service.errors import ConfigError, Unavailable


async def ask(url: str, behaviour: str = "good", padding: int = 0, **options) -> Sample:
    sample = Sample("s", 0, 2, time.perf_counter())
    async with Client(Target(url, **options)) as client:
        await client.ask(json.dumps({"behaviour": behaviour, "padding": "x" * padding}).encode(), sample)
    return sample


@pytest.mark.parametrize("padding", [0, 3 * 2**20])
async def test_a_good_answer(server, padding):
    sample = await ask(f"{server.url}/v1/", padding=padding, api_key="secret")
    assert sample.failure is None
    assert sample.first_at is not None and sample.sent_at < sample.first_at <= sample.ended_at
    assert (sample.output_tokens, len(sample.gaps)) == (2, 1)
    assert len(server.bodies[0]["padding"]) == padding
    assert "POST /v1/chat/completions " in server.headers[0]
    assert "authorization: Bearer secret" in server.headers[0]


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        ("overloaded", Failure("http_status", "503 overloaded", "come later")),
        ("gateway", Failure("http_status", "502", "Bad Gateway")),
        ("error_event", Failure("error_event", "worker_unavailable", "a server of ours is gone")),
        ("bare_error", Failure("error_event", "worker_unavailable", "a server of ours is gone")),
        ("no_finish", Failure("no_finish_reason")),
        ("aborted", Failure("no_finish_reason", "abort")),
    ],
)
async def test_what_the_server_says(server, behaviour, failure):
    assert (await ask(server.url, behaviour)).failure == failure


@pytest.mark.parametrize(
    ("behaviour", "counted"),
    [("cut", "protocol cut"), ("not_json", "protocol not a chunk"), ("hang_up", "connect ServerDisconnectedError")],
)
async def test_what_happens_to_the_connection(server, behaviour, counted):
    sample = await ask(server.url, behaviour)
    assert str(sample.failure) == counted
    assert sample.ended_at >= sample.sent_at


async def test_a_silent_server(server):
    assert str((await ask(server.url, "silent", timeout=0.2)).failure) == "timeout"


async def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    sample = await ask(f"http://127.0.0.1:{port}")
    assert str(sample.failure) == "connect ClientConnectorError"
    async with Client(Target(f"http://127.0.0.1:{port}")) as client:
        with pytest.raises(Unavailable, match="no server answers"):
            await client.model_names()


async def test_one_connection_for_each_stream_and_used_again(server):
    async with Client(Target(server.url)) as client:
        held = [Sample("s", 0, 2, 0.0) for _ in range(3)]
        asking = [asyncio.create_task(client.ask(b'{"behaviour": "held"}', sample)) for sample in held]
        while server.num_open < 3:
            await asyncio.sleep(0)
        server.released.set()
        await asyncio.gather(*asking)
        assert all(sample.is_ok for sample in held)
        await client.ask(b"{}", again := Sample("s", 0, 2, 0.0))
        assert again.is_ok
    assert server.most_open == 3


async def test_a_cancelled_request_lets_go(server):
    async with Client(Target(server.url)) as client:
        asking = asyncio.create_task(client.ask(b'{"behaviour": "held"}', Sample("s", 0, 2, 0.0)))
        while server.num_open < 1:
            await asyncio.sleep(0)
        asking.cancel()
        assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError)


async def test_names_of_models(server):
    async with Client(Target(server.url)) as client:
        assert await client.model_names() == ["misbehaving"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://[", ""])
async def test_no_url(url):
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        Client(Target(url))
