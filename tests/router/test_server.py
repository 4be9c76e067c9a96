"""Doors, lists and probes: authentication, ``/v1/models``, ``/metrics``, ``/version``, and the process itself."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from common.service.errors import ConfigError
from router.__main__ import main, run
from router.server import RouterServer
from router.settings import RouterSettings
from tests.router.conftest import CHAT, error_of, png, running_system, user
from tests.router.fakes import FakeLanguage, FakeVision


async def test_models(system):
    listed = (await system.http.get("/v1/models")).json()
    (entry,) = listed["data"]
    assert entry.pop("created") > 0
    assert entry == {"id": "fake", "object": "model", "owned_by": "dvd", "root": "fake", "max_model_len": 4096}
    assert (await system.http.get("/v1/models/fake")).json()["id"] == "fake"


async def test_served_names_are_aliases():
    async with running_system(served_model_name=["team/vl", "vl"]) as system:
        listed = (await system.http.get("/v1/models")).json()
        assert [entry["id"] for entry in listed["data"]] == ["team/vl", "vl"]
        assert (await system.http.get("/v1/models/team/vl")).status_code == 200
        assert (await system.chat(model="vl")).json()["model"] == "vl"
        assert (await system.chat(model=None)).json()["model"] == "team/vl"
        assert (await system.chat(model="fake")).status_code == 404


async def test_version_and_metrics(system):
    assert (await system.http.get("/load")).json() == {"server_load": 0}
    version = (await system.http.get("/version")).json()
    assert set(version) == {"version", "wire_version"}
    await system.chat(messages=[user(png(), "x")])
    text = (await system.http.get("/metrics")).text
    assert 'dvd_http_requests_total{method="POST",model="' in text
    assert 'route="/v1/chat/completions",status="200"' in text
    assert 'dvd_servers{model="' in text
    assert "dvd_time_to_first_token_seconds_bucket" in text
    assert "dvd_vision_items" not in text


PATHS = ["/v1/models", "/v1/models/fake", "/metrics", "/load", "/version", "/nothing", "/live/", "//live", "/health/x"]


async def test_every_route_but_the_probes_needs_a_key():
    async with running_system(api_key=["sesame", "other"]) as system:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}, {"Host": "x/live?"}):
            for path in PATHS:
                response = await system.http.get(path, headers=headers)
                assert response.status_code == 401, path
                assert error_of(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            assert (await system.http.post(CHAT, json={"messages": [user("x")]}, headers=headers)).status_code == 401
        assert (await system.http.get("/live")).status_code == 200
        assert (await system.http.get("/health")).status_code == 200
        for key in ("sesame", "other"):
            headers = {"Authorization": f"bearer {key}"}
            assert (await system.http.post(CHAT, json={"messages": [user(png())]}, headers=headers)).status_code == 200
        first, second = system.language.requests
        assert first.cache_scope != second.cache_scope != ""
        assert first.images[0].mm_hash != second.images[0].mm_hash


async def test_a_root_path_may_be_there_or_not():
    async with running_system(root_path="/team/vl", api_key=["k"]) as system:
        for path, status in {
            "/team/vl/live": 200,
            "/live": 200,
            "/team/vl/v1/models": 401,
            "/team/vl/team/vl/live": 401,
            "/team/vl": 401,
            "/team/vlive": 401,
        }.items():
            assert (await system.http.get(path)).status_code == status, path
        headers = {"Authorization": "Bearer k"}
        body = {"messages": [user("x")]}
        assert (await system.http.post(f"/team/vl{CHAT}", json=body, headers=headers)).status_code == 200
        assert (await system.http.get("/team/vl", headers=headers)).status_code == 404


PAGE = {"Origin": "https://page.example"}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}


async def test_no_page_of_another_origin_by_default(system):
    response = await system.http.get("/v1/models", headers=PAGE)
    assert not {name for name in response.headers if name.startswith("access-control")}
    assert (await system.http.options(CHAT, headers={**PAGE, **PREFLIGHT})).status_code == 405


async def test_pages_of_allowed_origins():
    async with running_system(allowed_origins=["https://page.example"], api_key=["k"]) as system:
        asked = await system.http.options(CHAT, headers={**PAGE, **PREFLIGHT})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE["Origin"]
        assert asked.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert "access-control-allow-credentials" not in asked.headers
        assert asked.headers["x-request-id"]
        refused = await system.http.options(CHAT, headers={"Origin": "https://evil.example", **PREFLIGHT})
        assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_value")
        assert "access-control-allow-origin" not in refused.headers
        # A preflight opens nothing: the request itself needs the key, and the page may read why it was refused.
        without_key = await system.http.post(CHAT, json={"messages": [user("x")]}, headers=PAGE)
        assert (without_key.status_code, error_of(without_key)["code"]) == (401, "invalid_api_key")
        assert without_key.headers["access-control-allow-origin"] == PAGE["Origin"]
        plain = await system.http.options(CHAT, headers=PAGE)
        assert plain.status_code == 401
        headers = {"Authorization": "Bearer k", **PAGE}
        answer = await system.http.post(CHAT, json={"messages": [user("x")], "stream": True}, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE["Origin"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await system.http.get("/live", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "flag",
    ["--allowed-origins=page.example", "--allowed-origins=https://page.example/", "--root-path=api", "--root-path=/a/"],
)
def test_origins_and_root_paths_that_are_none(flag):
    with pytest.raises(ConfigError):
        RouterSettings.load(["--vision", "a:1", "--language", "b:2", flag])


async def test_without_keys_any_bearer_will_do(system):
    assert (await system.http.get("/v1/models", headers={"Authorization": "Bearer"})).status_code == 200


async def test_nothing_but_http():
    async def unused(*message):
        raise AssertionError

    router = RouterServer(RouterSettings.load(["--vision", "127.0.0.1:1", "--language", "127.0.0.1:1"]))
    with pytest.raises(RuntimeError):
        await router({"type": "websocket"}, unused, unused)
    await router.fleet.close()


def test_settings_take_lists_with_commas():
    settings = RouterSettings.load(["--vision", "a:1,b:2", "--language", "c:3", "--api-key", "k1", "--api-key", "k2"])
    assert settings.vision == ["a:1", "b:2"]
    assert settings.language == ["c:3"]
    assert [key.get_secret_value() for key in settings.api_key] == ["k1", "k2"]
    assert "k1" not in settings.dump()


def test_the_router_never_imports_a_tensor_library():
    """Its process costs what a gateway costs."""
    code = (
        "import sys, router.__main__, router.server;"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'safetensors'} & sys.modules.keys();"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("way", ["tcp", "uds", "dns"])
async def test_the_program(tmp_path, way):
    """Start, ready line, announcement, an answer, SIGTERM, exit 0; servers by address and by name."""
    language = FakeLanguage()
    vision = FakeVision([language])
    announcement = tmp_path / "router.json"
    socket_path = tmp_path / "router.sock"
    where = ["--uds", str(socket_path)] if way == "uds" else ["--port", "0"]
    for worker in (language, vision):
        await worker.start()
    servers = [server.address for server in (vision, language)]
    if way == "dns":
        servers = [f"dns:localhost:{address.rpartition(':')[2]}" for address in servers]
    arguments = ["--vision", servers[0], "--language", servers[1], "--announce", str(announcement)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", *arguments, *where), stdout=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        address = json.loads(announcement.read_text())["address"]
        assert ready.strip().endswith("model fake vision x1 language x1")
        assert address in ready
        transport = httpx.AsyncHTTPTransport(uds=str(socket_path) if way == "uds" else None)
        url = "http://router" if way == "uds" else f"http://{address}"
        async with httpx.AsyncClient(base_url=url, transport=transport, timeout=20) as client:
            assert (await client.get("/health")).status_code == 200
            response = await client.post(CHAT, json={"messages": [user("hello", png())]})
            assert response.json()["choices"][0]["message"]["content"].startswith("user: hello [")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for worker in (language, vision):
            await worker.stop()


async def test_the_program_waits_for_servers_and_says_so(unused_tcp_port):
    missing = f"127.0.0.1:{unused_tcp_port}"
    arguments = ["--port", "0", "--vision", missing, "--language", missing, "--log-level", "warning"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", *arguments), stderr=subprocess.PIPE, env=environment
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            said = [(await process.stderr.readline()).decode() for _ in range(2)]
        for tier in ("vision", "language"):
            line = f"waiting for {tier} server {missing}: cannot be reached (connection refused)\n"
            assert [each.endswith(line) for each in said].count(True) == 1, said
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_taken_port_is_a_start_up_error(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--port", port, "--vision", "127.0.0.1:1", "--language", "127.0.0.1:1"]) == 2
    assert "cannot listen" in capfd.readouterr().err


async def test_an_announcement_that_cannot_be_written_stops_the_router(tmp_path):
    language = FakeLanguage()
    vision = FakeVision([language])
    for worker in (language, vision):
        await worker.start()
    where = str(tmp_path / "no" / "such" / "place.json")
    settings = RouterSettings.load(
        ["--port", "0", "--vision", vision.address, "--language", language.address, "--announce", where]
    )
    with pytest.raises(ConfigError):
        await asyncio.wait_for(run(settings), 20)
    for worker in (language, vision):
        await worker.stop()


def test_missing_servers_are_a_start_up_error(capfd):
    assert main([]) == 2
    assert "--vision is required" in capfd.readouterr().err
