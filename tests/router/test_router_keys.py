"""A router and its servers over mutual TLS, from the image of a request to the words of its answer."""

import asyncio
from typing import Any

import pytest

from common.service import metrics
from common.service.errors import ConfigError
from common.service.keys import Keys
from deploy.keys import main as make_keys
from deploy.settings import KeysSettings
from router.server import RouterServer
from router.settings import RouterSettings
from tests.router.conftest import png, running_system, user
from tests.router.fakes import FakeVision, digest


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    roots = [tmp_path_factory.mktemp(name) / "keys" for name in ("ours", "theirs")]
    for root in roots:
        make_keys(KeysSettings.load([]), ["init", str(root)])
    return roots


async def test_an_image_becomes_an_answer(roots):
    red = png("red")
    async with running_system(keys=roots[0]) as system:
        response = await system.chat(messages=[user("a", red)])
        assert response.json()["choices"][0]["message"]["content"] == f"user: a [{digest(red)}]"


async def test_a_server_of_another_deployment_is_not_used(roots):
    failures = metrics.AUTH_FAILURES.labels("grpc")
    before = failures._value.get()
    async with running_system(keys=roots[0], wait=False) as system:
        await system.until(lambda: system.router.fleet.is_ready)
        stranger = FakeVision(system.languages, "stranger")
        stranger.keys = Keys(roots[1], "vision")
        await stranger.start()
        try:
            system.router.fleet.set_vision([system.vision.address, stranger.address])
            async with asyncio.timeout(15):
                while failures._value.get() == before:
                    await asyncio.sleep(0.01)
            for _ in range(4):
                assert (await system.chat(messages=[user(png("blue"))])).status_code == 200
        finally:
            await stranger.stop()
        assert (stranger.requests, stranger.num_watching) == ([], 0)
        assert (await system.http.get("/health")).status_code == 200


def test_a_router_with_the_keys_of_another_role_does_not_start(roots):
    options: dict[str, Any] = {"vision": ["a:1"], "language": ["b:1"], "keys": roots[0] / "vision"}
    settings = RouterSettings(**options)
    with pytest.raises(ConfigError, match="it is for the role vision, and this program is router"):
        RouterServer(settings)


async def test_a_router_shows_renewed_keys_to_a_server_that_comes_back(tmp_path, monkeypatch):
    make_keys(KeysSettings.load([]), ["init", str(tmp_path / "keys")])
    shown: list[bytes] = []

    async def watch(request, context):
        shown.extend(context.auth_context()["x509_pem_cert"])
        async for status in FakeVision.WatchStatus(system.vision, request, context):
            yield status

    async with running_system(keys=tmp_path / "keys") as system:
        before = (tmp_path / "keys" / "router" / "tls.crt").read_bytes()
        make_keys(KeysSettings.load([]), ["renew", str(tmp_path / "keys")])
        await system.vision.stop()
        await system.until(lambda: not system.router.fleet.has_vision)
        monkeypatch.setattr(system.vision, "WatchStatus", watch)
        await system.vision.start()
        await system.until(lambda: system.router.fleet.has_vision)
        assert (await system.chat(messages=[user(png("red"))])).status_code == 200
        after = (tmp_path / "keys" / "router" / "tls.crt").read_bytes()
        assert {pem.strip() for pem in shown} == {after.strip()} != {before.strip()}
