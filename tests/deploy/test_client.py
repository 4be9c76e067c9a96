"""The small client reads streams as API.md section 4 writes them, and turns every failure into one of our errors."""

import base64
import json

import pytest

from common.service.errors import InvalidRequest, Unavailable
from deploy.client import Answer, ChatClient, user_message
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
