"""The playground over HTTP: its files, their headers, who may have them, and what /pipeline tells to whom."""

import asyncio
from importlib.resources import files

import msgspec
import pytest

from deploy.settings import ServeSettings
from router.api.exchange import Exchange
from router.ui.recent import MAX_REQUESTS, Recent
from tests.router.conftest import CHAT, error_of, png, running_system, user

PAGE = ("/", "/ui/main.js", "/ui/style.css", "/ui/icon.svg")


async def test_the_page_and_its_headers():
    async with running_system(playground=True) as system:
        for path in PAGE:
            response = await system.http.get(path)
            assert response.status_code == 200, path
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert not {name for name in response.headers if name.startswith("access-control")}
            policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        page = (await system.http.get("/")).text
        assert "<style" not in page
        assert "style=" not in page
        assert "https:" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")


async def test_an_unchanged_file_is_not_sent_again():
    async with running_system(playground=True) as system:
        first = await system.http.get("/ui/main.js")
        again = await system.http.get("/ui/main.js", headers={"If-None-Match": f'"x", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert "content-length" not in again.headers
        other = await system.http.get("/ui/main.js", headers={"If-None-Match": '"x"'})
        assert other.content == first.content


def test_no_script_writes_markup():
    folder = files("router.ui") / "static"
    scripts = [file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith(".js")]
    assert len(scripts) > 5
    assert not [script for script in scripts if "innerHTML" in script or "http:" in script or "eval(" in script]


@pytest.mark.parametrize("path", ["/ui/", "/ui/nothing.js", "/ui/index.html", "/ui/../server.py", "/ui/%2e%2e/page.py"])
async def test_nothing_else_is_served(path):
    async with running_system(playground=True) as system:
        assert error_of(await system.http.get(path))["code"] == "not_found"


async def test_off_is_off(system):
    for path in (*PAGE, "/pipeline"):
        assert (await system.http.get(path)).status_code == 404


async def test_the_page_is_open_and_what_it_asks_is_not():
    async with running_system(playground=True, api_key=["sesame"]) as system:
        for path in PAGE:
            assert (await system.http.get(path)).status_code == 200
        for path in ("/pipeline", "/ui/nothing.js", "//ui/main.js", "/ui", "/ui/main.js/", "/v1/models"):
            assert (await system.http.get(path)).status_code == 401, path
        headers = {"Authorization": "Bearer sesame"}
        assert (await system.http.get("/pipeline", headers=headers)).status_code == 200


async def test_every_route_of_it_is_described():
    async with running_system(playground=True, api_key=["k"]) as system:
        document = (await system.http.get("/openapi.json", headers={"Authorization": "Bearer k"})).json()
    security = {
        path: operations["get"]["security"] for path, operations in document["paths"].items() if "get" in operations
    }
    assert security["/"] == security["/ui/{name}"] == []
    assert security["/pipeline"] == [{"key": []}]


async def test_servers_and_requests():
    async with running_system(playground=True) as system:
        nothing = (await system.http.get("/pipeline")).json()
        assert nothing["state"] == "ready"
        assert nothing["requests"] == []
        assert {(server["tier"], server["name"], server["state"]) for server in nothing["servers"]} == {
            ("vision", "vision-0", "ready"),
            ("language", "language-0", "ready"),
        }
        body = {"messages": [user(png(), "a secret question")], "user": "somebody"}
        await system.http.post(CHAT, json=body, headers={"X-Request-Id": "mine"})
        answer = await system.http.get("/pipeline")
        assert "secret" not in answer.text
        assert "somebody" not in answer.text
        (request,) = answer.json()["requests"]
        assert (request["id"], request["state"], request["images"], request["tiles"]) == ("mine", "ok", 1, 1)
        stages = {stage["stage"]: stage for stage in request["stages"]}
        assert {"receive", "fetch", "queue", "encode", "prefill", "decode"} <= stages.keys()
        assert stages["encode"]["server"] == "vision-0"
        assert all(0 <= stage["start_ms"] <= stage["end_ms"] <= request["total_ms"] for stage in stages.values())


async def test_what_has_ended_is_told_once():
    async with running_system(playground=True) as system:
        await system.chat()
        first = (await system.http.get("/pipeline")).json()
        await system.chat(messages=[user("x")], model="unknown")
        second = (await system.http.get("/pipeline", params={"since": first["cursor"]})).json()
        assert [(request["state"], request["code"]) for request in second["requests"]] == [
            ("failed", "model_not_found")
        ]
        for cursor in ("", "x", "00000000.1", f"{second['cursor']}9" * 9):
            everything = (await system.http.get("/pipeline", params={"since": cursor})).json()
            assert len(everything["requests"]) == 2


async def test_a_running_request_is_seen_and_so_is_a_client_that_leaves():
    async with running_system(playground=True) as system:
        system.vision.at_encode.is_open.clear()
        asking = asyncio.create_task(system.chat(messages=[user(png())]))
        await system.vision.at_encode.wait_for(lambda gate: gate.num_entered == 1)
        (request,) = (await system.http.get("/pipeline")).json()["requests"]
        assert request["state"] == "running"
        assert [stage["stage"] for stage in request["stages"] if stage["end_ms"] is None] == ["encode", "prefill"]
        asking.cancel()
        await system.until_idle()
        (request,) = (await system.http.get("/pipeline")).json()["requests"]
        assert request["state"] == "left"
        assert None not in [stage["end_ms"] for stage in request["stages"]]


async def test_each_key_sees_its_own_requests():
    async with running_system(playground=True, api_key=["one", "two"]) as system:
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": f"of-{key}"}
            await system.http.post(CHAT, json={"messages": [user("x")]}, headers=headers)
        for key in ("one", "two"):
            view = (await system.http.get("/pipeline", headers={"Authorization": f"Bearer {key}"})).json()
            assert [request["id"] for request in view["requests"]] == [f"of-{key}"]


def test_only_the_latest_are_kept():
    recent = Recent()
    exchanges = [Exchange({"method": "POST", "path": CHAT, "headers": []}, unused) for _ in range(MAX_REQUESTS + 5)]
    for exchange in exchanges:
        recent.begin(exchange)
    recent.end(exchanges[0])  # nobody remembers it
    assert recent.num_ended == 0
    recent.end(exchanges[-1])
    told = [msgspec.json.decode(raw) for raw in recent.of("")]
    assert [request["id"] for request in told] == [exchange.record.request_id for exchange in exchanges[5:]]
    assert len(recent.of("", recent.num_ended)) == MAX_REQUESTS - 1
    assert recent.of("another tenant") == []


async def unused(message):
    raise AssertionError


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"api_key": ["k"]}, False),
        ({"api_key": ["k"], "playground": True}, True),
        ({"playground": False}, False),
    ],
)
def test_dvd_serve_has_one_unless_there_are_keys(options, expected):
    assert ServeSettings(model="nano", **options).has_playground is expected
