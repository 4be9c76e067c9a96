"""A conversation keeps what was said, forgets what failed, and ends politely."""

import io

import pytest
from rich.console import Console

from deploy.chat import Chat
from deploy.cli import main
from deploy.client import ChatClient
from tests.deploy.scripted_server import ScriptedServer, saying


@pytest.fixture
def talk():
    """Runs lines through a chat with a scripted server; returns server, chat and what the terminal showed."""

    def run(replies, *lines, system=None):
        shown = io.StringIO()
        with ScriptedServer(replies).running() as server, ChatClient(server.url) as client:
            chat = Chat(client, Console(file=shown, width=200), {"model": "scripted"}, system)
            goes_on = [chat.take(line) for line in lines]
        return server, chat, shown.getvalue(), goes_on

    return run


def test_turns_add_up(talk):
    server, chat, shown, _ = talk(
        [saying("It is ", "4."), saying("Blue.")], "what number?", "what colour?", system="be brief"
    )
    assert "It is 4.\n" in shown
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "be brief", "what number?", "It is 4.", "what colour?",
    ]  # fmt: skip
    assert [message["role"] for message in chat.history] == ["system", "user", "assistant", "user", "assistant"]


def test_thoughts_are_shown_but_not_remembered(talk):
    server, _, shown, _ = talk([saying("It is ", "4.", thinking=["two ", "twos"]), saying("Yes.")], "2+2?", "sure?")
    assert "two twos\nIt is 4.\n" in shown
    assert [message["content"] for message in server.requests[1]["messages"]] == ["2+2?", "It is 4.", "sure?"]
    assert "chat_template_kwargs" not in server.requests[0]


def test_thoughts_are_dim_on_a_terminal():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard")
    with ScriptedServer([saying("4.", thinking=["so"])]).running() as server, ChatClient(server.url) as client:
        Chat(client, console, {}, None).take("2+2?")
    assert "\x1b[2mso\x1b[0m\n4.\n" in shown.getvalue()


def test_an_image_goes_with_the_next_message_only(talk, tmp_path):
    image = tmp_path / "a picture.png"
    image.write_bytes(b"\x89PNG")
    server, chat, _, _ = talk([saying("A dog."), saying("Yes.")], f"/image {image}", "what is it?", "sure?")
    first, second = (request["messages"][-1]["content"] for request in server.requests)
    assert [part["type"] for part in first] == ["image_url", "text"]
    assert second == "sure?"
    assert server.requests[1]["messages"][0]["content"] == first  # and stays in the conversation
    assert chat.images == []


def test_a_failed_question_is_taken_back(talk, tmp_path):
    image = tmp_path / "broken.png"
    image.write_bytes(b"no picture")
    refusal = (400, {"error": {"message": "not an image", "code": "invalid_image"}})
    _, chat, shown, _ = talk([refusal], f"/image {image}", "what is it?")
    assert "error: not an image" in shown
    assert chat.history == []


def test_reset_and_quit(talk):
    _, chat, _, goes_on = talk([saying("Hi.")], "hello", "/reset", "", "/unknown", "/image /nowhere.png", "/quit")
    assert chat.history == []
    assert chat.images == []
    assert goes_on == [True] * 5 + [False]


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(talk, monkeypatch):
    class Interrupted(Console):
        def out(self, *objects, **options):
            raise KeyboardInterrupt

    shown = io.StringIO()
    with ScriptedServer([saying("a", "b")]).running() as server, ChatClient(server.url) as client:
        chat = Chat(client, Interrupted(file=shown), {}, None)
        assert chat.take("go on and on")
    assert "(stopped)" in shown.getvalue()
    assert chat.history[-1] == {"role": "assistant", "content": "a"}


def test_the_command_reads_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with ScriptedServer([saying("Hi ", "there.")]).running() as server:
        assert main(["chat", "--url", server.url, "--temperature", "0", "--system", "be kind", "--thinking"]) == 0
    assert "Hi there." in capsys.readouterr().out
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "be kind"}
    assert server.requests[0]["temperature"] == 0
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_nobody_answers(capsys):
    with ScriptedServer([]).running() as server:
        url = server.url
    assert main(["chat", "--url", url]) == 1
    assert capsys.readouterr().err.startswith("dvd: error: no server answers")
