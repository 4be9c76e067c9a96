"""Rows 16, 17 and 18: clients that leave, that do not read, that are too many, and that come again and again."""

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter

import httpx
import pytest

from tests.faults.load import ask_once, number_question

pytestmark = pytest.mark.timeout(600)

GONE_SECONDS = 1.0
BUSY = 5.0
"""Seconds more that a machine with other work may take."""
NUM_LEAVING = 12
NUM_AT_ONCE = 80
NUM_RETRYING = 30
RETRY_SHARE, RETRY_RESERVE = 0.2, 12
"""Most work that retries may add: a share of the requests, and what a tier that was idle may begin with."""


def url(system) -> str:
    return f"{system.routers[0]}/v1/chat/completions"


def dispatched(system, tier: str) -> float:
    """Calls to servers of a tier so far."""
    samples = system["router-a"].metrics()
    return sum(value for key, value in samples.items() if key.startswith("dvd_dispatch_total") and f"={tier}" in key)


@pytest.mark.parametrize(
    ("tier", "failpoint"),
    [
        ("vision", "vision.batch=sleep(0.3)"),  # queued, or being encoded
        ("vision", "vision.deliver=sleep(0.5)"),  # on the way to the language server
        ("language", "language.token=sleep(0.2)"),  # being decoded
    ],
)
def test_row_16_clients_leave(system, load, story, tier, failpoint):
    """All they had asked for is dropped within a second, and those who stay are served."""

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            body = {**number_question().body("stream", ""), "max_tokens": 2000, "ignore_eos": True}
            asking = [
                asyncio.create_task(ask_once(client, url(system), number_question(number).body("stream", "") | more))
                for number in range(NUM_LEAVING)
                for more in [{} if number % 2 else {key: body[key] for key in ("max_tokens", "ignore_eos")}]
            ]
            await asyncio.sleep(0.5)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    with story.fault():
        for server in system.of(tier):
            server.arm(failpoint)
        asyncio.run(leave())
        for server in system.of(tier):
            server.arm()
        load.pause()
        system.until(lambda: not system.held(), lambda: f"held: {system.held()}", GONE_SECONDS + BUSY)
        load.go_on()
    story.recovery()
    story.report.assert_no_harm()


def test_row_16_a_client_that_does_not_read(system, load, story):
    """Its request is dropped once it has kept the router waiting too long; the others notice nothing."""
    much = {"n": 4, "max_tokens": 2000, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    content = json.dumps(number_question().body("stream", "") | much).encode()
    host, _, port = system["router-a"].address.rpartition(":")
    with story.fault(), socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        reader.sendall(head.encode() + content)
        assert reader.recv(1)
        story.go_on()
        load.pause()
        system.until(lambda: not system.held(), lambda: f"held: {system.held()}")
        load.go_on()
    story.recovery()
    story.report.assert_no_harm()


def test_row_17_many_more_images_than_can_be_served(system, story):
    """Each is answered rightly or refused at once with a word on when to come again; those in line are served on."""

    async def burst() -> list[tuple[float, httpx.Response]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, trust_env=False, limits=limits) as client:

            async def ask(number: int) -> tuple[float, httpx.Response]:
                started = time.monotonic()
                response = await client.post(url(system), json=number_question(number).body("image", f"{number}"))
                return time.monotonic() - started, response

            return await asyncio.gather(*(ask(number) for number in range(NUM_AT_ONCE)))

    for server in system.of("vision"):
        server.arm("vision.batch=sleep(0.1)")
    with story.fault():
        replies = asyncio.run(burst())
    for server in system.of("vision"):
        server.arm()
    story.recovery()
    statuses = Counter(response.status_code for _, response in replies)
    refused = [response for _, response in replies if response.status_code == 503]
    assert set(statuses) == {200, 503}, statuses
    assert all(response.json()["error"]["code"] == "overloaded" for response in refused)
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    report = story.report
    report.assert_truth()
    failed = [outcome for outcome in report.outcomes if outcome.state == "failed"]
    assert all(outcome.kind != "text" and outcome.status == 503 for outcome in failed), report


def test_row_18_retries_do_not_multiply_the_work_of_a_tier_that_fails(system, load, story):
    """All vision servers fail, and clients come again as they are told to: the tier is asked hardly more often."""

    async def storm() -> int:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:

            async def insist(number: int) -> int:
                for attempt in range(3):
                    body = number_question(number).body("image", f"storm {number}")
                    response = await client.post(url(system), json=body)
                    if response.status_code == 200 or response.headers.get("x-should-retry") != "true":
                        return attempt + 1
                    await asyncio.sleep(float(response.headers["retry-after-ms"]) / 1000)
                return attempt + 1

            return sum(await asyncio.gather(*(insist(number) for number in range(NUM_RETRYING))))

    load.pause()
    before = dispatched(system, "vision")
    with story.fault():
        for server in system.of("vision"):
            server.arm("vision.encode.before=raise")
        num_requests = asyncio.run(storm())
        asked = dispatched(system, "vision") - before
        for server in system.of("vision"):
            server.arm()
        system.until_ready()
        load.go_on()
    story.recovery()
    assert asked <= num_requests * (1 + RETRY_SHARE) + RETRY_RESERVE, f"{asked:g} calls for {num_requests} requests"
    story.report.assert_no_harm()


def test_row_20_descriptors_are_used_up(system, load, story):
    """Idle connections take all that a router may have open: it answers again once they are gone."""
    router = system["router-a"]
    host, _, port = router.address.rpartition(":")
    load.pause()
    with story.fault(), contextlib.ExitStack() as connections:
        before = router.limit_files(int(router.metrics()["process_open_fds"]) + 30)
        for _ in range(60):
            connections.enter_context(socket.create_connection((host, int(port)), timeout=20))
    router.limit_files(before)
    load.go_on()
    story.recovery()
    story.report.assert_no_harm()
