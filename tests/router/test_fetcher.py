"""The fetcher against a real server: what it asks, what it believes, and how it ends."""

import asyncio
import contextlib
import socket
import ssl
import threading

import pytest

from common.service import metrics
from common.service.errors import DvdError, InvalidRequest, MediaFetchFailed, Overloaded, RequestTooLarge
from router.fetch.fetcher import FetchLimits, MediaFetcher
from router.fetch.resolver import SystemResolver
from tests.router.origins import LoopbackPolicy, moved, reply, running_proxy

MAX_BYTES = 200_000


async def fetch(fetcher, url, max_bytes=MAX_BYTES, take=lambda num_bytes: None):
    return await fetcher.fetch(url, max_bytes, "here", take)


async def refused(fetcher, url, **arguments) -> DvdError:
    """How a fetch fails, after checking that it tells nothing of what is there and holds nothing any more."""
    with pytest.raises(DvdError) as failure:
        await fetch(fetcher, url, **arguments)
    assert failure.value.param == "here"
    assert failure.value.message in (
        "this media URL is not allowed",
        "the media behind this URL could not be fetched",
        f"what is behind this URL may have at most {MAX_BYTES} bytes",
    )
    assert metrics.MEDIA_FETCHES_INFLIGHT.labels("https")._value.get() == 0
    return failure.value


def rejected(reason: str) -> float:
    return metrics.MEDIA_REJECTED.labels(reason)._value.get()


async def test_what_is_asked_and_what_comes(origin, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    data = bytes(range(256)) * 500
    origin.answers["/%C3%A4?b=c%20d"] = reply(data)
    sizes: list[int] = []
    assert await fetch(origin.fetcher(), origin.url("/ä?b=c%20d#e"), take=sizes.append) == data
    assert sum(sizes) == len(data)
    first, *headers = origin.requests[0][:-2]
    assert first == "GET /%C3%A4?b=c%20d HTTP/1.1"
    assert sorted(header.partition(":")[0].lower() for header in headers) == [
        *("accept", "accept-encoding", "connection", "host", "user-agent"),
    ]
    assert {f"Host: a.example.com:{origin.port}", "Accept-Encoding: identity"} <= set(headers)


async def test_redirects_are_followed_without_cookies(origin):
    origin.answers["/1"] = moved("../2?x", "301 Moved", Set_Cookie="a=b")
    origin.answers["/2?x"] = moved(f"//b.example.com:{origin.port}/3", "307 Temporary", Set_Cookie="a=b")
    origin.answers["/3"] = moved(origin.url("/4"), "308 Permanent")
    origin.answers["/4"] = reply(b"here")
    assert await fetch(origin.fetcher(), origin.url("/1")) == b"here"
    assert origin.resolved == ["a.example.com", "a.example.com", "b.example.com", "a.example.com"]
    assert "cookie" not in str(origin.requests).lower()
    assert f"Host: b.example.com:{origin.port}" in origin.requests[2]


async def test_too_many_redirects(origin):
    origin.answers["/0"] = moved("/1")
    origin.answers |= {f"/{i}": moved(f"/{i + 1}") for i in range(1, 4)}
    origin.answers |= {"/4": reply(b"too far"), "/loop": moved("/loop"), "/nowhere": reply(b"", "302 Found")}
    for path in ("/0", "/loop", "/nowhere"):
        assert isinstance(await refused(origin.fetcher(), origin.url(path)), MediaFetchFailed)
    assert origin.paths() == ["/0", "/1", "/2", "/3", *["/loop"] * 4, "/nowhere"]


@pytest.mark.parametrize(
    "location",
    [
        *("http://a.example.com/x", "file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://a.example.com/"),
        *("https://127.0.0.1/", "https://[::1]/", "https://2130706433/", "https://metadata.google.internal/"),
        *("https://localhost/", "https://a.example.com@b.example.com/", "https://unlisted.example.com/"),
        *("https://a.example.com:22/", "//10.0.0.1/", "https://a.example.com\\@b.example.com/", "https://[/"),
    ],
)
async def test_redirects_lead_nowhere_else(origin, location):
    before = rejected("blocked")
    origin.answers["/"] = moved(location)
    failure = await refused(origin.fetcher(), origin.url("/"))
    assert (failure.code, type(failure)) == ("media_url_blocked", InvalidRequest)
    assert (origin.paths(), rejected("blocked")) == (["/"], before + 1)


@pytest.mark.parametrize(
    "inside", [["10.0.0.1"], ["127.0.0.1", "169.254.169.254"], ["::ffff:192.168.0.1"], ["fd00::1"]]
)
async def test_every_look_up_is_checked(origin, inside):
    """A name that stands for something else the next time gets a check the next time."""
    origin.answers["/"] = moved("/again")
    origin.addresses["a.example.com"] = [["127.0.0.1"], inside]
    assert (await refused(origin.fetcher(), origin.url("/"))).code == "media_url_blocked"
    assert (await refused(origin.fetcher(), origin.url("/"))).code == "media_url_blocked"
    assert origin.paths() == ["/"]


async def test_the_checked_address_is_the_one_that_is_asked(origin):
    """The name is not looked up a second time, as its next address might be another one."""
    origin.answers["/"] = reply(b"here")
    origin.addresses["a.example.com"] = [["127.0.0.1"], ["10.0.0.1"]]
    assert await fetch(origin.fetcher(), origin.url("/")) == b"here"
    assert origin.resolved == ["a.example.com"]


async def test_one_address_of_several_will_do(origin):
    origin.answers["/"] = reply(b"here")
    origin.addresses["a.example.com"] = [["127.0.0.2", "::1", "127.0.0.1"]]
    assert await fetch(origin.fetcher(), origin.url("/")) == b"here"


async def test_names_that_stand_for_nothing(origin):
    before = rejected("origin")
    origin.addresses |= {"a.example.com": [[]], "b.example.com": [["127.0.0.2"]]}
    for name in ("a.example.com", "b.example.com"):
        assert isinstance(await refused(origin.fetcher(), origin.url("/", name)), MediaFetchFailed)
    assert rejected("origin") == before + 2


async def test_a_slow_look_up(origin):
    async def stuck(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    before = rejected("timeout")
    for limits in (FetchLimits(timeout=60, connect_timeout=0.05), FetchLimits(timeout=0.05, connect_timeout=60)):
        fetcher = MediaFetcher(LoopbackPolicy(), limits, stuck, origin.authority.trusting)
        async with asyncio.timeout(20):
            assert isinstance(await refused(fetcher, "https://a.example.com/"), MediaFetchFailed)
    assert rejected("timeout") == before + 2


async def test_a_server_must_prove_its_name(origin):
    """Also one that was redirected to, and one whose certificate is signed by nobody known."""
    origin.answers["/"] = reply(b"never")
    origin.answers["/away"] = moved(origin.url("/", "c.example.com"))
    assert isinstance(await refused(origin.fetcher(), origin.url("/", "c.example.com")), MediaFetchFailed)
    assert isinstance(await refused(origin.fetcher(), origin.url("/away")), MediaFetchFailed)
    policy = LoopbackPolicy(frozenset({("a.example.com", origin.port)}))
    stranger = MediaFetcher(policy, FetchLimits(), origin.resolve, ssl.create_default_context())
    assert isinstance(await refused(stranger, origin.url("/")), MediaFetchFailed)
    assert origin.paths() == ["/away"]


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"no", "404 Not Found"),
        reply(b"no", "500 Internal Server Error"),
        reply(b"", "204 No Content"),
        reply(b"part", "206 Partial Content"),
        reply(b""),
        reply(b"\x1f\x8b", Content_Encoding="gzip"),
        reply(b"x", Content_Encoding="identity, br"),
        reply(b"short", Content_Length=100),
        reply(b"x", Content_Length="-1"),
        reply(b"x", Content_Length="one"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"not HTTP\r\n\r\n",
        b"",
    ],
    ids=range(14),
)
async def test_answers_of_no_use(origin, answer):
    before = rejected("origin")
    origin.answers["/"] = answer
    assert isinstance(await refused(origin.fetcher(), origin.url("/")), MediaFetchFailed)
    assert rejected("origin") == before + 1


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(reply(Content_Length=1000))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("serve", [drip, silent])
async def test_the_time_of_a_whole_fetch_is_bounded(origin, serve):
    before = rejected("timeout")
    origin.answers["/"] = serve
    assert isinstance(await refused(origin.fetcher(timeout=0.3), origin.url("/")), MediaFetchFailed)
    assert rejected("timeout") == before + 1


async def test_a_server_that_never_speaks_tls(origin):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        policy = LoopbackPolicy(frozenset({("a.example.com", port)}))
        fetcher = MediaFetcher(policy, FetchLimits(timeout=0.2), origin.resolve, origin.authority.trusting)
        assert isinstance(await refused(fetcher, f"https://a.example.com:{port}/"), MediaFetchFailed)


@pytest.mark.parametrize("answer", [endless, reply(bytes(MAX_BYTES + 1)), reply(b"x", Content_Length=10**15)])
async def test_too_large(origin, answer):
    before = rejected("too_large")
    origin.answers["/"] = answer
    sizes: list[int] = []
    assert isinstance(await refused(origin.fetcher(), origin.url("/"), take=sizes.append), RequestTooLarge)
    assert sum(sizes) <= MAX_BYTES
    assert rejected("too_large") == before + 1


async def test_just_as_large_as_allowed(origin):
    origin.answers["/"] = reply(bytes(MAX_BYTES))
    assert len(await fetch(origin.fetcher(), origin.url("/"))) == MAX_BYTES


async def test_what_counts_the_bytes_may_end_it(origin):
    def full(num_bytes: int) -> None:
        raise Overloaded("full")

    origin.answers["/"] = endless
    with pytest.raises(Overloaded):
        await fetch(origin.fetcher(), origin.url("/"), take=full)


@pytest.mark.parametrize(("limits", "hosts", "most"), [({"max_fetches_per_host": 2}, 1, 2), ({"max_fetches": 3}, 2, 3)])
async def test_so_many_at_a_time(origin, limits, hosts, most):
    gate = asyncio.Event()
    running = peak = 0

    async def wait(writer: asyncio.StreamWriter) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await gate.wait()
        running -= 1
        writer.write(reply(b"here"))

    origin.answers["/"] = wait
    fetcher = origin.fetcher(**limits)
    names = ["a.example.com", "b.example.com"][:hosts]
    async with asyncio.TaskGroup() as group:
        fetches = [group.create_task(fetch(fetcher, origin.url("/", name))) for name in names for _ in range(4)]
        async with asyncio.timeout(10):
            while running < most:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # for one too many
        gate.set()
    assert {task.result() for task in fetches} == {b"here"}
    assert peak == most


async def test_a_cancelled_fetch_gives_its_turn_back(origin):
    origin.answers |= {"/never": silent, "/": reply(b"here")}
    fetcher = origin.fetcher(max_fetches=1)
    task = asyncio.create_task(fetch(fetcher, origin.url("/never")))
    async with asyncio.timeout(10):
        while not origin.requests:
            await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert await fetch(fetcher, origin.url("/")) == b"here"


async def test_look_ups_that_are_stuck_hold_up_nobody_who_left():
    """But they count, until their threads end."""
    gate = threading.Event()

    def look_up(host: str, port: int) -> list[str]:
        if host == "stuck":
            gate.wait(20)
        if host == "nowhere":
            raise OSError("no such name")
        return [f"{host}:{port}"]

    resolve = SystemResolver(look_up, max_lookups=2)
    with pytest.raises(OSError, match="no such name"):
        await resolve("nowhere", 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(resolve("stuck", 1), 0.01)
    assert await resolve("a", 1) == ["a:1"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(resolve("stuck", 1), 0.01)
    third = asyncio.create_task(resolve("b", 2))
    done, _ = await asyncio.wait({third}, timeout=0.1)
    assert not done
    gate.set()
    assert await asyncio.wait_for(third, 10) == ["b:2"]


async def test_what_the_system_cannot_look_up():
    with pytest.raises(OSError, match="not a name"):
        await SystemResolver()("a" * 64, 443)


async def test_a_proxy_is_asked_for_listed_hosts_only(origin):
    origin.answers |= {"/1": moved(origin.url("/2", "b.example.com")), "/2": reply(b"here")}
    origin.answers["/out"] = moved("https://d.com/")
    async with running_proxy(origin) as proxy:
        fetcher = origin.fetcher(proxy=proxy.url)
        assert await fetch(fetcher, origin.url("/1")) == b"here"
        names = [f"CONNECT {host}:{origin.port} HTTP/1.1" for host in ("a.example.com", "b.example.com")]
        assert (proxy.asked, origin.resolved) == (names, [])
        assert (await refused(fetcher, origin.url("/out"))).code == "media_url_blocked"
        assert (await refused(fetcher, "https://d.com/")).code == "media_url_blocked"
        assert len(proxy.asked) == 3
        # The certificate is that of the host, not of the proxy.
        assert isinstance(await refused(fetcher, origin.url("/2", "c.example.com")), MediaFetchFailed)
        proxy.status = "403 Forbidden"
        assert isinstance(await refused(fetcher, origin.url("/2")), MediaFetchFailed)
    assert isinstance(await refused(fetcher, origin.url("/2")), MediaFetchFailed)  # it is gone
