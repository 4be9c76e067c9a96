"""The table of fields, line by line: what each says to the language server at the ends of its range, and that ``null``
says nothing. What lies beyond is refused in test_http_errors."""

import json
import logging
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from protos.language_pb2 import GenerateRequest
from router.api.schemas import ChatCompletionRequest
from tests.router.conftest import CHAT, png, running_system, user
from tests.router.test_chat import events

INT64 = 2**63
# A row: what is sent, and where in the request on the wire it shows; a path of names, and the value.
FIELDS: list[tuple[dict[str, Any], str, Any]] = [
    ({"max_completion_tokens": 1}, "sampling.max_tokens", 1),
    ({"max_completion_tokens": 5, "max_tokens": 7}, "sampling.max_tokens", 5),
    ({"max_tokens": 16384}, "sampling.max_tokens", 4096),
    ({"max_tokens": 10**30}, "sampling.max_tokens", 4096),
    ({"min_tokens": 0, "max_tokens": 1}, "sampling.min_tokens", 0),
    ({"min_tokens": 1, "max_tokens": 1}, "sampling.min_tokens", 1),
    ({"temperature": 0}, "sampling.temperature", 0.0),
    ({"temperature": 2}, "sampling.temperature", 2.0),
    ({"top_p": 1}, "sampling.top_p", 1.0),
    ({"min_p": 1}, "sampling.min_p", 1.0),
    ({"top_k": -1}, "sampling.top_k", 0),
    ({"top_k": 0}, "sampling.top_k", 0),
    ({"top_k": 1000}, "sampling.top_k", 1000),
    ({"repetition_penalty": 10}, "sampling.repetition_penalty", 10.0),
    ({"frequency_penalty": -2}, "sampling.frequency_penalty", -2.0),
    ({"presence_penalty": 2}, "sampling.presence_penalty", 2.0),
    ({"n": 64}, "sampling.n", 64),
    ({"seed": INT64 - 1}, "sampling.seed", INT64 - 1),
    ({"seed": -INT64}, "sampling.seed", -INT64),
    ({"stop": "x" * 256}, "sampling.stop", ["x" * 256]),
    ({"stop": ["a", "b", "c", "d"]}, "sampling.stop", ["a", "b", "c", "d"]),
    ({"stop_token_ids": list(range(984, 1000))}, "sampling.stop_token_ids", list(range(984, 1000))),
    ({"bad_words": ["x" * 256] * 128}, "sampling.bad_words", ["x" * 256] * 128),
    ({"logit_bias": {"999": -100, "0": 100}}, "sampling.logit_bias", {999: -100.0, 0: 100.0}),
    ({"ignore_eos": True}, "sampling.ignore_eos", True),
    ({"skip_special_tokens": False}, "sampling.skip_special_tokens", False),
    ({}, "sampling.skip_special_tokens", True),
    ({"logprobs": True, "top_logprobs": 20}, "sampling.top_logprobs", 20),
    ({"logprobs": True, "top_logprobs": 0}, "sampling.logprobs", True),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] }, "tools", None),
    ({"tool_choice": "none"}, "tools", []),
    ({"parallel_tool_calls": False}, "tools", []),
    ({"response_format": {"type": "json_object"}}, "sampling.grammar.json_object", True),
    ({"structured_outputs": {"regex": "a" * 1024}}, "sampling.grammar.regex", "a" * 1024),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "thinking", True),
    ({"separate_reasoning": False}, "sampling.separate_reasoning", False),
    ({"priority": -128}, "priority", -128),
    ({"priority": 127}, "priority", 127),
    ({"messages": [{"role": "developer", "content": "x"}]}, "messages.0.role", "system"),
    ({"messages": [user("x")] * 1024}, "messages.1023.role", "user"),
]  # fmt: skip
ELSEWHERE = {
    "model", "stream", "stream_options", "return_token_ids", "request_id", "rid", "cache_salt", "user",
    "max_dynamic_patch", "min_dynamic_patch", "mm_processor_kwargs", "media_io_kwargs", "dvd",
}  # fmt: skip
"""Fields that the tests below are about."""


def at(request: GenerateRequest, path: str) -> Any:
    value: Any = request
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    if isinstance(value, bool | int | float | str):
        return value
    return dict(value) if hasattr(value, "items") else list(value)


async def test_fields_reach_the_language_server(system):
    for body, path, expected in FIELDS:
        response = await system.chat(**body)
        assert (response.status_code, "x-dvd-ignored" in response.headers) == (200, False), (body, response.text)
        value = at(system.language.requests[-1], path)
        assert value == expected or (expected is None and value), (body, value)


def test_no_field_is_forgotten_here():
    named = {name for body, _, _ in FIELDS for name in body}
    assert named | ELSEWHERE == set(ChatCompletionRequest.__struct_fields__)


async def test_null_is_not_given(system):
    nothing = dict.fromkeys(set(ChatCompletionRequest.__struct_fields__) - {"messages"})
    for body in ({}, nothing):
        response = await system.chat(**body)
        assert (response.status_code, "x-dvd-ignored" in response.headers) == (200, False), response.text
    plain, with_nulls = ({**MessageToDict(request), "requestId": ""} for request in system.language.requests)
    del plain["sampling"]["seed"], with_nulls["sampling"]["seed"]
    assert plain == with_nulls


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_what_is_no_number_is_refused_everywhere(system, number):
    for body in (f'"temperature": {number}', f'"logit_bias": {{"1": {number}}}', f'"min_p": {number}'):
        content = f'{{"messages": {json.dumps([user("x")])}, {body}}}'
        response = await system.http.post(CHAT, content=content)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error"), body
    assert not system.language.requests


async def test_tiles_by_every_way_to_ask_for_them(system):
    wide = png(size=(1344, 896))
    asked: list[tuple[dict[str, Any], int]] = [
        ({}, 7), ({"max_dynamic_patch": 1}, 1), ({"min_dynamic_patch": 12}, 13),
        ({"mm_processor_kwargs": {"max_dynamic_patch": 1}}, 1),
        ({"mm_processor_kwargs": {"max_dynamic_patch": 1}, "max_dynamic_patch": 6}, 7),
    ]  # fmt: skip
    for body, num_tiles in asked:
        assert (await system.chat(messages=[user(wide)], **body)).status_code == 200
        assert system.language.requests[-1].images[0].max_num_tokens == 256 * num_tiles, body


async def test_names_of_requests(system):
    header = {"X-Request-Id": "from-header"}
    for body, headers, name in [
        ({"request_id": "a" * 128}, {}, "a" * 128),
        ({"rid": "from.rid_1"}, {}, "from.rid_1"),
        ({"request_id": "one", "rid": "two"}, {}, "one"),
        ({"request_id": "one"}, header, "from-header"),
    ]:
        response = await system.http.post(CHAT, json={"messages": [user("x")], **body}, headers=headers)
        assert response.headers["x-request-id"] == name
        assert response.json()["id"] == f"chatcmpl-{name}"


async def test_a_salt_divides_caches(system):
    for salt in ("a", "a", "b" * 128, None):
        await system.chat(cache_salt=salt)
    first, same, other, none = (request.cache_scope for request in system.language.requests)
    assert first == same != other and none == ""


async def test_a_user_is_told_nobody(system, caplog):
    caplog.set_level(logging.DEBUG)
    response = await system.chat(user="mallory" * 36)
    assert response.status_code == 200
    assert "mallory" not in caplog.text + response.text + str(system.language.requests[0])
    assert "mallory" not in (await system.http.get("/metrics")).text


async def test_token_ids_on_every_chunk_that_has_some(system):
    *chunks, _ = events((await system.chat(stream=True, return_token_ids=True)).text)
    assert [chunk["choices"][0].get("token_ids") for chunk in chunks] == [None, [0], [1], None]


async def test_ignored_fields_are_named_ten_at_most(system):
    names = [f"x{index:02}" for index in range(12)]
    response = await system.chat(**dict.fromkeys(names, 1))
    assert response.headers["x-dvd-ignored"].split(", ") == names[:10]
    nulls = await system.chat(**dict.fromkeys(names))
    assert "x-dvd-ignored" not in nulls.headers


async def test_usage_stays_with_every_chunk_of_completions_too(system):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "a b", "stream": True, "stream_options": options}
    *chunks, _ = events((await system.http.post("/v1/completions", json=body)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2, 2]


async def test_version(system):
    assert (await system.http.get("/version")).json().keys() == {"version", "wire_version"}


async def test_metrics_of_a_request_have_all_their_keys():
    async with running_system(enable_per_request_metrics=True) as system:
        options = {"include_usage": True}
        bodies = [(await system.chat(messages=[user(png(), "x")])).json()]
        bodies += events((await system.chat(messages=[user("x")], stream=True, stream_options=options)).text)[-2:-1]
    for body in bodies:
        block = body["metrics"]
        assert block.keys() == {
            "time_to_first_token_ms", "queue_time_ms", "generation_time_ms", "mean_itl_ms", "tokens_per_second", "dvd"
        }  # fmt: skip
        assert block["dvd"].keys() >= {
            "total_ms", "fetch_ms", "decode_ms", "vision_queue_ms", "encode_ms", "transfer_ms", "feature_wait_ms",
            "language_queue_ms", "prefill_ms", "images", "tiles", "image_tokens", "feature_bytes",
            "feature_cache_hits", "encode_attempts", "transport",
        }  # fmt: skip
    assert bodies[1]["choices"] == [] and bodies[1]["metrics"]["dvd"]["encode_ms"] is None
