"""``GET /health/deep``: both tiers take part, and however often it is asked for they do so seldom."""

import asyncio

import pytest

from common.service.errors import InternalError, InvalidRequest
from tests.router.conftest import error_of, running_system

DEEP = "/health/deep"


async def test_both_tiers_take_part_once(system):
    first, *others = await asyncio.gather(*(system.http.get(DEEP) for _ in range(4)))
    assert first.status_code == 200, first.text
    body = first.json()
    assert (body["status"], body["metrics"]["dvd"]["encode_attempts"]) == ("ok", 1)
    assert [other.json()["metrics"] for other in others] == [body["metrics"]] * 3
    assert len(system.vision.requests) == 1
    (request,) = system.language.requests
    assert (request.sampling.max_tokens, request.sampling.temperature, len(request.images)) == (1, 0, 1)
    await system.until_idle()


async def test_no_cache_can_answer_for_the_vision_tier(system, monkeypatch):
    monkeypatch.setattr("router.api.deep_health.RESULT_SECONDS", 0)
    system.language.keeps_features = True
    for _ in range(2):
        assert (await system.http.get(DEEP)).status_code == 200
    assert len(system.vision.requests) == 2


@pytest.mark.parametrize("failure", [InternalError("broken"), InvalidRequest("this image cannot be read")])
async def test_a_failure_is_kept_as_well_and_is_not_the_clients(system, failure):
    system.vision.failures = [failure]
    for _ in range(2):
        response = await system.http.get(DEEP)
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"
    assert len(system.vision.requests) == 1
    await system.until_idle()


async def test_a_tier_that_hangs_fails_the_check(system, monkeypatch):
    monkeypatch.setattr("router.api.deep_health.TIMEOUT_SECONDS", 0.2)
    system.vision.at_encode.is_open.clear()
    response = await system.http.get(DEEP)
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    await system.until_idle()


async def test_it_needs_a_key_and_servers_and_a_router_that_stays(unused_tcp_port):
    nobody = [f"127.0.0.1:{unused_tcp_port}"]
    async with running_system(start_workers=False, api_key=["key"], vision=nobody, language=nobody) as system:
        assert (await system.http.get(DEEP)).status_code == 401
        headers = {"Authorization": "Bearer key"}
        response = await system.http.get(DEEP, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        await system.router.drain()
        response = await system.http.get(DEEP, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (503, "draining")
