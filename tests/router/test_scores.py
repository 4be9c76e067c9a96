"""Flash models: what ViR is told, and the exchange of scores between the vision servers of one request."""

import asyncio

import pytest

from common.service.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from protos.status_pb2 import VisionLoad
from protos.vision_pb2 import (
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    VIR_SCOPE_REQUEST,
)
from tests.router.conftest import error_of, png, running_system, user
from tests.router.fakes import FLASH, digest, scores_of

RED, BLUE, WIDE = png("red"), png("blue"), png("green", (1344, 448))
ALL = [user(RED, WIDE), user(BLUE, "?")]


def flash_system(**options):
    return running_system(model=FLASH, **options)


def encodes(system):
    return {call.image_index: call for vision in system.visions for call in vision.requests}


def scored(system):
    return {call.image_hash: vision for vision in system.visions for call in vision.score_requests}


async def test_scores_of_all_images_go_along_with_every_encode():
    async with flash_system() as system:
        assert (await system.chat(messages=ALL)).status_code == 200
        asked = {call.image: call for call in system.vision.score_requests}
        assert len(system.vision.score_requests) == 3
        expected = [score for image in (RED, WIDE, BLUE) for score in scores_of(asked[image])]
        assert len(expected) == 1 + 4 + 1  # three tiles and a thumbnail
        for index, image in enumerate((RED, WIDE, BLUE)):
            call = encodes(system)[index]
            assert list(call.vir.request_scores) == expected
            assert (call.vir.mode, call.vir.scope) == (VIR_MODE_AUTO, VIR_SCOPE_REQUEST)
            assert (call.vir.relative_threshold, call.vir.absolute_threshold) == (0.5, 0.25)
            assert call.image_hash == asked[image].image_hash != call.mm_hash
            assert asked[image].tiling == call.tiling
        mm_hashes = [image.mm_hash for image in system.language.requests[0].images]
        assert mm_hashes == [encodes(system)[index].mm_hash for index in range(3)]


async def test_one_image_needs_nobody_else():
    async with flash_system() as system:
        await system.chat(messages=[user(RED)])
        assert system.vision.score_requests == []
        assert encodes(system)[0].vir.scope == VIR_SCOPE_IMAGE
        assert list(encodes(system)[0].vir.request_scores) == []


@pytest.mark.parametrize(
    ("vir", "mode", "scope"),
    [
        ({"scope": "image"}, VIR_MODE_AUTO, VIR_SCOPE_IMAGE),
        ({"scope": "absolute"}, VIR_MODE_AUTO, VIR_SCOPE_ABSOLUTE),
        ({"mode": "off"}, VIR_MODE_OFF, VIR_SCOPE_IMAGE),
        ({"mode": "force64", "scope": "request"}, VIR_MODE_FORCE64, VIR_SCOPE_IMAGE),
    ],
)
async def test_no_scores_where_images_do_not_depend_on_each_other(vir, mode, scope):
    async with flash_system() as system:
        assert (await system.chat(messages=ALL, dvd={"vir": vir})).status_code == 200
        assert system.vision.score_requests == []
        assert {(call.vir.mode, call.vir.scope) for call in system.vision.requests} == {(mode, scope)}


async def test_defaults_come_from_the_options_and_thresholds_from_the_request():
    async with flash_system(vir_mode="off", vir_scope="absolute") as system:
        await system.chat(messages=[user(RED)])
        vir = {"mode": "auto", "relative_threshold": 0, "absolute_threshold": 1}
        response = await system.chat(messages=[user(RED)], dvd={"vir": vir})
        assert "x-dvd-ignored" not in response.headers
        first, second = (call.vir for call in system.vision.requests)
        assert (first.mode, first.scope, first.absolute_threshold) == (VIR_MODE_OFF, VIR_SCOPE_ABSOLUTE, 0.25)
        assert (second.mode, second.relative_threshold, second.absolute_threshold) == (VIR_MODE_AUTO, 0, 1)


async def test_a_base_model_has_no_options(system):
    for vir in (None, {}, {"mode": "off"}, {"mode": "auto", "scope": "image"}):
        assert (await system.chat(messages=[user(RED, BLUE)], dvd={"vir": vir})).status_code == 200
    assert system.vision.score_requests == []
    for call in system.vision.requests:
        assert not call.HasField("vir")
        assert call.image_hash == call.mm_hash


async def test_routes_depend_on_the_other_images_of_the_request():
    async with flash_system() as system:
        for messages in ([user(RED)], [user(RED, BLUE)], [user(BLUE, RED)], [user(RED, BLUE, BLUE)], [user(RED)]):
            await system.chat(messages=messages)
        of_red = [call.mm_hash for call in system.vision.requests if call.image == RED]
        assert len({call.image_hash for call in system.vision.requests}) == 2
        alone, with_blue, after_blue, with_two, again = of_red
        assert alone == again
        assert with_blue == after_blue
        assert len({alone, with_blue, with_two}) == 3


async def test_all_images_are_scored_even_if_one_is_missing():
    async with flash_system() as system:
        system.language.keeps_features = True
        await system.chat(messages=ALL)
        system.language.resident = dict(list(system.language.resident.items())[:2])
        system.vision.score_requests.clear()
        system.vision.requests.clear()
        await system.chat(messages=ALL)
        assert len(system.vision.score_requests) == 3
        [call] = system.vision.requests
        assert call.image == BLUE
        assert len(call.vir.request_scores) == 6


async def test_no_scores_if_nothing_is_missing():
    async with flash_system() as system:
        system.language.keeps_features = True
        first = await system.chat(messages=ALL)
        system.vision.score_requests.clear()
        second = await system.chat(messages=ALL)
        assert system.vision.score_requests == []
        assert len(system.vision.requests) == 3
        assert first.json()["choices"] == second.json()["choices"]


async def test_images_are_spread_and_encoded_where_they_were_scored():
    """The gate lets no score pass before all are asked for: their load spreads them, whatever their hashes.

    One server is overloaded in between. It keeps its images: it has done most of the work for them.
    """
    images = [png(f"#0000{index:02x}", (1344, 448)) for index in range(8)]
    async with flash_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_score.is_open.clear()
        request = asyncio.create_task(system.chat(messages=[user(*images)]))
        async with asyncio.timeout(10):
            while sum(vision.at_score.num_entered for vision in system.visions) < len(images):
                await asyncio.sleep(0.01)
        assert min(vision.at_score.num_entered for vision in system.visions) >= 3
        system.vision.change(load=VisionLoad(queued_tiles=1000))
        await system.until(lambda: system.router.fleet.vision[0].total_load == 1000)
        for vision in system.visions:
            vision.at_score.is_open.set()
        assert (await request).status_code == 200
        for vision in system.visions:
            asked = {call.image_hash for call in vision.score_requests}
            assert {call.image_hash for call in vision.requests} == asked
        assert len({tuple(call.vir.request_scores) for call in encodes(system).values()}) == 1
        await system.until_idle()


async def test_a_server_lost_while_it_scores_is_replaced():
    async with flash_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_score.is_open.clear()
        request = asyncio.create_task(system.chat(messages=ALL))
        async with asyncio.timeout(10):
            while sum(vision.at_score.num_entered for vision in system.visions) < 3:
                await asyncio.sleep(0.01)
        lost, other = system.visions
        await lost.stop()
        other.at_score.is_open.set()
        response = await request
        assert response.status_code == 200
        text = f"user: [{digest(RED)}] [{digest(WIDE)}] user: [{digest(BLUE)}] ?"
        assert response.json()["choices"][0]["message"]["content"] == text
        assert len(other.score_requests) == 3
        assert lost.requests == []
        await system.until_idle()


async def test_a_server_lost_after_it_scored_is_replaced():
    async with flash_system(num_vision=2) as system:
        for vision in system.visions:
            vision.at_encode.is_open.clear()
        request = asyncio.create_task(system.chat(messages=ALL))
        async with asyncio.timeout(10):
            while sum(vision.at_encode.num_entered for vision in system.visions) < 3:
                await asyncio.sleep(0.01)
        lost = max(system.visions, key=lambda vision: vision.at_encode.num_entered)
        other = next(vision for vision in system.visions if vision is not lost)
        await lost.stop()
        other.at_encode.is_open.set()
        assert (await request).status_code == 200
        assert sum(len(vision.score_requests) for vision in system.visions) == 3  # scores are not asked for again
        assert {len(call.vir.request_scores) for call in other.requests} == {6}
        assert {
            call.attempt for call in other.requests if call.image_hash in {c.image_hash for c in lost.requests}
        } == {1}
        await system.until_idle()


@pytest.mark.parametrize("failure", [Unavailable("x"), Overloaded("x"), InternalError("x")])
async def test_a_server_that_refuses_to_score_is_replaced(failure):
    async with flash_system(num_vision=2) as system:
        system.vision.score_failures = [failure] * 3
        assert (await system.chat(messages=ALL)).status_code == 200
        assert set(scored(system)) == {call.image_hash for call in encodes(system).values()}


async def test_nobody_scores():
    async with flash_system(num_vision=2) as system:
        for vision in system.visions:
            vision.score_failures = [Overloaded("full")] * 3
        response = await system.chat(messages=ALL)
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        assert encodes(system) == {}
        await system.until_idle()


@pytest.mark.parametrize("scores", [[], [0.5] * 7, [float("nan")], [float("inf")]])
async def test_scores_that_cannot_be_are_an_error_of_ours(scores):
    async with flash_system() as system:
        system.vision.scores = lambda request: scores
        response = await system.chat(messages=[user(RED, BLUE)])
        assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
        assert system.vision.requests == []
        await system.until_idle()


async def test_an_image_that_only_scoring_unmasks():
    async with flash_system(num_vision=2) as system:
        for vision in system.visions:
            vision.score_failures = [InvalidRequest("the image cannot be read", code="invalid_image")] * 3
        response = await system.chat(messages=[user("x", RED, BLUE)])
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "invalid_image")
        assert error["param"] in {f"messages[0].content[{index}].image_url.url" for index in (1, 2)}
        assert sum(len(vision.score_requests) for vision in system.visions) <= 2
        await system.until_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_while_images_are_scored(stream):
    async with flash_system() as system:
        gate = system.vision.at_score
        gate.is_open.clear()
        request = asyncio.create_task(system.chat(messages=ALL, stream=stream))
        await gate.wait_for(lambda gate: gate.num_entered == 3)
        request.cancel()
        await gate.wait_for(lambda gate: gate.num_cancelled == 3)
        await system.until_idle()
        assert system.vision.requests == []
        assert all(worker.load == 0 for worker in system.router.fleet.workers)


async def test_the_time_of_a_request_includes_its_scores():
    async with flash_system() as system:
        system.vision.at_score.is_open.clear()
        headers = {"X-Dvd-Deadline-Ms": "300"}
        response = await system.http.post("/v1/chat/completions", json={"messages": ALL}, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        await system.until_idle()


async def test_usage_and_metrics_tell_what_was_saved(system):
    async with flash_system(enable_per_request_metrics=True) as flash:
        before = await saved(flash)
        body = (await flash.chat(messages=ALL)).json()
        assert body["usage"]["prompt_tokens_details"]["saved_tokens"] == 192
        assert await saved(flash) == before + 192
        assert body["metrics"]["dvd"]["score_ms"] > 0
    assert "saved_tokens" not in (await system.chat(messages=ALL)).json()["usage"]["prompt_tokens_details"]


async def saved(system) -> float:
    text = (await system.http.get("/metrics")).text
    [line] = [line for line in text.splitlines() if line.startswith("dvd_saved_prompt_tokens_total{")]
    return float(line.rpartition(" ")[2])
