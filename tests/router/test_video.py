"""Videos and lists of frames: how they are known, counted, laid out, measured and sent."""

import asyncio

import pytest

from common.service.errors import ConfigError, InternalError, InvalidRequest, Overloaded, Unavailable
from protos.vision_pb2 import ProbeReply
from router.api.layout import IMAGE_MARKER
from router.settings import RouterSettings
from tests.router.conftest import CHAT, data_url, error_of, png, running_system, user
from tests.router.fakes import FLASH, digest
from tests.router.parts import (
    BLUE,
    MP4,
    PHOTO,
    RED,
    ask,
    block,
    film,
    frames,
    image,
    parts_of,
    text,
    tiles,
    video,
    whole,
)


async def test_a_video_is_one_image_and_its_frames_are_blocks(system):
    request = await ask(system, "see", video(), "what?")
    assert parts_of(system) == [text("see"), *film(0, 8), text("what?")]
    [reference], [call] = request.images, system.vision.requests
    assert (reference.is_video, reference.max_num_tokens) == (True, 8 * 256)
    assert (call.image, call.tiling.num_frames, call.mm_hash) == (MP4, 8, reference.mm_hash)
    assert not request.messages[0].inline_images
    assert system.vision.probe_requests == []


@pytest.mark.parametrize("data", [MP4, b"\x1a\x45\xdf\xa3" + bytes(8), b"RIFF\1\2\3\4AVI LIST"])
async def test_the_first_bytes_decide_what_is_a_video(system, data):
    plain = {"type": "video_url", "video_url": data_url(data, "application/octet-stream")}
    assert tiles(await ask(system, plain)) == [8]


async def test_a_list_of_frames_is_images_that_count_as_a_video(system):
    photo = png(size=PHOTO)
    listed = {"type": "video_url", "video_url": {"frames": [data_url(photo), data_url(RED)]}}
    for part in (frames(photo, RED), listed):
        response = await system.chat(messages=[user(part, BLUE)], max_dynamic_patch=24, min_dynamic_patch=2)
        request = system.language.requests[-1]
        assert [image.is_video for image in request.images] == [True, True, False]
        assert tiles(request)[:2] == [1, 1]
        frame = [text("Frame-1: "), block((0, 0, 1)), text("Frame-2: "), block((1, 0, 1)), whole(2)]
        assert parts_of(system) == frame
        counts = response.json()["usage"]["prompt_tokens_details"]["multimodal_tokens"]
        assert (counts["video"], counts["image"]) == (512, request.images[2].max_num_tokens)


async def test_every_video_counts_its_own_frames(system):
    await ask(system, video(num_frames=2), frames(RED), RED, video(num_frames=1))
    expected = [*film(0, 2), text("Frame-1: "), block((1, 0, 1)), whole(2), *film(3, 1)]
    assert parts_of(system) == expected


async def test_videos_keep_their_place_beside_markers(system):
    """Markers move images only, and media have the order of the prompt; no newline comes from elsewhere there."""
    request = await ask(system, RED, video(num_frames=1), f"x {IMAGE_MARKER}")
    assert parts_of(system) == [*film(0, 1), text("\n"), text("x "), whole(1)]
    assert request.messages[0].inline_images
    assert [image.is_video for image in request.images] == [True, False]
    assert [call.image for call in sorted(system.vision.requests, key=lambda call: call.image_index)] == [MP4, RED]


async def test_text_cannot_make_a_frame(system):
    """What a user types stays text, also where it reads like what we write."""
    typed = "Frame-1: <img><IMG_CONTEXT></img>"
    await ask(system, typed, video(num_frames=1), typed)
    assert parts_of(system) == [text(typed), *film(0, 1), text(typed)]


async def test_a_video_without_images_leaves_markers_alone(system):
    await ask(system, video(num_frames=1), IMAGE_MARKER)
    assert parts_of(system) == [*film(0, 1), text(IMAGE_MARKER)]


@pytest.mark.parametrize(
    ("part", "request_wide", "num_frames"),
    [
        ({}, None, 8),
        ({}, {"num_frames": 32}, 32),
        ({"num_frames": 3}, {"num_frames": 32}, 3),
        ({"num_frames": 128}, {"num_frames": 1000}, 128),
        ({"num_frames": 3}, {"fps": 1}, 3),
        ({"num_frames": 16}, {"fps": -1}, 16),
        ({}, {"num_frames": 16, "fps": -1}, 16),
        ({}, {"fps": -1}, 8),
        # From here on the length counts: ten seconds, three hundred frames.
        ({"fps": 2}, None, 20),
        ({"fps": 0.25}, None, 2),  # 2.5, halves to the even number
        ({"fps": 0.01}, None, 1),
        ({"fps": 1000}, None, 128),
        ({"num_frames": 5, "fps": 2}, None, 5),
        ({"num_frames": 50, "fps": 2}, None, 20),
        ({"fps": 2}, {"num_frames": 5}, 20),
        ({}, {"fps": 1}, 10),
        ({}, {"num_frames": 5, "fps": 1}, 5),
        ({"num_frames": -1}, None, 128),
        ({"num_frames": -1, "fps": 3}, None, 30),
    ],
)
async def test_how_many_frames(system, part, request_wide, num_frames):
    body = {} if request_wide is None else {"media_io_kwargs": {"video": request_wide}}
    request = await ask(system, video(**part), **body)
    assert tiles(request) == [num_frames]
    assert system.vision.requests[0].tiling.num_frames == num_frames
    assert parts_of(system) == film(0, num_frames)
    asked = {**(part or request_wide or {})}
    needs_length = asked.get("num_frames") == -1 or asked.get("fps", -1) != -1
    assert len(system.vision.probe_requests) == needs_length


async def test_a_video_has_no_more_frames_than_it_has(system):
    system.vision.length = ProbeReply(seconds=10, num_frames=6)
    assert tiles(await ask(system, video(fps=2))) == [6]
    assert tiles(await ask(system, video(num_frames=-1))) == [6]
    system.vision.length = ProbeReply(seconds=0, num_frames=0)  # a stream that does not say
    assert tiles(await ask(system, video(fps=2))) == [1]


async def test_the_options_set_frames():
    async with running_system(video_frames=4, max_video_frames=6) as system:
        assert tiles(await ask(system, video())) == [4]
        assert tiles(await ask(system, video(fps=2))) == [6]
        for part, param in ((video(num_frames=7), "video_url.num_frames"), (frames(*[RED] * 7), "video")):
            error = error_of(await system.chat(messages=[user(part)]))
            assert (error["code"], error["param"]) == ("too_many_media_items", f"messages[0].content[0].{param}")


async def test_a_video_is_one_item_and_a_list_as_many_as_it_has():
    async with running_system(max_media_items=3) as system:
        await ask(system, RED, video(num_frames=8), video(num_frames=9))
        await ask(system, RED, frames(RED, BLUE))
        response = await system.chat(messages=[user(RED, video(), frames(RED, BLUE))])
        assert (response.status_code, error_of(response)["code"]) == (400, "too_many_media_items")


async def test_the_number_of_frames_is_part_of_what_a_video_is(system):
    requests = [await ask(system, video(num_frames=n)) for n in (2, 3, 2)]
    hashes = [request.images[0].mm_hash for request in requests]
    assert hashes[0] == hashes[2] != hashes[1]


async def test_frames_of_a_list_are_known_again_as_images(system):
    """A frame is an image of one tile, so that both share what is cached."""
    listed = await ask(system, frames(RED))
    alone = await ask(system, image(RED, max_dynamic_patch=1))
    assert listed.images[0].mm_hash == alone.images[0].mm_hash


async def test_videos_wait_with_images():
    async with running_system(max_num_queued_image_reqs=1) as system:
        gate = system.language.at_admission
        gate.is_open.clear()
        waiting = asyncio.create_task(system.chat(messages=[user(video())]))
        await gate.wait_for(lambda gate: gate.num_entered == 1)
        refused = await system.chat(messages=[user(frames(RED))])
        assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
        gate.is_open.set()
        assert (await waiting).status_code == 200


async def test_the_largest_video_reaches_its_server():
    """Through one gRPC message; one byte more is refused before anybody is asked."""
    limit = RouterSettings.model_fields["max_video_bytes"].default
    async with running_system() as system:
        request = await ask(system, video(MP4 + bytes(limit - len(MP4)), num_frames=1))
        assert tiles(request) == [1]
        assert len(system.vision.requests[0].image) == limit
    async with running_system(max_video_bytes=100) as system:
        response = await system.chat(messages=[user(video(MP4 + bytes(100)))])
        error = error_of(response)
        assert (response.status_code, error["code"]) == (413, "request_too_large")
        assert error["param"] == "messages[0].content[0].video_url.url"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_item_bytes", 80 * 2**20),  # more than one message holds
        ("max_video_bytes", 80 * 2**20),
        ("max_video_frames", 257),  # more than a frame header can say
        ("video_frames", 129),  # more than are allowed
        ("vir_mode", "on"),
        ("vir_scope", "batch"),
        ("tile_budget", "half"),
    ],
)
def test_options_that_cannot_be(flag, value):
    with pytest.raises(ConfigError, match=flag):
        RouterSettings.load(["--vision", "a:1", "--language", "b:1", f"--{flag.replace('_', '-')}", str(value)])


async def test_metrics_tell_images_from_videos():
    async with running_system(enable_per_request_metrics=True) as system:
        response = await system.chat(messages=[user(RED, video(), frames(RED, BLUE))])
        stages = response.json()["metrics"]["dvd"]
        assert (stages["images"], stages["videos"], stages["tiles"]) == (1, 2, 11)
        assert (stages["image_tokens"], stages["video_tokens"]) == (256, 2560)
        text = (await system.http.get("/metrics")).text
        kinds = {
            line.split('kind="')[1].split('"')[0] for line in text.splitlines() if "prompt_tokens_total{kind" in line
        }
        assert kinds == {"text", "image", "video"}


async def test_the_answer_names_every_frame(system):
    response = await system.chat(messages=[user(frames(RED, BLUE), "?")])
    said = response.json()["choices"][0]["message"]["content"]
    assert said == f"user: Frame-1: [{digest(RED)}#0] Frame-2: [{digest(BLUE)}#0] ?"


# --- the length of a video


async def test_a_video_that_only_probing_unmasks(system):
    system.vision.probe_failures = [InvalidRequest("the video cannot be read", code="invalid_image")]
    response = await system.chat(messages=[user("x", video(fps=1))])
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "invalid_image")
    assert error["param"] == "messages[0].content[1].video_url.url"
    assert system.language.requests == []
    await system.until_idle()


@pytest.mark.parametrize("failure", [Unavailable("x"), Overloaded("x"), InternalError("x")])
async def test_a_server_that_does_not_probe_is_replaced(failure):
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.probe_failures = [failure]
        system.visions[1].probe_failures = []
        assert tiles(await ask(system, video(fps=1))) == [10]


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
async def test_a_length_that_no_video_has(system, seconds):
    system.vision.length = ProbeReply(seconds=seconds)
    response = await system.chat(messages=[user(video(fps=1))])
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")


async def test_client_leaves_while_a_video_is_measured(system):
    gate = system.vision.at_probe
    gate.is_open.clear()
    request = asyncio.create_task(system.chat(messages=[user(video(fps=1), video(fps=2))]))
    await gate.wait_for(lambda gate: gate.num_entered == 2)
    request.cancel()
    await gate.wait_for(lambda gate: gate.num_cancelled == 2)
    await system.until_idle()


async def test_the_time_of_a_request_includes_measuring(system):
    system.vision.at_probe.is_open.clear()
    body = {"messages": [user(video(fps=1))]}
    response = await system.http.post(CHAT, json=body, headers={"X-Dvd-Deadline-Ms": "300"})
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    await system.until_idle()


async def test_all_frames_of_a_flash_request_are_scored():
    async with running_system(model=FLASH) as system:
        await ask(system, video(num_frames=4), RED)
        assert {len(call.vir.request_scores) for call in system.vision.requests} == {5}
        system.vision.score_requests.clear()
        await ask(system, video(num_frames=4))  # the quantile spans its own frames only
        assert system.vision.score_requests == []
