"""``https:`` URLs in requests: fetched once, all at a time, counted, and refused by default."""

import asyncio

import httpx
import pytest

from tests.router.conftest import CHAT, data_url, error_of, png, running_system, user
from tests.router.origins import moved, reply
from tests.router.parts import BLUE, MP4, RED, tiles
from tests.router.test_fetch_policy import NAMES_OF_THE_INSIDE, NUMBERS, OUTSIDE_PORTS, PARSERS_DISAGREE

SLOW_SECONDS = 20


def image(url: str):
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*parts):
    return {"messages": [user(*parts, "what?")]}


@pytest.fixture
async def reaching(origin):
    """A system that may ask the origin."""
    async with running_system(fetcher=origin.fetcher(timeout=SLOW_SECONDS), enable_per_request_metrics=True) as system:
        yield system


async def test_by_default_no_url_is_followed(system):
    for part in (image("https://a.example.com/"), {"type": "video_url", "video_url": "https://a.example.com/"}):
        response = await system.chat(**chat(part))
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "media_url_blocked")
        assert error["message"] == "this media URL is not allowed"
        assert error["param"].startswith("messages[0].content[0].")


async def test_media_of_all_kinds(reaching, origin):
    origin.answers |= {"/red": reply(RED), "/blue": reply(BLUE), "/film": reply(MP4)}
    red, blue, film = (origin.url(path) for path in ("/red", "/blue", "/film"))
    response = await reaching.chat(
        **chat(
            image(red),
            {"type": "image_url", "image_url": blue},
            {"type": "video_url", "video_url": {"url": film, "num_frames": 2}},
            {"type": "video_url", "video_url": {"frames": [red, data_url(BLUE)]}},
            {"type": "video", "video": [blue]},
        )
    )
    assert response.status_code == 200, response.text
    request = reaching.language.requests[-1]
    assert tiles(request) == [1, 1, 2, 1, 1, 1]
    hashes = [reference.mm_hash for reference in request.images]
    by_hash = {call.mm_hash: call.image for call in reaching.vision.requests}
    assert [by_hash[mm_hash] for mm_hash in hashes] == [RED, BLUE, MP4, RED, BLUE, BLUE]
    assert sorted(origin.paths()) == ["/blue", "/film", "/red"]  # once each
    assert response.json()["metrics"]["dvd"]["fetch_ms"] > 0
    text = (await reaching.http.get("/metrics")).text
    for name in ("fetch_seconds_count", "bytes_total", "fetches_inflight"):
        assert f"dvd_media_{name}{{" in text
    assert 'scheme="https"' in text
    await reaching.until_idle()


async def test_an_image_by_url_is_the_image_in_data(reaching, origin):
    origin.answers["/red"] = reply(RED)
    await reaching.chat(**chat(image(origin.url("/red"))))
    await reaching.chat(**chat(RED))
    first, second = (request.images[0].mm_hash for request in reaching.language.requests)
    assert first == second


async def test_images_are_fetched_side_by_side(reaching, origin):
    """Each answer waits until both are asked for."""
    both = asyncio.Barrier(2)

    def after_both(data: bytes):
        async def serve(writer: asyncio.StreamWriter) -> None:
            await both.wait()
            writer.write(reply(data))

        return serve

    origin.answers |= {"/red": after_both(RED), "/blue": after_both(BLUE)}
    response = await reaching.chat(**chat(image(origin.url("/red")), image(origin.url("/blue"))))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (reply(b"secret", "403 Forbidden"), 422, "media_fetch_failed"),
        (reply(b"<html>secret</html>", Content_Type="image/png"), 400, "invalid_image"),
        (reply(b"", "302 Found", Location="https://10.0.0.1/secret"), 400, "media_url_blocked"),
        (reply(b"<svg>\xff\xd8\xff"), 400, "invalid_image"),
        (reply(b"x", Content_Length=10**9), 413, "request_too_large"),
    ],
)
async def test_failures_say_which_url_and_nothing_of_what_is_there(reaching, origin, answer, status, code):
    origin.answers |= {"/x": answer, "/red": reply(RED)}
    response = await reaching.chat(**chat(image(origin.url("/red")), image(origin.url("/x"))))
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert response.headers["x-should-retry"] == "false"
    for secret in ("secret", "example.com", "403", "10.0.0.1", str(origin.port)):
        assert secret not in error["message"]
    assert reaching.language.requests == []
    await reaching.until_idle()


async def test_what_is_fetched_is_held_until_the_client_leaves(reaching, origin):
    sent = 500_000

    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(reply(bytes(sent), Content_Length=2 * sent))
        await asyncio.Event().wait()

    origin.answers["/half"] = half
    asking = asyncio.create_task(reaching.chat(**chat(image(origin.url("/half")))))
    async with asyncio.timeout(10):
        while reaching.router.admission.held_bytes < sent:
            await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await reaching.until_idle()


async def test_all_together_are_no_more_than_a_body_may_bring(origin):
    data = png(size=(300, 300)) + bytes(3000)
    origin.answers |= {f"/{i}": reply(data) for i in range(4)}
    async with running_system(fetcher=origin.fetcher(), max_body_bytes=3 * len(data)) as system:
        for count, status in ((3, 200), (4, 413)):
            response = await system.chat(**chat(*(image(origin.url(f"/{i}")) for i in range(count))))
            assert response.status_code == status, response.text
        assert "fetched" in error_of(response)["message"]
        await system.until_idle()


async def test_a_url_that_is_an_image_here_and_a_video_there(origin):
    """Fetched once, with the larger of both bounds; each use has its own."""
    origin.answers["/"] = reply(MP4 + bytes(3000))
    film = {"type": "video_url", "video_url": {"url": origin.url("/"), "num_frames": 1}}
    async with running_system(fetcher=origin.fetcher(), max_item_bytes=1000, max_video_bytes=4000) as system:
        response = await system.chat(**chat(film))
        assert response.status_code == 200, response.text
        for parts in ([image(origin.url("/")), film], [film, image(origin.url("/"))]):
            response = await system.chat(**chat(*parts))
            assert (response.status_code, error_of(response)["message"]) == (
                413,
                "an image may have at most 1000 bytes",
            )
    assert origin.paths() == ["/"] * 3


async def test_too_many_media_are_not_fetched(origin):
    async with running_system(fetcher=origin.fetcher(), max_media_items=1) as system:
        response = await system.chat(**chat(image(origin.url("/1")), image(origin.url("/2"))))
        assert error_of(response)["code"] == "too_many_media_items"
        assert origin.requests == []


async def test_the_deadline_of_the_request_holds(reaching, origin):
    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    origin.answers["/"] = silent
    response: httpx.Response = await reaching.http.post(
        CHAT, json=chat(image(origin.url("/"))), headers={"X-Dvd-Deadline-Ms": "300"}
    )
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    await reaching.until_idle()


async def test_with_the_flag_inside_stays_out_of_reach():
    async with running_system(allow_media_urls=True) as system:
        for host in ("localhost", "127.0.0.1", "169.254.169.254", "[::1]", "metadata.google.internal", "127.1"):
            response = await system.chat(**chat(image(f"https://{host}/")))
            assert (response.status_code, error_of(response)["code"]) == (400, "media_url_blocked"), host


PATHS = {
    "image": lambda url: {"type": "image_url", "image_url": url},
    "image object": image,
    "video": lambda url: {"type": "video_url", "video_url": url},
    "video object": lambda url: {"type": "video_url", "video_url": {"url": url}},
    "frames of a video object": lambda url: {"type": "video_url", "video_url": {"frames": [data_url(RED), url]}},
    "frames": lambda url: {"type": "video", "video": [url]},
}
"""Everything in a request that is fetched."""


@pytest.mark.parametrize("part", PATHS.values(), ids=PATHS)
async def test_every_path_asks_the_one_fetcher(reaching, origin, part):
    """The table of RELIABILITY.md section 5.2, on each path: what holds of the fetcher holds of it.

    ==========  ===========================================  ==================================================
    group       all its cases, of the one fetcher            here, on each path
    ==========  ===========================================  ==================================================
    addresses   test_fetch_policy: NUMBERS, names, is_public  all hosts in URLs
    parser      test_fetch_policy: PARSERS_DISAGREE, no URLs  all of them
    redirects   test_fetcher: leads nowhere else, too many    inside, file, http, a loop
    DNS         test_fetcher: every look-up, names, slow      mixed answers, then inside, nothing
    body        test_fetcher: no use, too large, whole time   empty, 204, gzip, false length, wrong type, a polyglot
    ==========  ===========================================  ==================================================
    """

    async def refused(url: str, *statuses: int) -> str:
        response = await reaching.chat(**chat(part(url)))
        assert response.status_code in statuses, (url, response.text)
        code: str = error_of(response)["code"]
        return code

    hosts = [f"https://{host}/" for host in (*NUMBERS, *NAMES_OF_THE_INSIDE)]
    for url in (*hosts, *PARSERS_DISAGREE, *OUTSIDE_PORTS):
        assert await refused(url, 400) == "media_url_blocked", url
    assert origin.requests == []
    for location in ("https://10.0.0.1/", "https://localhost/", "file:///etc/passwd", "http://a.example.com/"):
        origin.answers["/"] = moved(location)
        assert await refused(origin.url("/"), 400) == "media_url_blocked", location
    origin.answers["/"] = moved("/")
    assert await refused(origin.url("/"), 422) == "media_fetch_failed"
    origin.addresses |= {"a.example.com": [["127.0.0.1", "10.0.0.1"]], "b.example.com": [[]]}
    assert await refused(origin.url("/"), 400) == "media_url_blocked"
    assert await refused(origin.url("/", "b.example.com"), 422) == "media_fetch_failed"
    origin.addresses = {"a.example.com": [["127.0.0.1"], ["10.0.0.1"]]}
    assert await refused(origin.url("/"), 400) == "media_url_blocked"
    origin.addresses = {}
    for answer in (
        reply(),
        reply(status="204 No Content"),
        reply(b"\x1f\x8b", Content_Encoding="gzip"),
        reply(b"x", Content_Length=2),
    ):
        origin.answers["/"] = answer
        assert await refused(origin.url("/"), 422) == "media_fetch_failed", answer
    for body in (b"<html>hello</html>", b"<html></html>" + RED):
        origin.answers["/"] = reply(body, Content_Type="image/png")
        assert await refused(origin.url("/"), 400) in ("invalid_image", "unsupported_media"), body
    assert reaching.language.requests == []
    await reaching.until_idle()
