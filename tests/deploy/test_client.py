"""The small client reads streams as API.md section 4 writes them, and turns every failure into one of our errors."""

import base64
import json

import httpx
import pytest

from common.service.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTooLarge,
    Unavailable,
    to_http,
)
from deploy.client import Answer, ChatClient, Thought, _retry_after, user_message
from tests.deploy.scripted_server import ScriptedServer, saying

QUESTION = [user_message("hello")]


def test_pieces_come_in_order_and_the_whole_is_kept():
    metrics = {"dvd": {"total_ms": 1.0}}
    with ScriptedServer([saying("for", "", "ty")]).running() as server, ChatClient(server.url, "secret") as client:
        assert client.models() == ["scripted"]
        assert list(client.stream(QUESTION, temperature=0, max_tokens=None)) == ["for", "ty"]
        assert client.last == Answer("forty", "stop", {})
    assert server.requests == [{"messages": QUESTION, "stream": True, "temperature": 0, "max_tokens": None}]
    assert server.keys == ["Bearer secret"]
    with ScriptedServer([saying("x", metrics=metrics)]).running() as server, ChatClient(server.url) as client:
        assert list(client.stream(QUESTION)) == ["x"]
        assert client.last == Answer("x", "stop", metrics)
    assert server.keys == [None]


@pytest.mark.parametrize("names", [("reasoning_content", "reasoning"), ("reasoning_content",), ("reasoning",)])
def test_thoughts_are_told_from_text_under_every_name_they_have(names):
    deltas = [dict.fromkeys(names, "so "), {**dict.fromkeys(names, "7"), "content": "Sev"}, {"content": "en"}]
    events = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    with ScriptedServer([[*events, "data: [DONE]\n\n"]]).running() as server, ChatClient(server.url) as client:
        pieces = list(client.stream(QUESTION))
        assert client.last == Answer("Seven", reasoning="so 7")
    assert pieces == ["so ", "7", "Sev", "en"]
    assert [isinstance(piece, Thought) for piece in pieces] == [True, True, False, False]


def test_an_image_travels_as_its_own_bytes(tmp_path):
    image = tmp_path / "picture.png"
    image.write_bytes(b"\x89PNG and more")
    image_part, text_part = user_message("what?", [image])["content"]
    kind, _, payload = image_part["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(payload) == b"\x89PNG and more"
    assert text_part == {"type": "text", "text": "what?"}


def test_an_image_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidRequest, match="No such file"):
        user_message("what?", [tmp_path / "nothing.png"])


def test_a_refusal_carries_the_message_of_the_server():
    body = {"error": {"message": "temperature is above 2", "code": "invalid_value"}}
    with ScriptedServer([(400, body)]).running() as server, ChatClient(server.url) as client:
        with pytest.raises(InvalidRequest, match="temperature is above 2"):
            list(client.stream(QUESTION))
        assert client.last is None


@pytest.mark.parametrize(
    "kind",
    [InvalidRequest, NotFound, RequestTooLarge, AuthenticationFailed, Overloaded, Unavailable, DeadlineExceeded,
     InternalError],
)  # fmt: skip
def test_an_error_is_the_one_the_server_raised(kind):
    status, body, _ = to_http(kind("it is so", code="its_code", param="messages[0]"))
    script = [(status, body)]
    with ScriptedServer(script).running() as server, ChatClient(server.url) as client, pytest.raises(kind) as caught:
        list(client.stream(QUESTION))
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.code, caught.value.param) == ("it is so", "its_code", "messages[0]")


@pytest.mark.parametrize("kind", [InvalidRequest, AuthenticationFailed, Overloaded, DeadlineExceeded, InternalError])
def test_an_error_inside_a_stream_is_it_too(kind):
    script = [*saying("four")[:2], f"event: error\ndata: {json.dumps(to_http(kind('it is so'))[1])}\n\n"]
    with ScriptedServer([script]).running() as server, ChatClient(server.url) as client, pytest.raises(kind) as caught:
        list(client.stream(QUESTION))
    assert type(caught.value) is kind


def test_how_long_to_wait():
    for headers, seconds in (
        ({"retry-after": "3", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({}, None),
    ):
        assert _retry_after(httpx.Response(503, headers=headers)) == seconds


def test_a_failure_after_the_first_token():
    late = (
        f"event: error\ndata: {json.dumps({'error': {'message': 'a server died', 'code': 'worker_unavailable'}})}\n\n"
    )
    script = [*saying("four")[:2], late, "data: [DONE]\n\n"]
    with ScriptedServer([script]).running() as server, ChatClient(server.url) as client:
        pieces = client.stream(QUESTION)
        assert next(pieces) == "four"
        with pytest.raises(Unavailable, match="a server died"):
            next(pieces)


def test_something_that_is_not_our_server():
    with ScriptedServer([(502, ["a proxy"])]).running() as server, ChatClient(server.url) as client:
        with pytest.raises(Unavailable, match="HTTP 502"):
            list(client.stream(QUESTION))
        url = server.url
    with ChatClient(url) as client, pytest.raises(Unavailable, match="no server answers"):
        client.models()
