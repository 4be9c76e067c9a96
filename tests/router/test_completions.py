"""``POST /v1/completions``: OpenAI's older shapes, as its client sees them, and several prompts in one request."""

import asyncio
import json
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI

from common.service.errors import InternalError, InvalidRequest
from tests.router.conftest import error_of, running_system
from tests.router.test_chat import events

UNSUPPORTED = "unsupported_parameter"


async def complete(system, prompt: Any = "once upon a", **body):
    return await system.http.post("/v1/completions", json={"prompt": prompt, **body})


def texts(response):
    return [choice["text"] for choice in response.json()["choices"]]


async def test_full_answer(system):
    response = await complete(system)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("cmpl-") and body["created"] > 0
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    assert body["choices"] == [{"index": 0, "text": "once upon a", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 3, "multimodal_tokens": {"image": 0, "video": 0}},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    (request,) = system.language.requests
    assert request.raw.text == "once upon a" and request.raw.add_special_tokens
    assert not request.messages and not request.sampling.separate_reasoning
    assert request.sampling.max_tokens == 16


async def test_stream(system):
    response = await complete(system, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["once", " upon", " a", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1
    *chunks, _ = events((await complete(system, stream=True, echo=True)).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["once upon aonce", " upon", " a", ""]
    assert all("usage" not in chunk for chunk in chunks)


async def test_text_that_was_held_back_comes_with_the_end(system):
    system.language.held = ("", "!")
    assert texts(await complete(system, "a")) == ["a!"]
    *_, end, _ = events((await complete(system, "a", stream=True)).text)
    assert end["choices"] == [{"index": 0, "text": "!", "logprobs": None, "finish_reason": "stop"}]


async def test_several_prompts_each_with_several_choices(system):
    response = await complete(system, ["a b", "c"], n=2, echo=True)
    assert texts(response) == ["a ba b", "a ba b", "cc", "cc"]
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2, 3]
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (20, 6, 26)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 6
    first, second = system.language.requests
    assert first.request_id != second.request_id and first.sampling.seed != second.sampling.seed
    *chunks, done = events((await complete(system, ["a b", "c"], n=2, stream=True, return_token_ids=True)).text)
    assert done == "[DONE]"
    said = dict.fromkeys(range(4), "")
    for choice in (chunk["choices"][0] for chunk in chunks):
        said[choice["index"]] += choice["text"]
    assert said == {0: "a b", 1: "a b", 2: "c", 3: "c"}
    assert sum(len(chunk["choices"][0].get("token_ids", ())) for chunk in chunks) == 6
    await system.until_idle()
    metrics = (await system.http.get("/metrics")).text
    assert 'route="/v1/completions",status="200"' in metrics


async def test_token_ids(system):
    for prompt, wanted in (([1, 2], [[1, 2]]), ([[3], [4, 5]], [[3], [4, 5]])):
        system.language.requests.clear()
        system.language.words = ["x"]
        response = await complete(system, prompt)
        assert texts(response) == ["x"] * len(wanted)
        asked = [list(request.raw.token_ids.ids) for request in system.language.requests]
        assert sorted(asked) == wanted


async def test_logprobs(system):
    (choice,) = (await complete(system, "ab c", logprobs=2)).json()["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.5, -0.5],
        "tokens": ["ab", " c"],
        "top_logprobs": [{"ab": -0.5}, {" c": -0.5}],
    }
    assert (await complete(system, "ab", logprobs=0)).json()["choices"][0]["logprobs"]["top_logprobs"] == [{"ab": -0.5}]
    chunks = events((await complete(system, "ab c", logprobs=1, stream=True)).text)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:2]] == [[0], [2]]
    assert chunks[2]["choices"][0]["logprobs"] is None


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": ["a", 1]}, "invalid_value", "prompt"),
    ({"prompt": ["a", None]}, "invalid_value", "prompt[1]"),
    ({"prompt": [[1], [-1]]}, "invalid_value", "prompt[1][0]"),
    ({"prompt": {"a": 1}}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 65}, "invalid_value", "prompt"),
    ({"suffix": "end"}, UNSUPPORTED, "suffix"),
    ({"best_of": 2}, UNSUPPORTED, "best_of"),
    ({"echo": True, "logprobs": 1}, UNSUPPORTED, "echo"),
    ({"echo": True, "prompt": [1]}, UNSUPPORTED, "echo"),
    ({"prompt_logprobs": 0}, UNSUPPORTED, "prompt_logprobs"),
    ({"response_format": {"type": "json_object"}}, UNSUPPORTED, "response_format"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"n": 65}, "invalid_value", "n"),
    ({"stream_options": {}}, "invalid_value", "stream_options"),
    ({"model": "other"}, "model_not_found", "model"),
]


async def test_bad_bodies(system):
    for body, *expected in BAD:
        error = error_of(await system.http.post("/v1/completions", json={"prompt": "a", **body}))
        assert [error["code"], error["param"]] == expected, str(body)[:99]
    assert not system.language.requests


async def test_far_too_long_prompts(system, monkeypatch):
    monkeypatch.setattr("router.api.translate_text.MAX_PROMPT_BYTES", 99)
    for path, prompt, param in (
        ("/v1/completions", "b" * 99, "prompt"),
        ("/v1/completions", [900] * 50, "prompt"),
        ("/v1/completions", ["a", "b" * 99], "prompt[1]"),
        ("/tokenize", "b" * 99, "prompt"),
    ):
        error = error_of(await system.http.post(path, json={"prompt": prompt}))
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert not system.language.requests and not system.language.texts


async def test_what_asks_for_nothing_is_answered(system):
    response = await complete(
        system, "a", suffix="", best_of=1, logprobs=None, stop=None, response_format={"type": "text"}, colour="red"
    )
    assert response.status_code == 200
    assert response.headers["x-dvd-ignored"] == "colour"


async def test_a_server_that_refuses_a_prompt_names_it(system):
    system.language.fail_with = InvalidRequest("too long", code="context_length_exceeded", param="messages")
    assert error_of(await complete(system))["param"] == "prompt"
    error = error_of(await complete(system, ["a", "b"]))
    assert error["code"] == "context_length_exceeded" and error["param"].startswith("prompt[")
    await system.until_idle()


async def test_admission_counts_every_prompt():
    async with running_system(max_num_queued_reqs=2) as system:
        assert (await complete(system, ["a", "b", "c"])).status_code == 503
        assert (await complete(system, ["a", "b"])).status_code == 200
        assert system.router.admission.num_running == 0


async def test_another_server_goes_on(monkeypatch):
    monkeypatch.setattr("router.fleet.RETURN_SECONDS", 0.3)
    async with running_system(num_language=2) as system:
        for language in system.languages:
            language.on_break = lambda: _only_once(system)
            language.break_after = 1
        assert texts(await complete(system, "a b c")) == ["a b c"]


async def _only_once(system):
    for language in system.languages:
        language.break_after = None


async def test_a_failure_in_the_middle_of_a_stream_and_the_official_client(system):
    client = AsyncOpenAI(base_url=f"{system.url}/v1", api_key="x", max_retries=0)
    answer = await client.completions.create(model="fake", prompt="a b", logprobs=1)
    assert answer.choices[0].text == "a b" and answer.usage is not None
    system.language.fail_after = (1, InternalError("broken"))
    stream = await client.completions.create(model="fake", prompt="a b", stream=True)
    with pytest.raises(APIError) as caught:
        assert [chunk.choices[0].text async for chunk in stream]
    assert caught.value.code == "internal_error"
    await client.close()


async def test_a_client_that_leaves_ends_every_prompt(system):
    gate = system.language.at_token
    gate.is_open.clear()
    asking = asyncio.create_task(complete(system, ["a", "b"]))
    await gate.wait_for(lambda gate: gate.num_entered == 2)
    asking.cancel()
    await gate.wait_for(lambda gate: gate.num_cancelled == 2)
    await system.until_idle()


async def test_stage_times_and_deadlines():
    async with running_system(enable_per_request_metrics=True) as system:
        assert (await complete(system, "a")).json()["metrics"]["queue_time_ms"] == 1
        chunks = events((await complete(system, ["a", "b"], stream=True)).text)
        assert [len(chunk.get("metrics", ())) for chunk in chunks[:-1]] == [0, 0, 0, 2]
        system.language.at_admission.is_open.clear()
        response = await system.http.post(
            "/v1/completions", content=json.dumps({"prompt": "a"}), headers={"X-Dvd-Deadline-Ms": "100"}
        )
        assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
