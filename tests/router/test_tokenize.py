"""``/tokenize`` and ``/detokenize``: vLLM's shapes, and what is refused or tried again."""

import asyncio
from typing import Any

from common.service.errors import DvdError, InvalidRequest, Overloaded, Unavailable
from tests.router.conftest import error_of, png, running_system, user

UNSUPPORTED = "unsupported_parameter"


async def tokenize(system, **body):
    return await system.http.post("/tokenize", json=body)


async def test_a_prompt(system):
    response = await tokenize(system, prompt="how many shapes")
    assert response.status_code == 200
    assert response.json() == {"count": 3, "max_model_len": 4096, "tokens": [3, 4, 6], "token_strs": None}
    body = (await tokenize(system, model="fake", prompt="how many", return_token_strs=True)).json()
    assert body["token_strs"] == ["how", "many"]
    assert (await tokenize(system, prompt="")).json()["count"] == 0
    assert all(request.raw.add_special_tokens for request in system.language.texts)
    await tokenize(system, prompt="a", add_special_tokens=False)
    assert not system.language.texts[-1].raw.add_special_tokens


async def test_a_conversation_is_read_as_a_chat_would_be(system):
    body = (await tokenize(system, messages=[user("a", png(size=(896, 896)))], return_token_strs=True)).json()
    assert body["token_strs"][:2] == ["user:", " a"]
    (request,) = system.language.texts
    assert list(request.num_tiles) == [5]
    assert not system.language.requests and not system.vision.requests
    metrics = (await system.http.get("/metrics")).text
    assert 'route="/tokenize",status="200"' in metrics


async def test_detokenize(system):
    response = await system.http.post("/detokenize", json={"tokens": [1, 2, 999], "model": None})
    assert response.json() == {"prompt": "1 2 999"}
    assert (await system.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


BAD: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("/tokenize", {}, 400, "invalid_value", "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [user("a")]}, 400, "invalid_value", "prompt"),
    ("/tokenize", {"prompt": ["a"]}, 400, "invalid_value", "prompt"),
    ("/tokenize", {"messages": []}, 400, "invalid_value", "messages"),
    (
        "/tokenize",
        {"messages": [user("a")], "continue_final_message": True},
        400,
        UNSUPPORTED,
        "continue_final_message",
    ),
    ("/tokenize", {"messages": [user("a")], "add_special_tokens": True}, 400, UNSUPPORTED, "add_special_tokens"),
    ("/tokenize", {"messages": [user("a")], "add_generation_prompt": False}, 400, UNSUPPORTED, "add_generation_prompt"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model_not_found", "model"),
    ("/detokenize", {}, 400, "invalid_value", None),
    ("/detokenize", {"tokens": ["a"]}, 400, "invalid_value", "tokens[0]"),
    ("/detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens[0]"),
    ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model_not_found", "model"),
]


async def test_bad_bodies(system):
    for path, body, *expected in BAD:
        response = await system.http.post(path, json=body)
        error = error_of(response)
        assert [response.status_code, error["code"], error["param"]] == expected, str(body)[:99]


async def test_unknown_fields_are_named(system):
    response = await tokenize(system, prompt="a", colour="red", nothing=None)
    assert response.headers["x-dvd-ignored"] == "colour"
    response = await tokenize(system, messages=[user("a")], add_generation_prompt=True, colour="red")
    assert response.headers["x-dvd-ignored"] == "colour"
    response = await system.http.post("/detokenize", json={"tokens": [], "a": 1}, headers={"X-Dvd-Strict": "1"})
    assert error_of(response)["code"] == "unsupported_parameter"


async def test_another_server_is_asked_where_one_fails():
    async with running_system(num_language=2) as system:
        failures: list[DvdError] = [Unavailable("going", code="draining")]
        for language in system.languages:
            language.text_failures = failures  # of whoever is asked first
        assert (await tokenize(system, prompt="a")).status_code == 200
        assert [len(language.texts) for language in system.languages] == [1, 1]


async def test_what_a_server_says_is_told(system):
    system.language.text_failures += [
        InvalidRequest("a reserved token", param="messages"),
        InvalidRequest("a reserved token", param="messages"),
        Overloaded("too many texts"),
    ]
    assert error_of(await tokenize(system, messages=[user("a")]))["param"] == "messages"
    assert error_of(await tokenize(system, prompt="a"))["param"] == "prompt"
    response = await system.http.post("/detokenize", json={"tokens": [1]})
    assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")


async def test_the_time_is_bounded(system):
    system.language.at_text.is_open.clear()
    headers = {"X-Dvd-Deadline-Ms": "50"}
    response = await system.http.post("/tokenize", json={"prompt": "a"}, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")


async def test_a_client_that_leaves_ends_the_call(system):
    gate = system.language.at_text
    gate.is_open.clear()
    asking = asyncio.create_task(tokenize(system, prompt="a"))
    await gate.wait_for(lambda gate: gate.num_entered == 1)
    asking.cancel()
    await gate.wait_for(lambda gate: gate.num_cancelled == 1)


async def test_a_key_is_needed():
    async with running_system(api_key=["sesame"]) as system:
        for path in ("/tokenize", "/detokenize"):
            assert (await system.http.post(path, json={})).status_code == 401
