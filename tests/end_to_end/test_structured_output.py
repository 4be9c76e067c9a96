"""Replies of a given form: a schema, a regular expression, a choice - through the whole system, as clients ask."""

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.end_to_end.conftest import data_url, sample_of, user

SAMPLE = sample_of("number", 1)
PICTURE = {"model": "nano", "messages": [user(SAMPLE.question, data_url(SAMPLE.images[0]))], "temperature": 0}
TEXT = {"model": "nano", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
READING = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["shape", "number", "tags"],
    "additionalProperties": False,
}


def as_format(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "reading", "strict": True, "schema": schema}}


def check_reading(text: str) -> None:
    reading = json.loads(text)
    assert list(reading) == ["shape", "number", "tags"]
    assert reading["shape"] in ("circle", "square")
    assert type(reading["number"]) is int and 0 <= reading["number"] <= 9999
    assert len(reading["tags"]) <= 2 and all(isinstance(tag, str) and len(tag) <= 8 for tag in reading["tags"])


def ask(client, request=PICTURE, outputs=None, **options):
    """The choices of a reply; all of them have ended by themselves."""
    body = {"structured_outputs": outputs} if outputs is not None else None
    reply = client.chat.completions.create(**(request | options), extra_body=body)
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    return [choice.message.content for choice in reply.choices]


def test_a_schema(client):
    [text] = ask(client, response_format=as_format(READING))
    check_reading(text)
    [text] = ask(client, outputs={"json": READING})
    check_reading(text)


def test_choices_drawn_at_random_keep_to_the_schema(client):
    texts = ask(client, response_format=as_format(READING), n=4, temperature=1.5, seed=3)
    for text in texts:
        check_reading(text)
    assert len(set(texts)) > 1


def test_a_regular_expression(client):
    [text] = ask(client, outputs={"regex": r"(zero|one){2}, [a-f]{2,6}-[0-9]{3}!"}, max_tokens=200)
    assert re.fullmatch(r"(zero|one){2}, [a-f]{2,6}-[0-9]{3}!", text)


def test_the_picture_still_decides_where_the_form_leaves_it_open(client):
    """Nano reads the number, though its own sentence around it is forbidden."""
    wrong = str((int(SAMPLE.short_answer) + 1111) % 10000)
    assert ask(client, outputs={"choice": [f"the number is {wrong}", SAMPLE.answer]}) == [SAMPLE.answer]
    assert ask(client, outputs={"choice": ["red", "blue", "red and blue"]})[0] in ("red", "blue", "red and blue")


def test_any_json_object(client):
    """A model that was never shown JSON may not come to its end; it writes the beginning of an object."""
    reply = client.chat.completions.create(**TEXT, response_format={"type": "json_object"}, max_tokens=60)
    text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert text.startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)


def test_a_stream_brings_the_same_text(client):
    whole = ask(client, response_format=as_format(READING))
    stream = client.chat.completions.create(**PICTURE, response_format=as_format(READING), stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    assert ["".join(choice.delta.content or "" for choice in choices)] == whole
    assert choices[-1].finish_reason == "stop"


async def test_free_text_beside_grammars_is_unchanged(nano):
    async with AsyncOpenAI(base_url=f"{nano.address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        create = client.chat.completions.create
        alone = await create(**TEXT)
        replies: Any = await asyncio.gather(
            create(**TEXT, response_format=as_format(READING)),
            create(**PICTURE, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}),
            create(**TEXT, extra_body={"structured_outputs": {"regex": "(?=a)"}}),
            create(**TEXT),
            create(**PICTURE),
            return_exceptions=True,
        )
    reading, answer, error, text, picture = replies
    assert text.choices[0].message.content == alone.choices[0].message.content
    assert picture.choices[0].message.content == SAMPLE.answer
    check_reading(reading.choices[0].message.content)
    assert answer.choices[0].message.content in ("yes", "no")
    assert isinstance(error, openai.BadRequestError)


@pytest.mark.parametrize(
    ("outputs", "code", "param"),
    [
        ({"regex": "("}, "invalid_value", "structured_outputs.regex"),
        ({"regex": r"(a)\1"}, "unsupported_parameter", "structured_outputs.regex"),
        ({"json": {"not": {"type": "string"}}}, "unsupported_parameter", "structured_outputs.json"),
        ({"json": {"type": "integer", "multipleOf": 123456789}}, "invalid_value", "structured_outputs.json"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "invalid_value", "structured_outputs.json"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_before_anything_is_streamed(client, outputs, code, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**PICTURE, stream=True, extra_body={"structured_outputs": outputs})
    assert (caught.value.code, caught.value.param) == (code, param)


TOOL: Any = {"type": "function", "function": {"name": "report", "strict": True, "parameters": READING}}
OTHER: Any = {"type": "function", "function": {"name": "other"}}


def test_a_call_that_must_be_made(client):
    """Nano was never shown a tool: the grammar alone makes the call. With one tool, its name says what ``required``
    does."""
    options: Any = {"tools": [TOOL], "parallel_tool_calls": False}
    [whole] = client.chat.completions.create(**PICTURE, **options, tool_choice="required").choices
    [call] = whole.message.tool_calls
    assert (call.type, call.function.name, whole.message.content, whole.finish_reason) == (
        *("function", "report", None, "tool_calls"),
    )
    check_reading(call.function.arguments)
    named: Any = {"type": "function", "function": {"name": "report"}}
    with client.chat.completions.stream(**PICTURE, **options, tool_choice=named) as stream:
        [streamed] = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    turns: Any = [user("again"), whole.message, {"role": "tool", "tool_call_id": call.id, "content": "<|im_end|>"}]
    again = client.chat.completions.create(**PICTURE | {"messages": turns}, tools=[TOOL], max_tokens=8)
    assert again.choices[0].finish_reason in ("stop", "length")


def test_calls_of_several_tools_drawn_at_random(client):
    options = {
        "tools": [TOOL, OTHER],
        "tool_choice": "required",
        "n": 3,
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 200,
    }
    for choice in client.chat.completions.create(**TEXT | options).choices:
        assert choice.finish_reason in ("tool_calls", "length")
        *whole, last = choice.message.tool_calls
        for call in [*whole, last] if choice.finish_reason == "tool_calls" else whole:
            assert call.function.name in ("report", "other")
            if call.function.name == "report":
                check_reading(call.function.arguments)
            else:
                assert json.loads(call.function.arguments) == {}


def test_tools_that_need_not_be_called_leave_the_answer(client):
    """The picture is still read, whether the reply is free or watched for calls."""
    for options in ({}, {"tool_choice": "none"}):
        reply = client.chat.completions.create(**PICTURE, tools=[TOOL], **options).choices[0]
        assert (reply.message.tool_calls, reply.finish_reason) == (None, "stop")
        assert reply.message.content


def test_a_tool_that_cannot_be_enforced_is_refused(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**TEXT, tools=[tool], tool_choice="required", stream=True)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")


def test_a_bad_word_is_not_said(client):
    [text] = ask(client)
    word = text.split()[-1]
    reply = client.chat.completions.create(**PICTURE, extra_body={"bad_words": [word]}, max_tokens=40)
    assert reply.choices[0].message.content != text
    assert f" {word}" not in reply.choices[0].message.content
    assert ask(client) == [text]
