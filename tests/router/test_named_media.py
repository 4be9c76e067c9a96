"""``uuid``: media named once and left out on later turns, inside one scope, as long as there is room."""

import asyncio

import pytest
from openai import AsyncOpenAI, BadRequestError

from router.api.named_media import ENTRY_BYTES, NamedFrames, NamedMedia
from router.api.schemas import ImageUrl, VideoUrl
from router.media import CompressedImage
from tests.router.conftest import CHAT, System, error_of, png, running_system, user
from tests.router.fakes import digest
from tests.router.parts import BLUE, MP4, PHOTO, RED, ask, frames, image, tiles, video

AGAIN = {"type": "image_url", "image_url": None}


def picture(num_bytes: int, color: bytes = b"r") -> CompressedImage:
    return CompressedImage(color * num_bytes, 1, 1)


def data_of(media: NamedMedia, name: str, scope: str = "") -> bytes | None:
    named = media.of(scope).image(name)
    return None if named is None else named.image.data


def test_what_was_not_named_for_longest_is_forgotten_first():
    media = NamedMedia(3 * (100 + ENTRY_BYTES))
    names = media.of("")
    for name in ("a", "b", "c"):
        names.bind_image(name, picture(100), ImageUrl("data:..."))
    assert names.image("a") is not None
    names.bind_image("d", picture(100), ImageUrl())
    assert [data_of(media, name) is None for name in "abcd"] == [False, True, False, False]
    assert media.num_bytes == 3 * (100 + ENTRY_BYTES)
    assert names.num_bytes_found == 100


def test_a_name_bound_again_is_the_new_medium_and_frees_the_old():
    media = NamedMedia(10_000)
    names = media.of("")
    names.bind_image("a", picture(2000), ImageUrl())
    names.bind_image("a", picture(500, b"b"), ImageUrl())
    assert (data_of(media, "a"), media.num_bytes) == (b"b" * 500, 500 + ENTRY_BYTES)
    names.bind_video("a", b"film", VideoUrl())
    assert names.image("a") is None
    assert names.video("a") is not None
    names.bind_frames("a", [picture(300), picture(200)])
    assert isinstance(names.video("a"), NamedFrames)
    assert (names.image("a"), media.num_bytes) == (None, 500 + 3 * ENTRY_BYTES)


def test_what_does_not_fit_is_not_kept():
    media = NamedMedia(1000 + ENTRY_BYTES)
    media.of("").bind_image("small", picture(1), ImageUrl())
    media.of("").bind_image("a", picture(1001), ImageUrl())
    assert (data_of(media, "a"), data_of(media, "small")) == (None, b"r")  # nor does it drive others out
    media.of("").bind_image("small", picture(1001), ImageUrl())
    assert (data_of(media, "small"), media.num_bytes) == (None, 0)  # the name is no longer the old one's
    none = NamedMedia(0)
    none.of("").bind_image("a", picture(1), ImageUrl())
    assert (data_of(none, "a"), none.num_bytes) == (None, 0)


def test_the_url_is_not_kept():
    names = NamedMedia(10_000).of("")
    names.bind_image("a", picture(1), ImageUrl("data:image/png;base64,AAAA", detail="low"))
    named = names.image("a")
    assert named is not None
    assert named.source == ImageUrl(detail="low")


async def refused(system: System, part: dict, **body) -> str:
    """The parameter that names a medium nobody knows."""
    response = await system.chat(messages=[user(part)], **body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["code"] == "unknown_media_uuid"
    return error["param"]


async def test_openai_client_leaves_an_image_out(system):
    """As aiperf and vLLM's clients do it; what has not been seen says so, and is sent again."""
    async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:

        async def say(*messages):
            reply = await client.chat.completions.create(model="fake", messages=list(messages))
            return reply.choices[0].message.content

        sent = user({**image(RED), "uuid": "my picture"}, "?")
        first = await say(sent)
        left_out = user({**AGAIN, "uuid": "my picture"}, "?")
        second = await say(left_out, {"role": "assistant", "content": first}, user("and?"))
        assert first == f"user: [{digest(RED)}] ?"
        assert second == f"{first} assistant: {first} user: and?"
        with pytest.raises(BadRequestError) as refused:
            await say(user({**AGAIN, "uuid": "another"}))
    assert (refused.value.code, refused.value.param) == (
        "unknown_media_uuid",
        "messages[0].content[0].image_url",
    )
    hashes = [request.images[0].mm_hash for request in system.language.requests]
    assert hashes[0] == hashes[1]
    await system.until_idle()


async def test_an_image_is_cut_as_it_was_unless_the_part_says_more(system):
    photo = png(size=PHOTO)
    sent = await ask(system, {**image(photo, detail="low"), "uuid": "a"})
    as_it_was = await ask(system, {**AGAIN, "uuid": "a"})
    omitted = await ask(system, {"type": "image_url", "uuid": "a"})
    other = await ask(system, {"type": "image_url", "image_url": {"max_dynamic_patch": 6}, "uuid": "a"})
    assert [tiles(request) for request in (sent, as_it_was, omitted, other)] == [[1], [1], [1], [3]]
    nothing_said = {"messages": [user({"type": "image_url", "image_url": {}, "uuid": "a"})]}
    assert (await system.http.post(CHAT, json=nothing_said, headers={"X-Dvd-Strict": "1"})).status_code == 200
    assert tiles(system.language.requests[-1]) == [1]
    assert sent.images[0].mm_hash == as_it_was.images[0].mm_hash == omitted.images[0].mm_hash


async def test_the_latest_medium_has_the_name(system):
    request = await ask(system, {**image(RED), "uuid": "a"}, {**image(BLUE), "uuid": "a"}, {**AGAIN, "uuid": "a"})
    red, blue, again = (image.mm_hash for image in request.images)
    assert red != blue == again


async def test_a_video_may_be_left_out(system):
    left_out = {"type": "video_url", "uuid": "film"}
    sent = await ask(system, {**video(MP4, num_frames=4), "uuid": "film"})
    as_it_was = await ask(system, left_out)
    shorter = await ask(system, {**left_out, "video_url": {"num_frames": 2}})
    assert [tiles(request) for request in (sent, as_it_was, shorter)] == [[4], [4], [2]]
    assert await refused(system, {**AGAIN, "uuid": "film"}) == "messages[0].content[0].image_url"
    other = {"type": "video", "uuid": "film"}
    assert tiles(await ask(system, other)) == [4]
    assert await refused(system, {"type": "video", "uuid": "b"}) == "messages[0].content[0].video"
    as_frames = await ask(system, {**frames(RED, BLUE), "uuid": "film"})
    for part in (left_out, other):
        again = await ask(system, part)
        assert tiles(again) == [1, 1]
        assert [image.mm_hash for image in again.images] == [image.mm_hash for image in as_frames.images]
        assert all(image.is_video for image in again.images)
    for name in ("num_frames", "fps"):
        response = await system.chat(messages=[user({**left_out, "video_url": {name: 1}})])
        assert error_of(response)["param"] == f"messages[0].content[0].video_url.{name}"
    await ask(system, {"type": "video_url", "video_url": {"frames": frames(RED)["video"]}, "uuid": "film"})
    assert tiles(await ask(system, other)) == [1]


async def test_frames_of_a_name_count_like_frames_that_are_sent():
    async with running_system(max_media_items=5) as system:
        film = {"type": "video", "uuid": "film"}
        await ask(system, {**frames(RED, BLUE), "uuid": "film"})
        assert tiles(await ask(system, film, film, image(RED))) == [1, 1, 1, 1, 1]
        error = error_of(await system.chat(messages=[user(film, film, film)]))
        assert (error["code"], error["param"]) == ("too_many_media_items", "messages[0].content[2].video")


async def test_a_name_means_nothing_to_others():
    async with running_system(api_key=["one", "two"]) as system:

        async def status(key, part, **body):
            headers = {"Authorization": f"Bearer {key}"}
            response = await system.http.post(CHAT, json={"messages": [user(part)], **body}, headers=headers)
            return response.status_code

        left_out = {**AGAIN, "uuid": "a"}
        assert await status("one", {**image(RED), "uuid": "a"}) == 200
        assert await status("one", left_out) == 200
        assert await status("two", left_out) == 400
        assert await status("one", left_out, cache_salt="x") == 400


async def test_a_forgotten_image_must_be_sent_again():
    room = len(RED) + ENTRY_BYTES + 100
    async with running_system(max_named_media_bytes=room) as system:
        await ask(system, {**image(RED), "uuid": "red"})
        await ask(system, {**image(BLUE), "uuid": "blue"})
        assert await refused(system, {**AGAIN, "uuid": "red"}) == "messages[0].content[0].image_url"
        await ask(system, {**AGAIN, "uuid": "blue"})
        assert "dvd_named_media_bytes{" in (await system.http.get("/metrics")).text


async def test_what_is_named_counts_like_what_is_sent(system):
    """A few bytes that name much hold as much memory as if they had carried it."""
    large = RED + bytes(300_000)  # what follows the last chunk of a PNG is nobody's business
    await ask(system, {**image(large), "uuid": "a"})
    await system.until_idle()
    system.language.at_token.is_open.clear()
    num_entered = system.language.at_token.num_entered
    asking = asyncio.create_task(ask(system, {**AGAIN, "uuid": "a"}, {**AGAIN, "uuid": "a"}))
    await system.language.at_token.wait_for(lambda gate: gate.num_entered > num_entered)
    assert system.router.admission.held_bytes > 600_000
    system.language.at_token.is_open.set()
    await asking
    await system.until_idle()
