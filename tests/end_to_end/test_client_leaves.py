"""A client that leaves takes everything with it: KV blocks, reservations, queued tiles, running calls."""

import asyncio
import io

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import data_url, scrape, user

GONE_SECONDS = 10  # the promise is one second; a loaded test machine is not asked to keep it
HELD = (
    "dvd_language_requests_running",
    "dvd_language_requests_waiting",
    "dvd_language_requests_waiting_for_features",
    "dvd_transfer_reservations{state=writing}",
    "dvd_vision_items_running",
    "dvd_vision_items_waiting",
    "dvd_vision_tiles_waiting",
    "dvd_requests_running",
)


def held(nano) -> dict[str, float]:
    """What is held anywhere on behalf of requests; zeros are left out."""
    found = {}
    for address in (nano.address, *nano.metrics_addresses.values()):
        samples = scrape(address)
        found |= {name: samples[name] for name in HELD if samples.get(name)}
    return found


async def eventually_nothing_is_held(nano) -> None:
    async with asyncio.timeout(GONE_SECONDS):
        while await asyncio.to_thread(held, nano):
            await asyncio.sleep(0.05)


def kv_in_use(nano) -> float:
    return scrape(nano.metrics_addresses["language"])["dvd_language_kv_cache_usage_ratio"]


def noise(side: int) -> Image.Image:
    pixels = np.random.default_rng(side).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side))


@pytest.fixture
async def http(nano):
    async with httpx.AsyncClient(base_url=nano.address, timeout=60) as client:
        yield client


async def test_in_the_middle_of_a_stream(nano, http):
    body = {
        "model": "nano",
        "messages": [user("How many?", data_url(noise(448)))],
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 4000,
    }
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.aiter_lines()
        for _ in range(20):
            await anext(lines)
        assert await asyncio.to_thread(kv_in_use, nano) > 0
    await eventually_nothing_is_held(nano)
    await eventually_kv_is_free(nano)


async def test_while_its_pictures_are_queued_for_the_encoder(nano, http):
    """Several requests of many tiles each; all clients leave before a first token."""
    bodies = [
        {"model": "nano", "messages": [user(f"{index}", data_url(noise(1344 + 8 * index)))], "max_tokens": 5}
        for index in range(4)
    ]
    calls = [asyncio.ensure_future(http.post("/v1/chat/completions", json=body)) for body in bodies]
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(held, nano):
            await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await eventually_nothing_is_held(nano)
    await eventually_kv_is_free(nano)


async def test_a_socket_that_just_disappears(nano):
    """No FIN by the HTTP client's good manners: the connection is reset."""
    host, port = nano.address.removeprefix("http://").split(":")
    body = httpx.Request(
        "POST",
        f"{nano.address}/v1/chat/completions",
        json={"messages": [user("hello")], "stream": True, "ignore_eos": True, "max_tokens": 4000},
    )
    body.read()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = io.BytesIO()
    head.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
    for name, value in body.headers.items():
        head.write(f"{name}: {value}\r\n".encode())
    writer.write(head.getvalue() + b"\r\n" + body.content)
    await writer.drain()
    assert b"200" in await asyncio.wait_for(reader.readline(), 30)
    writer.transport.abort()
    await eventually_nothing_is_held(nano)
    await eventually_kv_is_free(nano)


async def eventually_kv_is_free(nano) -> None:
    async with asyncio.timeout(GONE_SECONDS):
        while await asyncio.to_thread(kv_in_use, nano) > 0:
            await asyncio.sleep(0.05)
