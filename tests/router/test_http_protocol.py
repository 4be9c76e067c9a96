"""Connections that send no requests: answered in the usual shape, and no memory or time without bound."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

import pytest

from tests.router.conftest import CHAT, System, running_system, user

HEAD = b"GET /live HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
async def hasty() -> AsyncIterator[System]:
    async with running_system(header_read_timeout=0.2) as running:
        yield running


async def talk(system: System, *pieces: bytes, pause: float = 0) -> bytes:
    """Everything that is answered until the router hangs up."""
    url = urlsplit(system.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        async with asyncio.timeout(10):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def error_in(answer: bytes) -> tuple[int, str]:
    """Status and code, after checking what every error must have."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert headers["x-request-id"]
    assert (headers["x-should-retry"], headers["connection"]) == ("false", "close")
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(status.split()[1]), error["code"]


NOT_HTTP: Sequence[bytes] = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"BREW / HTTP/1.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    HEAD + b"no colon\r\n\r\n",
    HEAD + b"a: \0\r\n\r\n",
]


async def test_what_is_not_http(system):
    for request in NOT_HTTP:
        assert error_in(await talk(system, request)) == (400, "invalid_value"), request


BODY = json.dumps({"messages": [user("x")]}).encode()
POST = b"POST %s HTTP/1.1\r\nHost: x\r\n" % CHAT.encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = POST + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
BAD_CHUNKS: Sequence[bytes] = [
    CHUNKED + b"zz\r\nx\r\n0\r\n\r\n",
    CHUNKED + b"-1\r\nx\r\n0\r\n\r\n",
    CHUNKED + b"0x1\r\nx\r\n0\r\n\r\n",
    CHUNKED + b"\r\nx\r\n0\r\n\r\n",
    CHUNKED + b"1\r\nxy\r\n0\r\n\r\n",
    CHUNKED + b"ffffffffffffffffff\r\nx",
]
# Where two readers of these disagree, the second request is one's and the other's body: both lengths, in either order,
# and headers that only some take for Transfer-Encoding.
HIDDEN = b"GET /version HTTP/1.1\r\nHost: y\r\n\r\n"
SMUGGLED: Sequence[bytes] = [
    POST + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%s" % (5 + len(HIDDEN), HIDDEN),
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
    POST + b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"Transfer-Encoding\x0b: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"Content-Length: +5\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"Content-Length: 5, 5\r\n\r\n0\r\n\r\n%s" % HIDDEN,
    POST + b"Content-Length: 99999999999999999999\r\n\r\n%s" % HIDDEN,
]


async def test_bad_chunks(system):
    for request in BAD_CHUNKS:
        answer = await talk(system, request)
        assert error_in(answer) == (400, "invalid_value"), request
    assert system.language.requests == []
    await system.until_idle()


@pytest.mark.parametrize("request_bytes", SMUGGLED)
async def test_no_request_hides_in_another(system, request_bytes):
    answer = await talk(system, request_bytes)
    assert answer.startswith(b"HTTP/1.1 4"), answer
    assert b"wire_version" not in answer
    assert answer.count(b"HTTP/1.1 ") == 1
    await system.until_idle()


async def test_requests_one_after_another_on_one_connection(system):
    """Sent at once, answered in their order."""
    last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await talk(system, WHOLE + HIDDEN + WHOLE + last)
    assert answer.count(b"HTTP/1.1 200") == 4
    kinds = [b"chat.completion", b"wire_version", b"chat.completion", b"wire_version"]
    places = [answer.index(kinds[0]), answer.index(kinds[1]), answer.rindex(kinds[2]), answer.rindex(kinds[3])]
    assert places == sorted(places)


async def test_http_1_0(system):
    answer = await talk(system, b"GET /version HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and b"wire_version" in answer
    streamed = json.dumps({"messages": [user("x")], "stream": True}).encode()
    head = b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(streamed))
    answer = await talk(system, head + streamed)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.rstrip(b"\r\n0").endswith(b"data: [DONE]")


async def test_who_waits_to_be_told_to_continue(system):
    url = urlsplit(system.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = POST + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    async with asyncio.timeout(10):
        writer.write(head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize(
    "host", [b"x/live?", b"x?/health", b"x#", b"/live", b"", b"x\r\nHost: /live", b"[::1]:x", b"a" * 4000]
)
async def test_a_host_is_no_path(host):
    async with running_system(api_key=["sesame"]) as system:
        lines = b"Host: %s\r\nConnection: close\r\n\r\n" % host
        for target in (
            b"/version",
            b"http://x/version",
            b"//live",
            b"/live/../version",
            b"/version?/live",
            b"/%6cive/",
        ):
            answer = await talk(system, b"GET %s HTTP/1.1\r\n%s" % (target, lines))
            assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), (target, answer)
            assert b"wire_version" not in answer


async def test_headers_that_never_end(system):
    assert error_in(await talk(system, HEAD, b"a: " + b"b" * 70_000)) == (431, "headers_too_large")
    assert error_in(await talk(system, b"GET /" + b"a" * 70_000)) == (431, "headers_too_large")


async def test_headers_that_come_too_slowly(hasty):
    assert error_in(await talk(hasty, HEAD)) == (408, "request_read_timeout")
    assert error_in(await talk(hasty, *[b"\r\n"] * 4, pause=0.02)) == (408, "request_read_timeout")
    assert await talk(hasty) == b""  # nothing said, nothing answered


async def test_a_slow_start_of_the_next_request_does_not_end_an_answer(hasty):
    hasty.language.at_token.is_open.clear()
    body = json.dumps({"messages": [user("x")]}).encode()
    post = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
    talking = asyncio.create_task(talk(hasty, post + HEAD))
    await hasty.language.at_token.wait_for(lambda gate: gate.num_entered > 0)
    await asyncio.sleep(0.3)  # longer than headers may take
    hasty.language.at_token.is_open.set()
    answer, _, rest = (await talking).partition(b"HTTP/1.1 408")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"user: x" in answer
    assert rest


async def test_a_refused_body_does_not_go_on_for_ever(hasty):
    url = urlsplit(hasty.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")

    async def drip() -> None:
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1000):
                answer += piece
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 404")
    assert answer.count(b"HTTP/1.1") == 1


async def test_trailers_are_not_kept(system):
    """A body may end; what follows it in the same message is nobody's."""
    body = json.dumps({"messages": [user("x")]}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
    chunks = b"%x\r\n%s\r\n0\r\nX-Request-Id: late\r\n\r\n" % (len(body), body)
    answer = await talk(system, head, chunks)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"late" not in answer


async def test_connections_are_kept_between_requests(hasty):
    for _ in range(3):
        assert (await hasty.http.get("/live")).status_code == 200
        assert (await hasty.chat()).status_code == 200
    await asyncio.sleep(0.3)  # idle for longer than headers may take
    assert (await hasty.http.get("/live")).status_code == 200
