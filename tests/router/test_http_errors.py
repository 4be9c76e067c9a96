"""Every error on every route has OpenAI's shape, the right status and code, and reaches no server."""

import asyncio
import contextlib
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from common.service.errors import ConfigError, InvalidRequest, Overloaded
from router.api.layout import IMAGE_MARKER
from router.api.schemas import parse_chat
from router.api.text_schemas import parse_completion, parse_detokenize, parse_tokenize
from router.settings import RouterSettings
from tests.router.conftest import CHAT, data_url, error_of, png, running_system, user
from tests.router.fakes import digest


def image(url, **fields):
    return user({"type": "image_url", "image_url": {"url": url, **fields}}, "?")


def bomb() -> bytes:
    """A valid 1-bit PNG header of 13000 x 13000 pixels in a few hundred bytes; decoded it would be 500 MB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 13000, 13000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def tool(name, **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def nested(depth):
    """A schema of so many objects inside one another."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


SCHEMA_PARAM = "response_format.json_schema.schema"
GOOD = data_url(png())
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{}]}
PART = "messages[0].content[0]"
URL_PARAM = f"{PART}.image_url.url"

B64 = GOOD.partition(",")[2]
FILM = data_url(b"\0\0\0\x18ftypmp42", "video/mp4")


def video(source, **fields):
    return {"messages": [user({"type": "video_url", "video_url": source, **fields})]}


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": None}, "invalid_value", "messages"),
    ({"messages": "hi"}, "invalid_value", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", f"{PART}.text"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": -0.1}, "invalid_value", "temperature"),
    ({"temperature": "NaN"}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_p": 1.5}, "invalid_value", "top_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": 1001}, "invalid_value", "top_k"),
    ({"min_p": 2}, "invalid_value", "min_p"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"frequency_penalty": 3}, "invalid_value", "frequency_penalty"),
    ({"presence_penalty": -3}, "invalid_value", "presence_penalty"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 65}, "invalid_value", "n"),
    ({"n": 2.5}, "invalid_value", "n"),
    ({"n": True}, "invalid_value", "n"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": ["a"] * 5}, "invalid_value", "stop"),
    ({"stop": "x" * 257}, "invalid_value", "stop"),
    ({"stop_token_ids": [1000]}, "invalid_value", "stop_token_ids[0]"),
    ({"stop_token_ids": list(range(17))}, "invalid_value", "stop_token_ids"),
    ({"logit_bias": {"1000": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias[...]"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 1}, "invalid_value", "top_logprobs"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"request_id": "a b"}, "invalid_value", "request_id"),
    ({"priority": 128}, "invalid_value", "priority"),
    ({"cache_salt": "x" * 129}, "invalid_value", "cache_salt"),
    ({"user": "x" * 257}, "invalid_value", "user"),
    ({"mm_processor_kwargs": {"size": 1}}, "invalid_value", "mm_processor_kwargs"),
    ({"media_io_kwargs": {"image": {}}}, "invalid_value", "media_io_kwargs"),
    ({"response_format": {"type": "structural_tag"}}, "unsupported_parameter", "response_format.type"),
    ({"response_format": {}}, "invalid_value", "response_format"),
    ({"response_format": "json_object"}, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "invalid_value", SCHEMA_PARAM),
    ({"response_format": json_schema(None)}, "invalid_value", SCHEMA_PARAM),
    ({"response_format": json_schema(True)}, "invalid_value", SCHEMA_PARAM),
    ({"response_format": json_schema([])}, "invalid_value", SCHEMA_PARAM),
    ({"response_format": json_schema({"title": "x" * 2**16})}, "invalid_value", SCHEMA_PARAM),
    ({"response_format": json_schema(nested(33))}, "invalid_value", SCHEMA_PARAM),
    ({"structured_outputs": []}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"json": 1}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"json": "[" * 10**5}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"json": nested(33)}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"json": json.dumps(nested(33))}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, "invalid_value", "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "x" * 1025}}, "invalid_value", "structured_outputs.regex"),
    ({"structured_outputs": {"regex": ["a"]}}, "invalid_value", "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a"] * 1025}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a" * 2**15] * 3}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": json_schema({})}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"grammar": "root ::= x"}}, "unsupported_parameter", "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}, "unsupported_parameter",
     "structured_outputs.whitespace_pattern"),
    ({"guided_json": {}}, "unsupported_parameter", "guided_json"),
    ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "unsupported_parameter", "tools[0].type"),
    ({"tools": [tool("f")] * 129}, "invalid_value", "tools"),
    ({"tools": [tool("f"), tool("f")]}, "invalid_value", "tools"),
    ({"tools": [tool("f", description="x" * 2**17)]}, "invalid_value", "tools"),
    ({"tools": [tool("f g")]}, "invalid_value", "tools[0].function.name"),
    ({"tools": [tool("f", parameters=[])]}, "invalid_value", "tools[0].function.parameters"),
    ({"tools": [tool("f", parameters=nested(33))]}, "invalid_value", "tools[0].function.parameters"),
    ({"tools": [tool("f", parameters={"type": "array"})]}, "invalid_value", "tools[0].function.parameters.type"),
    ({"tools": [tool("f", parameters={"title": "x" * 2**16})]}, "invalid_value", "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tool_choice": "any", "tools": [tool("f")]}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": [tool("f")]}, "invalid_value", "tool_choice.function"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool("f")]}, "invalid_value",
     "tool_choice.function.name"),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [tool("f")]}, "unsupported_parameter", "tool_choice.type"),
    ({"tools": [tool("f")], "response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ({"tools": [tool("f")], "structured_outputs": {"regex": "a"}}, "unsupported_parameter", "structured_outputs"),
    ({"tools": [tool("f")], "tool_choice": "required", "chat_template_kwargs": {"enable_thinking": True}},
     "invalid_value", "chat_template_kwargs.enable_thinking"),
    ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    ({"stop_regex": "a+"}, "unsupported_parameter", "stop_regex"),
    ({"include_stop_str_in_output": True}, "unsupported_parameter", "include_stop_str_in_output"),
    ({"max_new_tokens": 5}, "unsupported_parameter", "max_new_tokens"),
    ({"echo": True}, "unsupported_parameter", "echo"),
    ({"bad_words": ["x"] * 129}, "invalid_value", "bad_words"),
    ({"bad_words": ["x" * 257]}, "invalid_value", "bad_words[0]"),
    ({"bad_words": ["x", "  "]}, "invalid_value", "bad_words[1]"),
    ({"chat_template": "{{ x }}"}, "unsupported_parameter", "chat_template"),
    ({"chat_template_kwargs": {"thinking": True}}, "invalid_value", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "invalid_value", "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": [True]}, "invalid_value", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x" * 5000: 1}}, "invalid_value", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": True}, "response_format": {"type": "json_object"}}, "invalid_value",
     "chat_template_kwargs.enable_thinking"),
    ({"separate_reasoning": "no"}, "invalid_value", "separate_reasoning"),
    ({"include_reasoning": False}, "unsupported_parameter", "include_reasoning"),
    ({"stream_reasoning": False}, "unsupported_parameter", "stream_reasoning"),
    ({"thinking_token_budget": 5}, "unsupported_parameter", "thinking_token_budget"),
    ({"messages": [CALLS]}, "invalid_value", "messages[0].tool_calls[0]"),
    ({"messages": [{**user("x"), "tool_calls": [CALL]}]}, "invalid_value", "messages[0].tool_calls"),
    ({"messages": [{"role": "tool", "content": None, "tool_call_id": "a"}]}, "invalid_value", "messages[0].content"),
    ({"messages": [user({"type": "input_audio"})]}, "unsupported_media", f"{PART}.type"),
    ({"messages": [user({"type": "image_embeds"})]}, "unsupported_media", f"{PART}.type"),
    (video({"url": GOOD}), "unsupported_media", f"{PART}.video_url.url"),
    (video(GOOD), "unsupported_media", f"{PART}.video_url"),
    (video({"url": data_url(b"", "video/mp4")}), "unsupported_media", f"{PART}.video_url.url"),
    (video({"url": f"data:video/jpeg;base64,{B64},{B64}"}), "unsupported_media", f"{PART}.video_url.url"),
    (video({"url": "data:video/mp4;base64,!!!!"}), "invalid_image", f"{PART}.video_url.url"),
    (video({"url": "https://example.com/a.mp4"}), "media_url_blocked", f"{PART}.video_url.url"),
    (video({"url": "file:///etc/passwd"}), "media_url_blocked", f"{PART}.video_url.url"),
    (video(None), "invalid_value", f"{PART}.video_url"),
    (video({}), "invalid_value", f"{PART}.video_url"),
    (video(None, uuid="a"), "unknown_media_uuid", f"{PART}.video_url"),
    (video({"url": FILM, "num_frames": 129}), "too_many_media_items", f"{PART}.video_url.num_frames"),
    (video({"url": FILM, "num_frames": 0}), "invalid_value", f"{PART}.video_url.num_frames"),
    (video({"url": FILM, "num_frames": -2}), "invalid_value", f"{PART}.video_url.num_frames"),
    (video({"url": FILM, "num_frames": 1.5}), "invalid_value", f"{PART}.video_url.num_frames"),
    (video({"url": FILM, "fps": 0}), "invalid_value", f"{PART}.video_url.fps"),
    (video({"url": FILM, "fps": -0.5}), "invalid_value", f"{PART}.video_url.fps"),
    (video({"url": FILM, "fps": 1001}), "invalid_value", f"{PART}.video_url.fps"),
    (video({"frames": []}), "invalid_value", f"{PART}.video_url.frames"),
    (video({"frames": [GOOD] * 129}), "too_many_media_items", "messages"),
    (video({"frames": [GOOD], "url": FILM}), "invalid_value", f"{PART}.video_url.url"),
    (video({"frames": [GOOD], "num_frames": 1}), "invalid_value", f"{PART}.video_url.num_frames"),
    (video({"frames": [GOOD], "fps": 1}), "invalid_value", f"{PART}.video_url.fps"),
    (video({"frames": [GOOD, FILM]}), "invalid_image", f"{PART}.video_url.frames[1]"),
    ({**video(FILM), "media_io_kwargs": {"video": {"num_frames": 129}}}, "too_many_media_items",
     "media_io_kwargs.video.num_frames"),
    ({**video(FILM), "media_io_kwargs": {"video": {"fps": 0}}}, "invalid_value", "media_io_kwargs.video.fps"),
    ({"media_io_kwargs": {"video": {"backend": "x"}}}, "invalid_value", "media_io_kwargs.video"),
    ({"messages": [user({"type": "video"})]}, "invalid_value", f"{PART}.video"),
    ({"messages": [user({"type": "video", "video": []})]}, "invalid_value", f"{PART}.video"),
    ({"messages": [user({"type": "video", "video": FILM})]}, "invalid_value", f"{PART}.video"),
    ({"messages": [user({"type": "video", "video": [GOOD, "x"]})]}, "media_url_blocked", f"{PART}.video[1]"),
    ({"messages": [user({"type": "video", "uuid": "a"})]}, "unknown_media_uuid", f"{PART}.video"),
    ({"dvd": []}, "invalid_value", "dvd"),
    ({"dvd": {"tile_budge": "shared"}}, "invalid_value", "dvd"),
    ({"dvd": {"tile_budget": "half"}}, "invalid_value", "dvd.tile_budget"),
    ({"dvd": {"combine_images": 1}}, "invalid_value", "dvd.combine_images"),
    ({"dvd": {"vir": "off"}}, "invalid_value", "dvd.vir"),
    ({"dvd": {"vir": {"threshold": 1}}}, "invalid_value", "dvd.vir"),
    ({"dvd": {"vir": {"mode": "on"}}}, "invalid_value", "dvd.vir.mode"),
    ({"dvd": {"vir": {"scope": "batch"}}}, "invalid_value", "dvd.vir.scope"),
    ({"dvd": {"vir": {"relative_threshold": 1.01}}}, "invalid_value", "dvd.vir.relative_threshold"),
    ({"dvd": {"vir": {"absolute_threshold": -0.01}}}, "invalid_value", "dvd.vir.absolute_threshold"),
    ({"dvd": {"vir": {"mode": "force64"}}}, "unsupported_parameter", "dvd.vir.mode"),
    ({"dvd": {"vir": {"relative_threshold": 0.5}}}, "unsupported_parameter", "dvd.vir.relative_threshold"),
    ({"dvd": {"vir": {"absolute_threshold": 0}}}, "unsupported_parameter", "dvd.vir.absolute_threshold"),
    ({"max_dynamic_patch": 41}, "invalid_value", "max_dynamic_patch"),
    ({"mm_processor_kwargs": {"max_dynamic_patch": 41}}, "invalid_value", "mm_processor_kwargs.max_dynamic_patch"),
    ({"messages": [user(png())], "max_dynamic_patch": 4, "mm_processor_kwargs": {"min_dynamic_patch": 5}},
     "invalid_value", "mm_processor_kwargs.min_dynamic_patch"),
    ({"messages": [image("https://example.com/a.png")]}, "media_url_blocked", URL_PARAM),
    ({"messages": [image("http://127.0.0.1/a.png")]}, "media_url_blocked", URL_PARAM),
    ({"messages": [image("file:///etc/passwd")]}, "media_url_blocked", URL_PARAM),
    ({"messages": [image("/etc/passwd")]}, "media_url_blocked", URL_PARAM),
    ({"messages": [image("data:image/png;base64,!!!!")]}, "invalid_image", URL_PARAM),
    ({"messages": [image(data_url(b"not an image"))]}, "invalid_image", URL_PARAM),
    ({"messages": [image(data_url(bomb()))]}, "invalid_image", URL_PARAM),
    ({"messages": [image(GOOD, detail="huge")]}, "invalid_value", f"{PART}.image_url.detail"),
    ({"messages": [image(GOOD, max_dynamic_patch=41)]}, "invalid_value", f"{PART}.image_url.max_dynamic_patch"),
    ({"messages": [image(GOOD, min_dynamic_patch=13)]}, "invalid_value", f"{PART}.image_url.min_dynamic_patch"),
    ({"messages": [user({"type": "image_url", "uuid": "a"})]}, "unknown_media_uuid", f"{PART}.image_url"),
    ({"messages": [user({"type": "image_url"})]}, "invalid_value", f"{PART}.image_url"),
    ({"messages": [user(png(), f"{IMAGE_MARKER} {IMAGE_MARKER}")]}, "image_marker_mismatch", "messages[0].content"),
    ({"messages": [user(*[png()] * 129)]}, "too_many_media_items", "messages"),
]  # fmt: skip


async def test_bad_fields_name_themselves(system):
    """One system for the whole table: none of these may change anything."""
    for index, (body, code, param) in enumerate(BAD_FIELDS):
        response = await system.chat(**{"stream": index % 2 == 0, **body})
        assert response.status_code == 400, (body, response.text[:300])
        error = error_of(response)
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param), body
        assert response.headers["x-should-retry"] == "false"
    assert system.language.requests == []
    assert system.vision.requests == []
    await system.until_idle()


async def test_a_template_keyword_that_does_not_exist_is_named(system):
    response = await system.chat(chat_template_kwargs={"enable_thinking": True, "add_vision_id": True})
    assert error_of(response)["message"] == "chat_template_kwargs: Object contains unknown field `add_vision_id`"


BAD_JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}]} trailing',
    b'{"messages": [{"role": "user", "content": "x"}], "x": ' + b"[" * 65 + b"]" * 65 + b"}",
    b"[" * 1_000_000,
    b'{"messages": [{"role": "user", "content": "x"}], "x": [' + b"[]," * 200_001 + b"[]]}",
]


HUGE = b"9" * 5000
# As in JSONTestSuite: what no parser may take, each in a field that nobody reads, so that only a parser refuses it.
NO_JSON = [
    *(b"[1,]", b"[,1]", b"[1 2]", b"{1: 2}", b"{'a': 1}", b'{"a" 1}', b'{"a": 1,}', b'{"a": 1 // x\n}', b"[1", b"]"),
    *(b"01", b"+1", b".5", b"1.", b"1e", b"1e+", b"0x1", b"-", b"--1", b"-NaN", b"nan", b"inf", b"-Infinity", b"1_0"),
    *(b"True", b"nul", b"undefined", b'"a', b"'a'", b'"\\x41"', b'"\\u12"', b'"\\', b'"a\nb"', b'"a\0b"', b"\0"),
    *(b"\x0c1", b"\xff\xfe", b"\xc2\xa01"),
]  # fmt: skip
NO_TEXT = [b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xf5\x80\x80\x80"', b'"\xe2\x82"', b'"\\udc00"', b'"\\ud800\\ud800"']
"""Not UTF-8, or half a surrogate pair."""
# Parsers may differ about these, but none may fail otherwise.
ODD_JSON = [
    *(b"1e400", b"-1e400", b"1e-400", HUGE, b"-" + HUGE, b"0." + HUGE, b"1e" + HUGE, b"-0", b"-0.0", b"1E+2"),
    *(b'"\\u0000"', b'"\xef\xbb\xbf"', b'"\xf4\x8f\xbf\xbf"', b'{"a": 1, "a": 2}', b'{"": 0}', b'{"\\u0000": 1}'),
    *(b"[" * 60 + b"]" * 60, b'"' + b"\\u12e4" * 20_000 + b'"', *NO_TEXT),
]  # fmt: skip
READ_FIELDS = ("max_tokens", "seed", "temperature", "n", "user", "stop", "logit_bias", "model", "stream")
RAW_FIELDS = (
    b'"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": %s}}}',
    b'"structured_outputs": {"json": {"title": %s}}',
    b'"structured_outputs": {"regex": %s}',
    b'"structured_outputs": {"choice": [%s]}',
    b'"tools": [{"type": %s}], "tool_choice": "none"',
)
"""That are read in a second step, or passed on."""


ROUTES: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    CHAT: (parse_chat, b'{"messages": [{"role": "user", "content": "x"}]'),
    "/v1/completions": (parse_completion, b'{"prompt": "x"'),
    "/tokenize": (parse_tokenize, b'{"prompt": "x"'),
    "/detokenize": (parse_detokenize, b'{"tokens": [1]'),
}


@pytest.mark.parametrize(("parse", "start"), ROUTES.values(), ids=ROUTES)
def test_every_route_reads_the_same_json(parse, start):
    def refusal(body: bytes) -> InvalidRequest:
        with pytest.raises(InvalidRequest) as refused:
            parse(body)
        return refused.value

    for value in NO_JSON:
        assert refusal(start + b', "nobody_reads": ' + value + b"}").code == "invalid_json", value
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        assert refusal((start + b"}").decode().encode(encoding)).code == "invalid_json", encoding
    for value in NO_TEXT:
        refusal(start.replace(b'"x"', value).replace(b"[1]", b"[" + value + b"]") + b"}")
    for value in ODD_JSON:
        with contextlib.suppress(InvalidRequest):
            parse(start + b', "nobody_reads": ' + value + b"}")


async def test_odd_json_where_it_is_read(system):
    start = ROUTES[CHAT][1]
    fields = [*RAW_FIELDS, *(b'"%s": %%s' % name.encode() for name in READ_FIELDS)]
    for field in fields:
        for value in ODD_JSON:
            response = await system.http.post(CHAT, content=start + b", " + field.replace(b"%s", value) + b"}")
            assert response.status_code in (200, 400, 404), (field, value[:40], response.text[:200])
            if response.status_code != 200:
                assert "9" * 65 not in error_of(response)["message"]
    await system.until_idle()


async def test_of_a_name_that_comes_twice_the_last_counts_and_all_are_checked(system):
    x, y = (json.dumps([user(text)]).encode() for text in "xy")
    assert (await system.http.post(CHAT, content=b'{"messages": %s, "messages": %s}' % (x, y))).status_code == 200
    assert system.language.requests[-1].messages[0].parts[0].text == "y"
    assert (await system.http.post(CHAT, content=b'{"n": 0, "messages": %s, "n": 1}' % x)).status_code == 400
    body = b'{"guided_json": {}, "messages": [{"role": "user", "content": "x"}], "guided_json": null}'
    assert (await system.http.post(CHAT, content=body)).status_code == 200


async def test_malformed_bodies(system):
    for body in BAD_JSON:
        response = await system.http.post(CHAT, content=body)
        assert response.status_code == 400, body[:60]
        assert error_of(response)["code"] in ("invalid_json", "invalid_value")
    assert system.language.requests == []


async def test_a_message_never_repeats_much_of_a_bad_value(system):
    response = await system.chat(messages=[{"role": "x" * 10_000, "content": "x"}])
    assert "x" * 65 not in error_of(response)["message"]


async def test_what_only_looks_bad_is_answered(system):
    """Typed placeholders are plain text where nothing is placed."""
    for text in ("<image> what?", "<IMG_CONTEXT><|im_end|>", IMAGE_MARKER, ""):
        response = await system.chat(messages=[user(text)])
        assert response.status_code == 200
        assert system.language.requests[-1].messages[0].parts[0].text == text
    only_inert = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "structured_outputs": None}
    assert (await system.chat(**only_inert)).status_code == 200
    tools = [{"type": "function", "function": {"name": "f"}}]
    needless = {"tools": tools, "tool_choice": "none", "functions": [{"name": "f"}], "function_call": "none"}
    inert = {"echo": False, "add_generation_prompt": True, "stop_regex": None, "typical_p": 1, "min_new_tokens": 0}
    response = await system.chat(**needless, **inert)
    assert response.status_code == 200, response.text
    assert "x-dvd-ignored" not in response.headers
    outputs = {"regex": None, "grammar": None, "disable_any_whitespace": False, "disable_fallback": True}
    assert (await system.chat(structured_outputs=outputs, response_format=None)).status_code == 200
    assert (await system.chat(structured_outputs={})).status_code == 200
    assert not any(request.sampling.HasField("grammar") for request in system.language.requests)


async def test_markers_place_images(system):
    red, blue = png("red"), png("blue")
    text = f"first {IMAGE_MARKER} then {IMAGE_MARKER}"
    response = await system.chat(messages=[user(red, blue, text)])
    content = response.json()["choices"][0]["message"]["content"]
    assert content == f"user: first [{digest(red)}] then [{digest(blue)}]"
    assert system.language.requests[0].messages[0].inline_images


async def test_markers_mean_nothing_in_other_roles_and_messages(system):
    messages = [{"role": "system", "content": IMAGE_MARKER}, user(IMAGE_MARKER), user(png(), "here")]
    response = await system.chat(messages=messages)
    content = response.json()["choices"][0]["message"]["content"]
    assert content == f"system: {IMAGE_MARKER} user: {IMAGE_MARKER} user: [{digest(png())}] here"
    assert not any(message.inline_images for message in system.language.requests[0].messages)


async def test_developer_is_system(system):
    await system.chat(messages=[{"role": "developer", "content": "be nice"}, user("x")])
    assert [message.role for message in system.language.requests[0].messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/invocations", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes_and_methods(system, method, path, status, code):
    response = await system.http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    if status == 405:
        assert response.headers["allow"]


async def test_unknown_model(system):
    response = await system.chat(model="gpt-4o")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_too_large(system):
    over = system.router.settings.max_item_bytes + 10
    response = await system.chat(messages=[image(data_url(bytes(over)))])
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


async def test_body_bounds():
    async with running_system(max_body_bytes=1000, body_read_timeout=0.2) as system:
        declared = await system.http.post(CHAT, content=bytes(1001))
        assert (declared.status_code, error_of(declared)["code"]) == (413, "request_too_large")
        assert declared.headers["connection"] == "close"

        async def pieces():
            for _ in range(11):
                yield bytes(100)

        counted = await system.http.post(CHAT, content=pieces())
        assert (counted.status_code, error_of(counted)["code"]) == (413, "request_too_large")

        async def stuck():
            yield b"{"
            await asyncio.sleep(0.5)

        slow = await system.http.post(CHAT, content=stuck())
        assert (slow.status_code, error_of(slow)["code"]) == (408, "request_read_timeout")
        await system.until_idle()


async def test_header_bounds(system):
    many = await system.http.get("/live", headers={f"x-{index}": "1" for index in range(300)})
    assert (many.status_code, error_of(many)["code"]) == (431, "headers_too_large")
    long = await system.http.get("/live", headers={"x-long": "a" * 33_000})
    assert (long.status_code, error_of(long)["code"]) == (431, "headers_too_large")


async def test_errors_of_the_language_server_keep_their_status(system):
    system.language.fail_with = InvalidRequest("too long", code="context_length_exceeded", param="messages")
    for stream in (False, True):
        response = await system.chat(stream=stream)
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
    system.language.fail_with = Overloaded("full")
    response = await system.chat(stream=True)
    assert response.status_code == 503
    assert error_of(response)["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "1"
    assert response.headers["x-should-retry"] == "true"


async def test_the_status_of_overload_can_be_chosen_and_of_nothing_else():
    async with running_system(overload_status=429) as system:
        system.language.fail_with = Overloaded("full")
        response = await system.chat()
        assert (response.status_code, error_of(response)["code"]) == (429, "overloaded")
        assert response.headers["x-should-retry"] == "true"
        assert response.headers["retry-after"]
        await system.router.drain()
        response = await system.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "draining")


def test_other_statuses_are_no_overload():
    where = ["--vision", "a:1", "--language", "b:2"]
    assert RouterSettings.load([*where, "--overload-status", "529"]).overload_status == 529
    with pytest.raises(ConfigError, match="429, 503, 529"):
        RouterSettings.load([*where, "--overload-status", "500"])


async def test_an_image_that_only_decoding_unmasks(system):
    """A truncated file has a good header; the vision server's verdict comes back with the image's path."""
    system.vision.failures = [InvalidRequest("the image cannot be read", code="invalid_image")]
    response = await system.chat(messages=[user("x", png())], stream=True)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("invalid_image", "messages[0].content[1].image_url.url")
    assert len(system.vision.requests) == 1  # nobody else is asked to decode it
    await system.until_idle()


async def test_a_bug_is_a_500_that_says_nothing_and_forbids_a_retry(system, monkeypatch, caplog):
    def broken(*arguments):
        raise ZeroDivisionError("secret detail 0x7fff")

    monkeypatch.setattr("router.api.chat.translate", broken)
    response = await system.chat()
    assert response.status_code == 500
    assert error_of(response) == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert response.headers["x-should-retry"] == "false"
    assert "ZeroDivisionError" in caplog.text
    await system.until_idle()


async def test_a_server_that_breaks_the_protocol_is_a_500(system):
    system.language.words = ["x"]
    original = system.language.Generate

    async def twice(request, context):
        async for event in original(request, context):
            yield event
            if event.WhichOneof("event") == "admitted":
                yield event

    system.language.Generate = twice
    await system.language.stop()
    await system.until(lambda: not system.router.fleet.is_ready)
    await system.language.start()
    await system.until(lambda: system.router.fleet.is_ready)
    response = await system.chat()
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"


async def test_deadline(system):
    system.language.at_token.is_open.clear()
    headers = {"X-Dvd-Deadline-Ms": "200"}
    response = await system.http.post(CHAT, json={"messages": [user("x")]}, headers=headers)
    assert response.status_code == 504
    assert error_of(response)["code"] == "timeout"
    await system.until_idle()
    bad = await system.http.post(CHAT, json={"messages": [user("x")]}, headers={"X-Dvd-Deadline-Ms": "-1"})
    assert bad.status_code == 400
    assert error_of(bad)["param"] == "X-Dvd-Deadline-Ms"


def test_the_table_is_json():
    assert json.loads(json.dumps([body for body, _, _ in BAD_FIELDS]))
