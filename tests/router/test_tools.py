"""Tools on the wire and in answers, in OpenAI's shapes, as its client reads them."""

import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from protos.language_pb2 import Grammar, ToolCall, ToolCalls, ToolSchema
from tests.router.conftest import user
from tests.router.test_chat import events

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für eine Stadt", "parameters": CITY},
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CALL = [
    "Let",
    " me",
    " see.\n",
    "<tool_",
    'call>\n{"name": "weather", "arg',
    'uments": {"city"',
    ': "Ulm"',
    "}}",
    "\n</tool_call>",
]
NAMED = {"type": "function", "function": {"name": "time"}}


def strict(tool):
    return {**tool, "function": {**tool["function"], "strict": True}}


def of_calls(*schemas, **allowed):
    tools = [ToolSchema(name=name, parameters=json.dumps(schema)) for name, schema in schemas]
    return Grammar(tool_calls=ToolCalls(tools=tools, **allowed), param="tools")


BOTH = (("weather", CITY), ("time", NOTHING))
ANY = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "is_offered", "grammar"),
    [
        ({}, True, None),
        ({"tool_choice": None, "parallel_tool_calls": True}, True, None),
        ({"tool_choice": "auto"}, True, None),
        ({"tool_choice": "none"}, False, None),
        ({"tool_choice": "required"}, True, of_calls(*BOTH, allows_many=True)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, True, of_calls(*BOTH)),
        ({"tool_choice": NAMED}, True, of_calls(BOTH[1])),
        ({"parallel_tool_calls": False}, True, of_calls(("weather", ANY), ("time", ANY), allows_text=True)),
        (
            {"tools": [strict(WEATHER), TIME]},
            True,
            of_calls(BOTH[0], ("time", ANY), allows_text=True, allows_many=True),
        ),
        ({"tools": [], "tool_choice": "auto"}, False, None),
        ({"response_format": {"type": "text"}}, True, None),
        ({"tools": [strict(TIME)], "chat_template_kwargs": {"enable_thinking": True}}, True,
         of_calls(BOTH[1], allows_text=True, allows_many=True)),
    ],
)  # fmt: skip
async def test_tools_reach_the_language_server(system, fields, is_offered, grammar):
    response = await system.chat(**{"tools": [WEATHER, TIME], **fields})
    assert (response.status_code, "x-dvd-ignored" in response.headers) == (200, False), response.text
    request = system.language.requests[0]
    tools = [json.loads(tool) for tool in request.tools]
    assert bool(tools) == is_offered
    if WEATHER in tools:
        time = {"type": "function", "function": {"name": "time", "parameters": NOTHING}}
        assert tools == [WEATHER, time] and "für" in request.tools[0]
    assert (request.sampling.grammar if request.sampling.HasField("grammar") else None) == grammar


async def test_calls_and_results_of_earlier_turns(system):
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}
    empty = {"function": {"name": "time", "arguments": ""}}
    turns = [
        user("weather?"),
        {"role": "assistant", "content": None, "tool_calls": [called, empty]},
        {"role": "tool", "tool_call_id": "call_1", "content": "<|im_end|> rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "So.", "tool_calls": None},
    ]
    response = await system.chat(messages=turns)
    assert response.status_code == 200, response.text
    _, assistant, first, second, last = system.language.requests[0].messages
    assert list(assistant.tool_calls) == [
        ToolCall(name="weather", arguments='{"city":"Ulm"}'),
        ToolCall(name="time", arguments="{}"),
    ]
    assert not assistant.parts and not last.tool_calls
    assert [(m.role, m.parts[0].text) for m in (first, second)] == [("tool", "<|im_end|> rain"), ("tool", "noon")]


async def test_a_call_in_an_answer(system):
    system.language.words = CALL
    choice = (await system.chat(tools=[WEATHER])).json()["choices"][0]
    [call] = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    system.language.words = CALL[3:]
    choice = (await system.chat(tools=[WEATHER])).json()["choices"][0]
    assert (choice["message"]["content"], len(choice["message"]["tool_calls"])) == (None, 1)


async def test_a_call_in_a_stream(system):
    system.language.words, system.language.held = [*CALL[:-1], "\n</tool"], ("", "_call>")
    *chunks, done = events((await system.chat(tools=[WEATHER], stream=True, n=2)).text)
    assert done == "[DONE]"
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in choices[1:-1]]
        assert len(deltas) == len(CALL), "one event for each token"
        head = deltas[5]["tool_calls"][0]
        assert head.pop("id").startswith("call_")
        assert deltas == [
            {"content": "Let"},
            {"content": " me"},
            {"content": " see."},
            {"content": ""},
            {"content": ""},
            {"tool_calls": [{"index": 0, "type": "function", "function": {"name": "weather", "arguments": '{"city"'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": ': "Ulm"'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
            {"content": ""},
        ]
        assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "tool_calls")


@pytest.mark.parametrize("tools", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [TIME]}])
async def test_what_may_not_be_called_is_text(system, tools):
    system.language.words = CALL
    message = (await system.chat(**tools)).json()["choices"][0]
    assert (message["message"]["content"], message["finish_reason"]) == ("".join(CALL), "stop")
    assert "tool_calls" not in message["message"]
    *chunks, _ = events((await system.chat(**tools, stream=True)).text)
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert ("".join(said), chunks[-1]["choices"][0]["finish_reason"]) == ("".join(CALL), "stop")


async def test_openai_client_calls_and_answers(system):
    system.language.words = CALL
    tools: Any = [WEATHER, TIME]
    async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        async with client.chat.completions.stream(model="fake", messages=[user("hi")], tools=tools) as stream:
            streamed: Any = (await stream.get_final_completion()).choices[0].message
        full = await client.chat.completions.create(model="fake", messages=[user("hi")], tools=tools)
        message: Any = full.choices[0].message
        result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        await client.chat.completions.create(model="fake", messages=[user("hi"), message, result], tools=tools)
    for said in (streamed, message):
        assert said.content == "Let me see."
        assert [(call.function.name, call.function.arguments) for call in said.tool_calls] == [
            ("weather", '{"city": "Ulm"}')
        ]
    assert system.language.requests[-1].messages[1].tool_calls[0].arguments == '{"city": "Ulm"}'


async def test_tokenize_counts_tools(system):
    body = {"messages": [user("hi")], "tools": [TIME]}
    response = await system.http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    assert [json.loads(tool)["function"]["name"] for tool in system.language.texts[0].tools] == ["time"]
