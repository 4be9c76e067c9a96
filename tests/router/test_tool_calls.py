"""Calls told from text, whatever its pieces are: a call is streamed as it comes, and no text is ever lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.api.tool_calls import ToolCallParser

WEATHER_ARGUMENTS = '{"city": "Ulm", "days": [1, {"a": "}</tool_call>\\""}]}'
WEATHER = f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER_ARGUMENTS}}}\n</tool_call>'
TIME = '<tool_call>{"arguments": {}, "name": "time"}</tool_call>'


def read(pieces, names=("weather", "time")):
    """Text, and name and arguments of each call."""
    parser = ToolCallParser(names)
    said = ""
    calls: list[list[str]] = []
    for text, found in [*map(parser.push, pieces), parser.flush()]:
        said += text
        for piece in found:
            assert (piece.id is None) == (piece.name is None)
            if piece.name is not None:
                calls.append([piece.name, ""])
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.arguments
    assert parser.num_calls == len(calls)
    return said, [tuple(call) for call in calls]


CASES = [
    ("", "", []),
    ("hello\n", "hello\n", []),
    (WEATHER, "", [("weather", WEATHER_ARGUMENTS)]),
    (f"Let me see.\n{WEATHER}\n{TIME}\n", "Let me see.", [("weather", WEATHER_ARGUMENTS), ("time", "{}")]),
    (f"{TIME} and so on", " and so on", [("time", "{}")]),
    ('<tool_call>{"name": "time"}', "", [("time", "{}")]),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "U', "", [("weather", '{"city": "U')]),
    ('<tool_call>\n{"name": "weather", "arguments": {}', "", [("weather", "{}")]),
    ('<tool_call>\n{"name": "weather", "arguments": {}, "x": 1}', ', "x": 1}', [("weather", "{}")]),
    (f'a <tool_call>x</tool_call> b {TIME}', "a <tool_call>x</tool_call> b", [("time", "{}")]),
    (f"<tool_call> <tool_call{TIME}", "<tool_call> <tool_call", [("time", "{}")]),
]  # fmt: skip
TEXTS = [
    "a <tool_call>",
    "a <tool_",
    "<tool_call>\n{",
    '<tool_call>\n{"name": "delete", "arguments": {"a": 1}}\n</tool_call>',
    '<tool_call>\n{"name": "delete"}\n</tool_call>',
    '<tool_call>\n{"name": ["time"]}\n</tool_call>',
    '<tool_call>\n{"name": "time", "arguments": "{}"}\n</tool_call>',
    '<tool_call>\n{"name": "time", "arguments": ',
    '<tool_call>\n{"name": "time" "arguments": {}}\n</tool_call> ',
    "\n<tool_call>\n[]\n</tool_call>\n",
    "</tool_call> <tool_response> x",
]
ALL = CASES + [(text, text, []) for text in TEXTS]


@pytest.mark.parametrize(("reply", "text", "calls"), ALL, ids=[reply[:40] for reply, _, _ in ALL])
def test_a_reply_reads_the_same_in_any_pieces(reply, text, calls):
    assert read([reply]) == (text, calls)
    assert read(reply) == (text, calls)
    for at in range(len(reply)):
        assert read([reply[:at], "", reply[at:]]) == (text, calls)


@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "time", "arguments": ', "{", "}", '"', " \n", "a"])
    )
)
@settings(max_examples=300, deadline=None)
def test_what_is_no_call_is_text_to_the_letter(pieces):
    said, calls = read(pieces)
    if not calls:
        assert said == "".join(pieces)
    rest = iter("".join(pieces))
    assert all(character in rest for character in said), "text of the reply, in its order"


def test_arguments_come_as_they_are_written():
    parser = ToolCallParser(["time"])
    assert parser.push('<tool_call>{"name": "time", "arguments": ') == ("", [])
    [first], [more], [last] = (parser.push(piece)[1] for piece in ('{"a', '": 1', "}}"))
    assert (first.name, first.arguments, more.arguments, last.arguments) == ("time", '{"a', '": 1', "}")


def test_a_delta_has_the_shape_of_openai():
    parser = ToolCallParser(["time"])
    [begin] = parser.push('<tool_call>{"name": "time", "arguments": {"a')[1]
    [more] = parser.push('": 1')[1]
    head = begin.delta()
    assert head.pop("id").startswith("call_")
    assert head == {"index": 0, "type": "function", "function": {"name": "time", "arguments": '{"a'}}
    assert more.delta() == {"index": 0, "function": {"arguments": '": 1'}}


def test_a_call_in_another_order_keeps_its_arguments():
    _, [(_, arguments)] = read(['<tool_call>{"arguments": {"ö": [1]}, "name": "time"}</tool_call>'])
    assert json.loads(arguments) == {"ö": [1]}
