"""Answers: their shapes, streaming and not, as the official client sees them."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, OpenAI

from common.service.errors import InternalError, InvalidRequest, Unavailable
from protos.language_pb2 import Choices, Grammar
from tests.router.conftest import CHAT, data_url, png, running_system, user
from tests.router.fakes import digest


def events(text: str) -> list:
    """Parsed ``data:`` events in order; ``[DONE]`` stays a string."""
    payloads = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in payloads]


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Nobody comes back here."""
    monkeypatch.setattr("router.fleet.RETURN_SECONDS", 0.3)
    monkeypatch.setattr("router.language_search.PATIENCE_SECONDS", 0.3)


async def test_full_answer(system):
    response = await system.chat()
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "user: hello",
                "refusal": None,
                "reasoning_content": None,
                "reasoning": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3, "multimodal_tokens": {"image": 0, "video": 0}},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert "metrics" not in body


@pytest.mark.parametrize("seals", [False, True])
async def test_a_vision_server_is_told_whether_features_travel_sealed(system, seals):
    system.language.seals_features = seals
    response = await system.chat(messages=[user("what is it?", png("red"))])
    assert response.status_code == 200
    assert [request.seals_features for request in system.vision.requests] == [seals]


async def test_images_reach_the_right_places(system):
    red, blue = png("red"), png("blue")
    response = await system.chat(messages=[user("a", red, "b"), {"role": "assistant", "content": "c"}, user(blue, "d")])
    content = response.json()["choices"][0]["message"]["content"]
    assert content == f"user: a [{digest(red)}] b assistant: c user: [{digest(blue)}] d"
    assert response.json()["usage"]["prompt_tokens_details"]["multimodal_tokens"] == {"image": 512, "video": 0}
    calls = system.vision.requests
    assert {call.image for call in calls} == {red, blue}
    assert {call.image_index for call in calls} == {0, 1}
    assert all(call.attempt == 0 and len(call.mm_hash) == 32 for call in calls)


async def test_stream_order(system):
    response = await system.chat(stream=True, stream_options={"include_usage": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    role, *tokens, finish, usage = chunks
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [token["choices"][0]["delta"] for token in tokens] == [{"content": "user:"}, {"content": " hello"}]
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in (role, *tokens, finish))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(line.startswith("data: ") or not line for line in response.text.splitlines())


async def test_a_token_without_text_is_still_an_event(system):
    system.language.words = ["a", "", "b"]
    chunks = events((await system.chat(stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[1:4]]
    assert deltas == [{"content": "a"}, {"content": ""}, {"content": "b"}]


async def test_text_is_the_same_whatever_goes_along():
    """A chunk with nothing but text is put together from bytes; with token ids, it is a whole object."""
    words = ['"content":""', "\\", "\n\n", "é", "", "data: [DONE]"]
    asked = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    async with running_system(served_model_name=['"content":""']) as system:
        system.language.words = words
        plain = events((await system.chat(**asked)).text)
        whole = events((await system.chat(**asked, return_token_ids=True)).text)
    said = [
        choice["delta"].get("content") for chunk in plain[2:-1] for choice in chunk["choices"] if not choice["index"]
    ]
    assert said == [*words, None]
    for ours, other in zip(plain[:-1], whole[:-1], strict=True):
        for choice in other["choices"]:
            choice.pop("token_ids", None)
        assert {**ours, "id": 0, "created": 0} == {**other, "id": 0, "created": 0}


async def test_an_answer_without_tokens_still_streams(system):
    system.language.words = []
    chunks = events((await system.chat(stream=True)).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[2:] == ["[DONE]"]


def thought(text):
    return {"reasoning_content": text, "reasoning": text}


async def test_reasoning_has_a_place_of_its_own_in_an_answer(system):
    system.language.thoughts, system.language.words = ["so ", "4"], ["Four."]
    body = (await system.chat(n=2, logprobs=True, return_token_ids=True)).json()
    for choice in body["choices"]:
        assert choice["message"] == {"role": "assistant", "content": "Four.", "refusal": None, **thought("so 4")}
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["so ", "4", "Four."]
        assert choice["token_ids"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


async def test_reasoning_has_a_place_of_its_own_in_a_stream(system):
    system.language.thoughts, system.language.words, system.language.held = ["so ", "4"], ["", "Four"], ("", ".")
    *chunks, _ = events((await system.chat(stream=True, stream_options={"include_usage": True}, logprobs=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]]
    assert deltas == [thought("so "), thought("4"), {"content": ""}, {"content": "Four"}, {"content": "."}, {}]
    assert all(chunk["choices"][0]["logprobs"]["content"] for chunk in chunks[1:5])
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_an_answer_that_ends_in_its_thoughts(system):
    system.language.thoughts, system.language.words, system.language.held = ["so"], [], ("</think", "")
    message = (await system.chat()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "", "refusal": None, **thought("so</think")}
    chunks = events((await system.chat(stream=True)).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:4]] == [thought("so"), thought("</think"), {}]


async def test_openai_client_reads_reasoning(system):
    system.language.thoughts = ["so"]
    async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        full = await client.chat.completions.create(model="fake", messages=[user("hi")])
        message: Any = full.choices[0].message
        turns: Any = [user("hi"), message, user("again")]  # and may send it back: it is not part of the next prompt
        again = await client.chat.completions.create(model="fake", messages=turns)
    assert (message.content, message.reasoning_content, message.reasoning) == ("user: hi", "so", "so")
    assert again.choices[0].message.content == "user: hi assistant: user: hi user: again"


@pytest.mark.parametrize(
    ("body", "thinking", "separate"),
    [
        ({}, False, True),
        ({"chat_template_kwargs": None, "separate_reasoning": None}, False, True),
        ({"chat_template_kwargs": {}}, False, True),
        ({"chat_template_kwargs": {"enable_thinking": None}}, False, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": True}, False, True),
        ({"chat_template_kwargs": {"enable_thinking": True}, "separate_reasoning": True}, True, True),
        ({"chat_template_kwargs": {"enable_thinking": True}, "separate_reasoning": False}, True, False),
    ],
)
async def test_wishes_for_thoughts_reach_the_language_server(system, body, thinking, separate):
    response = await system.chat(**body)
    assert (response.status_code, "x-dvd-ignored" in response.headers) == (200, False), response.text
    request = system.language.requests[0]
    assert (request.thinking, request.sampling.separate_reasoning) == (thinking, separate)


async def test_continuous_usage(system):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events((await system.chat(stream=True, stream_options=options)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 2, 2]


async def test_choices(system):
    body = (await system.chat(n=3)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"user: hello"}
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens"] == 10


async def test_choices_in_a_stream(system):
    *chunks, done = events((await system.chat(n=2, stream=True)).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    for index in range(2):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "user: hello"
        assert mine[-1]["finish_reason"] == "stop"


async def test_logprobs_and_token_ids(system):
    body = (await system.chat(logprobs=True, top_logprobs=2, return_token_ids=True)).json()
    choice = body["choices"][0]
    assert choice["token_ids"] == [0, 1]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("user:", -0.5, list(b"user:"))
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5]


async def test_per_request_metrics():
    async with running_system(enable_per_request_metrics=True) as system:
        body = (await system.chat(messages=[user(png(), "x")])).json()
        *_, last, _ = events((await system.chat(messages=[user(png(), "x")], stream=True)).text)
    for metrics in (body["metrics"], last["metrics"]):
        assert metrics["time_to_first_token_ms"] == 3
        assert metrics["generation_time_ms"] == 40
        stages = metrics["dvd"]
        assert (stages["decode_ms"], stages["encode_ms"], stages["transfer_ms"]) == (1, 3, 4)
        assert (stages["images"], stages["tiles"], stages["image_tokens"]) == (1, 1, 256)
        assert (stages["encode_attempts"], stages["feature_bytes"], stages["transport"]) == (1, 1024, "grpc")
        assert stages["total_ms"] > 0


async def test_request_id(system):
    echoed = await system.http.post(CHAT, json={"messages": [user("x")]}, headers={"X-Request-Id": "my.id-1"})
    assert echoed.headers["x-request-id"] == "my.id-1"
    created = await system.http.post(CHAT, json={"messages": [user("x")]}, headers={"X-Request-Id": "bad id"})
    assert created.headers["x-request-id"] not in ("", "bad id")
    in_body = await system.chat(request_id="from-body")
    assert in_body.headers["x-request-id"] == "from-body"


async def test_unknown_fields_are_named_and_in_strict_mode_refused(system):
    body = {"messages": [user("x")], "frobnicate": 1, "Ü\n": 2, "stop": None}
    lenient = await system.http.post(CHAT, json=body)
    assert lenient.status_code == 200
    assert lenient.headers["x-dvd-ignored"] == "frobnicate, ??"
    strict = await system.http.post(CHAT, json=body, headers={"X-Dvd-Strict": "1"})
    assert strict.status_code == 400
    assert strict.json()["error"]["param"] == "frobnicate"


STRAY: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": [{**user("x"), "nickname": "a"}]}, "messages[0].nickname"),
    (
        {"messages": [user("x", {"type": "text", "text": "a", "cache_control": {}})]},
        "messages[0].content[1].cache_control",
    ),
    (
        {"messages": [user({"type": "image_url", "image_url": {"url": data_url(png()), "Detail\n": "low"}})]},
        "messages[0].content[0].image_url.Detail?",
    ),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
    ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools[0].function.params"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]}, None),
    ({"messages": [{**user("x"), "nickname": None, "reasoning": "a", "refusal": None, "name": "b"}]}, None),
    ({"structured_outputs": {"disable_fallback": True}, "logit_bias": {"1": 1}}, None),
]


async def test_unknown_fields_inside_are_refused_in_strict_mode_only(system):
    for fields, param in STRAY:
        body = {"messages": [user("x")], **fields}
        assert (await system.http.post(CHAT, json=body)).status_code == 200, body
        strict = await system.http.post(CHAT, json=body, headers={"X-Dvd-Strict": "1"})
        assert strict.status_code == (200 if param is None else 400), strict.text
        if param is not None:
            assert (strict.json()["error"]["code"], strict.json()["error"]["param"]) == ("unsupported_parameter", param)


async def test_a_silent_stream_is_kept_alive():
    """Comments come before the first token, too; what goes wrong behind them is an event."""
    async with running_system(sse_keep_alive_interval=0.02) as system:
        system.language.at_token.is_open.clear()
        for fails in (False, True):
            asked = asyncio.create_task(system.chat(stream=True))
            await asyncio.sleep(0.2)
            system.language.fail_after = (0, InvalidRequest("no")) if fails else None
            system.language.at_token.is_open.set()
            response = await asked
            system.language.at_token.is_open.clear()
            assert response.text.startswith(": keep-alive\n\n: keep-alive\n\n")
            assert (response.status_code, "event: error" in response.text) == (200, fails)
            assert events(response.text)[-1] == "[DONE]"
        completion = asyncio.create_task(system.http.post("/v1/completions", json={"prompt": "a", "stream": True}))
        await asyncio.sleep(0.1)
        system.language.fail_after = None
        system.language.at_token.is_open.set()
        assert (await completion).text.startswith(": keep-alive\n\n")
        assert (await system.chat()).json()["choices"][0]["message"]["content"] == "user: hello"


async def test_error_after_the_first_token_is_an_event(system):
    system.language.fail_after = (1, Unavailable("gone"))
    response = await system.chat(stream=True)
    assert response.status_code == 200
    blocks = response.text.strip().split("\n\n")
    assert blocks[-2].startswith("event: error\ndata: ")
    error = json.loads(blocks[-2].removeprefix("event: error\ndata: "))["error"]
    assert error == {"message": "gone", "type": "server_error", "param": None, "code": "worker_unavailable"}
    assert blocks[-1] == "data: [DONE]"


async def test_the_same_error_has_a_status_without_streaming(system):
    system.language.fail_after = (1, Unavailable("gone"))
    response = await system.chat()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


async def test_openai_async_client(system):
    message = user("what", png())
    async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        full = await client.chat.completions.create(model="fake", messages=[message])
        stream = await client.chat.completions.create(
            model="fake", messages=[message], stream=True, stream_options={"include_usage": True}
        )
        pieces, usage = [], None
        async for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
        models = await client.models.list()
    assert full.choices[0].message.content == f"user: what [{digest(png())}]"
    assert "".join(pieces) == full.choices[0].message.content
    assert usage is not None
    assert usage.prompt_tokens == full.usage.prompt_tokens == 266
    assert [model.id for model in models.data] == ["fake"]


async def test_openai_sync_client(system):
    def ask() -> tuple[str, str, str]:
        with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
            full = client.chat.completions.create(model="fake", messages=[user("hi")])
            stream = client.chat.completions.create(model="fake", messages=[user("hi")], stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            with pytest.raises(BadRequestError) as refused:
                client.chat.completions.create(model="fake", messages=[user("hi")], temperature=9)
            return full.choices[0].message.content, text, refused.value.code

    assert await asyncio.to_thread(ask) == ("user: hi", "user: hi", "invalid_value")


async def test_openai_client_notices_an_error_in_a_stream(system):
    system.language.fail_after = (1, Unavailable("gone"))
    async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="fake", messages=[user("a b")], stream=True)
        with pytest.raises(APIError) as raised:
            async for _ in stream:
                pass
    assert raised.value.code == "worker_unavailable"


@pytest.mark.parametrize(
    ("failure", "num_asked"),
    [(InternalError("a bug"), 1), (InvalidRequest("bad", code="request_quarantined"), 1), (Unavailable("gone"), 2)],
)
async def test_openai_client_comes_again_only_where_that_helps(system, failure, num_asked):
    """It would retry every 5xx; ``x-should-retry`` is what keeps it from asking a bug again."""
    system.language.fail_after = (1, failure)
    num_answers = 0

    async def count(response: httpx.Response) -> None:
        nonlocal num_answers
        num_answers += 1

    http = httpx.AsyncClient(event_hooks={"response": [count]})
    async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=1, http_client=http) as client:
        with pytest.raises(APIError) as raised:
            await client.chat.completions.create(model="fake", messages=[user("a b")])
    assert (raised.value.code, num_answers) == (failure.code, num_asked)


async def test_sampling_defaults_come_from_the_model_and_null_means_not_given(system):
    await system.chat(temperature=None, top_p=None, n=None, stop=None, max_tokens=None, top_logprobs=None, tools=[])
    sampling = system.language.requests[0].sampling
    assert (sampling.temperature, sampling.top_p) == (pytest.approx(0.7), pytest.approx(0.9))
    assert (sampling.top_k, sampling.repetition_penalty) == (20, pytest.approx(1.1))
    assert (sampling.n, sampling.max_tokens, list(sampling.stop)) == (1, 0, [])
    assert sampling.skip_special_tokens


async def test_a_seed_that_nobody_gave_is_drawn_once_a_request(system):
    """By the router, so that every language server that has a part in the reply draws the same tokens."""
    for _ in range(2):
        await system.chat(n=2)
    seeds = [request.sampling.seed for request in system.language.requests]
    assert all(request.sampling.HasField("seed") for request in system.language.requests)
    assert len(set(seeds)) == 2


async def test_sampling_fields_reach_the_language_server(system):
    await system.chat(
        temperature=0, top_p=0.5, top_k=-1, min_p=0.1, repetition_penalty=1.5, frequency_penalty=-1, presence_penalty=2,
        n=2, seed=-5, stop="END", stop_token_ids=[7], logit_bias={"3": -100}, min_tokens=2, max_tokens=16384,
        max_completion_tokens=9, ignore_eos=True, skip_special_tokens=False, priority=-3,
    )  # fmt: skip
    request = system.language.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (pytest.approx(0.1), 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (-1, 2)
    assert (sampling.n, sampling.seed, list(sampling.stop), list(sampling.stop_token_ids)) == (2, -5, ["END"], [7])
    assert dict(sampling.logit_bias) == {3: -100}
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 9)
    assert sampling.ignore_eos
    assert not sampling.skip_special_tokens
    assert request.priority == -3
    assert len(request.request_id) == 16


SCHEMA = '{"type": "object",  "properties": {"b": {"maximum": 1.0}, "a": {}}}'  # the order of properties counts


@pytest.mark.parametrize(
    ("field", "value", "grammar"),
    [
        ("response_format", '{"type": "json_object"}', Grammar(json_object=True, param="response_format")),
        (
            "response_format",
            f'{{"type": "json_schema", "json_schema": {{"name": "x", "strict": true, "schema": {SCHEMA}}}}}',
            Grammar(json_schema=SCHEMA, param="response_format.json_schema.schema"),
        ),
        ("structured_outputs", f'{{"json": {SCHEMA}}}', Grammar(json_schema=SCHEMA, param="structured_outputs.json")),
        (
            "structured_outputs",
            f'{{"json": {json.dumps(SCHEMA)}, "regex": null}}',
            Grammar(json_schema=SCHEMA, param="structured_outputs.json"),
        ),
        ("structured_outputs", r'{"regex": "\\d+"}', Grammar(regex=r"\d+", param="structured_outputs.regex")),
        (
            "structured_outputs",
            '{"choice": ["a", "b"]}',
            Grammar(choice=Choices(texts=["a", "b"]), param="structured_outputs.choice"),
        ),
    ],
)
async def test_grammars_reach_the_language_server_as_they_are(system, field, value, grammar):
    body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{field}": {value}}}'
    response = await system.http.post(CHAT, content=body)
    assert response.status_code == 200, response.text
    assert system.language.requests[0].sampling.grammar == grammar
    assert "x-dvd-ignored" not in response.headers


async def test_max_tokens_is_clamped(system):
    await system.chat(max_tokens=10**30)
    assert system.language.requests[0].sampling.max_tokens == 4096


async def test_tile_budgets_price_the_images(system):
    """1920 x 1080 is 8 tiles and a thumbnail at most; ``detail`` and numbers change that, the part's own first."""
    image = png(size=(1920, 1080))

    async def tokens(part=None, **body) -> int:
        url = {"url": data_url(image), **(part or {})}
        response = await system.chat(messages=[user({"type": "image_url", "image_url": url})], **body)
        assert response.status_code == 200, response.text
        return system.language.requests[-1].images[0].max_num_tokens // 256

    assert await tokens() == 9
    assert await tokens({"detail": "auto"}) == 9
    assert await tokens({"detail": "low"}) == 1
    assert await tokens({"detail": "low", "max_dynamic_patch": 6}) == 3
    assert await tokens({"max_dynamic_patch": 24}, max_dynamic_patch=1) == 16
    assert await tokens(max_dynamic_patch=1, mm_processor_kwargs={"max_dynamic_patch": 6}) == 1
    assert await tokens(mm_processor_kwargs={"max_dynamic_patch": 6}) == 3
    hashes = {request.images[0].mm_hash for request in system.language.requests}
    assert len(hashes) == 4  # budgets of 12, 1, 6 and 24 tiles
    assert system.vision.requests[-1].tiling.max_dynamic_patch == 6
    assert system.vision.requests[-1].tiling.use_thumbnail


async def test_cache_scope_separates_salts(system):
    for salt in (None, "a", "b", "a"):
        await system.chat(messages=[user(png())], cache_salt=salt)
    plain, a, b, a_again = system.language.requests
    assert plain.cache_scope == ""
    assert a.cache_scope == a_again.cache_scope != b.cache_scope
    assert len({request.images[0].mm_hash for request in system.language.requests}) == 3


async def test_large_bodies_take_the_same_way(system):
    """Above the size that is read in a thread."""
    text = "word " * 100_000
    system.language.words = ["ok"]
    response = await system.chat(messages=[user(text, png())], max_tokens=1)
    assert response.status_code == 200
    assert system.language.requests[0].messages[0].parts[0].text == text


async def test_sixty_four_at_once_are_not_mixed_up(system):
    images = [png(f"#{index:02x}0000") for index in range(64)]
    responses = await asyncio.gather(*(system.chat(messages=[user(image, "?")]) for image in images))
    contents = [response.json()["choices"][0]["message"]["content"] for response in responses]
    assert contents == [f"user: [{digest(image)}] ?" for image in images]
    await system.until_idle()


async def test_body_in_pieces(system):
    body = json.dumps({"messages": [user("in pieces")]}).encode()

    async def pieces():
        for index in range(0, len(body), 7):
            yield body[index : index + 7]

    async with httpx.AsyncClient() as client:
        response = await client.post(system.url + CHAT, content=pieces())
    assert response.json()["choices"][0]["message"]["content"] == "user: in pieces"
