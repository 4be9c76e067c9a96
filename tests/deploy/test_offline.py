"""``from dvd import DvD``: right answers from a system that really serves, one by one, together and in turns."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from common.service.errors import AuthenticationFailed
from deploy.demo import questions
from deploy.images import image_url
from deploy.offline import dvd as offline
from deploy.offline.prompt import Sampling, request_fields
from deploy.settings import ServeSettings
from dvd import BatchError, ConfigError, DvD, InvalidRequest, Overloaded, Prompt, StartupError, Thought, Unavailable
from router.api.schemas import ChatCompletionRequest
from tests.deploy.scripted_server import ScriptedServer, saying
from tests.deploy.test_local import children_of, is_alive, private_directories
from tests.end_to_end.conftest import sample_of

NUMBER, SHAPE, COUNT = questions()
GREEDY = Sampling(temperature=0, max_tokens=32)
FULL = (503, {"error": {"message": "come again", "type": "overloaded_error", "code": "overloaded", "param": None}})


@pytest.fixture(scope="module")
def nano():
    """Nano on this machine, one thread a server: tests run beside tests."""
    with DvD.local("nano", threads=1, api_key=["secret"]) as system:
        yield system


def scripted(replies, **options):
    """A server that says what is written down, as ``ScriptedServer(replies).running()`` gives it, and a DvD on it."""
    server = ScriptedServer(replies)
    return server, lambda: DvD.connect(server.url, **options)


def test_one_image(nano):
    reply = nano.generate(NUMBER.question, images=[NUMBER.image], **GREEDY)
    assert (reply.text, reply.finish_reason) == (NUMBER.answer, "stop")
    assert reply.usage.image_tokens == 256 < reply.usage.prompt_tokens
    assert reply.usage.completion_tokens > 3
    assert 0 < reply.timing.time_to_first_token <= reply.timing.total
    assert reply.timing.server["dvd"]["tiles"] == 1
    assert reply.timing.server["dvd"]["transport"] == "shm"  # the real feature plane
    assert nano.model == "nano"


@pytest.mark.parametrize("form", ["path", "str", "bytes", "pil", "rgba", "url"])
def test_an_image_in_every_form(nano, form):
    content = SHAPE.image.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        given = {
            "path": SHAPE.image,
            "str": str(SHAPE.image),
            "bytes": content,
            "pil": picture,
            "rgba": picture.convert("RGBA"),
            "url": image_url(content),
        }[form]
        assert nano.generate((SHAPE.question, given), **GREEDY).text == SHAPE.answer


def test_several_images(nano):
    """Nano compares the numbers in two images."""
    sample = sample_of("pair", 1)
    assert nano.generate(sample.question, images=sample.images, **GREEDY).text == sample.answer


def test_text_alone(nano):
    reply = nano.generate("Hello", **GREEDY)
    assert reply.text.startswith("I am a very small model.")
    assert reply.usage.image_tokens == 0


def test_pieces_come_as_they_are_made(nano):
    with nano.stream(NUMBER.question, images=NUMBER.image, **GREEDY) as stream:
        first = next(stream)
        seen = stream.reply
        rest = list(stream)
    assert seen is None
    assert len(rest) >= 2
    assert first + "".join(rest) == stream.reply.text == NUMBER.answer


def test_a_batch_keeps_its_order(nano):
    asked = [NUMBER, SHAPE, COUNT] * 8
    replies = nano.generate([(each.question, each.image) for each in asked], **GREEDY)
    assert [reply.text for reply in replies] == [each.answer for each in asked]
    assert nano.generate([]) == []


def test_a_batch_runs_at_once_in_pieces(nano):
    prompts = [Prompt("Hello", sampling={"ignore_eos": True, "max_tokens": 60})] * 2
    stream = nano.stream(prompts, temperature=0)
    pieces = list(stream)
    order = [index for index, _ in pieces]
    assert order != sorted(order)  # neither waited for the other
    texts = ["".join(piece for index, piece in pieces if index == each) for each in (0, 1)]
    assert texts == [reply.text for reply in stream.replies]
    assert {reply.finish_reason for reply in stream.replies} == {"length"}


def test_one_image_with_many_prompts_at_once(nano):
    """A PIL image reads its file when its pixels are first wanted: by one thread."""
    with Image.open(NUMBER.image) as picture:
        replies = nano.generate([NUMBER.question] * 16, images=picture, **GREEDY)
    assert {reply.text for reply in replies} == {NUMBER.answer}


def test_a_failed_prompt_leaves_the_others_their_replies(nano, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    prompts = [
        (NUMBER.question, NUMBER.image),
        ("What?", broken),
        ("What?", tmp_path / "nothing.png"),
        Prompt(SHAPE.question, [SHAPE.image], sampling={"temperature": 9}),
        (COUNT.question, COUNT.image),
    ]
    with pytest.raises(BatchError, match="3 of 5 prompts failed; the first, number 1: ") as caught:
        nano.generate(prompts, **GREEDY)
    texts = [None if reply is None else reply.text for reply in caught.value.replies]
    assert texts == [NUMBER.answer, None, None, None, COUNT.answer]
    errors = caught.value.errors
    assert {index: type(error) for index, error in errors.items()} == dict.fromkeys((1, 2, 3), InvalidRequest)
    assert [errors[index].code for index in (1, 2, 3)] == ["invalid_image", "invalid_value", "invalid_value"]
    assert errors[1].param == "messages[0].content[0].image_url.url"
    assert "nothing.png: No such file" in errors[2].message
    assert errors[3].param == "temperature"


def test_a_conversation_computes_only_what_is_new(nano):
    chat = nano.chat("Be brief.", **GREEDY)
    first = chat.send(NUMBER.question, images=[NUMBER.image])
    assert first.text == NUMBER.answer
    stream = chat.stream(SHAPE.question, images=[SHAPE.image])
    assert "".join(stream) == stream.reply.text
    usage = stream.reply.usage
    assert usage.image_tokens == 512  # the first picture is still in the conversation
    assert usage.cached_tokens > first.usage.prompt_tokens - 32  # all of the first turn but its last block
    assert [message["role"] for message in chat.history] == ["system", "user", "assistant", "user", "assistant"]


def test_a_turn_that_failed_or_was_closed(nano):
    chat = nano.chat(**GREEDY)
    with pytest.raises(InvalidRequest):
        chat.send("What?", images=[b"no picture"])
    assert chat.history == []
    with chat.stream("Hello") as stream:
        said = next(stream)
    assert stream.reply is None
    assert chat.history == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]


def test_a_seed_repeats_itself(nano):
    replies = nano.generate(["Hello"] * 4, temperature=2.0, seed=7, max_tokens=8)
    assert len({reply.text for reply in replies}) == 1
    others = nano.generate([Prompt("Hello", sampling={"seed": seed}) for seed in range(4)], temperature=2, max_tokens=8)
    assert len({reply.text for reply in others}) > 1


def test_a_system_that_shall_think_is_asked_to(nano):
    """Nano was not trained for it: it answers as ever, to a longer prompt."""
    plain, thinking = nano.generate([Prompt("Hello"), Prompt("Hello", sampling={"thinking": True})], **GREEDY)
    assert thinking.usage.prompt_tokens > plain.usage.prompt_tokens + 100
    assert (thinking.reasoning, thinking.usage.reasoning_tokens) == ("", 0)


def test_thoughts_are_pieces_of_their_own_kind_and_stay_out_of_the_conversation():
    server, connect = scripted([saying("4", ".", thinking=["two ", "twos"])] * 4)
    with server.running(), connect() as system:
        reply = system.generate("2+2?", thinking=True)
        assert (reply.text, reply.reasoning) == ("4.", "two twos")
        pieces = list(system.stream(["2+2?"], thinking=False))
        assert [(piece, isinstance(piece, Thought)) for _, piece in pieces] == [
            ("two ", True), ("twos", True), ("4", False), (".", False),
        ]  # fmt: skip
        chat = system.chat(thinking=True)
        assert chat.send("2+2?").reasoning == "two twos"
        with chat.stream("sure?") as stream:
            assert [next(stream) for _ in range(3)] == ["two ", "twos", "4"]
        assert [message["content"] for message in chat.history] == ["2+2?", "4.", "sure?", "4"]
    asked = [request["chat_template_kwargs"]["enable_thinking"] for request in server.requests]
    assert asked == [True, False, True, True]


def test_connect_asks_a_system_that_runs(nano):
    with DvD.connect(f"{nano.address}/v1/", "secret") as other:
        assert other.generate(NUMBER.question, NUMBER.image, **GREEDY).text == NUMBER.answer
    assert nano.generate("Hello", **GREEDY).text  # it still runs
    with pytest.raises(AuthenticationFailed):
        DvD.connect(nano.address, "wrong")


async def test_a_running_event_loop_does_not_matter(nano):
    """As in a notebook."""
    assert asyncio.get_running_loop().is_running()
    assert nano.generate([(NUMBER.question, NUMBER.image)], **GREEDY)[0].text == NUMBER.answer


def test_leaving_a_batch_early_cancels_it(nano):
    endless = Sampling(ignore_eos=True, max_tokens=4000)
    before = {thread for thread in threading.enumerate() if thread.name.startswith("dvd prompts")}
    with nano.stream(["Hello"] * 3, **endless) as stream:
        next(stream)
    deadline = time.monotonic() + 30
    while {thread for thread in threading.enumerate() if thread.name.startswith("dvd prompts")} - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert stream.replies == []


def test_names_that_do_not_exist(nano):
    with pytest.raises(TypeError, match=r"unknown sampling keyword max_new_tokens; did you mean max_tokens\?"):
        nano.generate("Hello", max_new_tokens=5)
    with pytest.raises(TypeError, match="unknown sampling keyword max_token;"):
        nano.generate([Prompt("Hello", sampling={"max_token": 0})])  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError, match="unknown sampling keyword n;"):
        nano.chat().send("Hello", n=2)
    with pytest.raises(TypeError, match="not int"):
        nano.generate("Hello", images=[5])
    with pytest.raises(TypeError, match="a prompt is a text"):
        nano.generate([None])
    with pytest.raises(TypeError, match=r"unknown option max_num_seq; did you mean max_num_seqs\?"):
        DvD.local("nano", max_num_seq=5)


def test_sampling_keywords_are_those_of_the_server():
    fields = request_fields(dict.fromkeys(Sampling.__annotations__, 1))
    assert set(fields) <= set(ChatCompletionRequest.__struct_fields__)


def test_local_options_are_those_of_serve():
    settings = offline._serve_settings("nano", {"language_cores": "0", "api_key": ["x"], "port": 7})
    assert (settings.language_cores, settings.port, settings.enable_per_request_metrics) == ([0], 7, True)
    assert offline._LOCAL_OPTIONS.keys() <= ServeSettings.model_fields.keys()


@pytest.mark.parametrize(
    "model, options, kind, expected",
    [
        ("/nowhere", {}, ConfigError, "model /nowhere: no such directory"),
        ("nano", {"port": "many"}, ConfigError, "port: Input should be a valid integer"),
        ("nano", {"startup_timeout": 0.01}, StartupError, "not ready after 0.01 s"),
    ],
)
def test_a_system_that_cannot_start(model, options, kind, expected):
    before = set(children_of(os.getpid()))
    with pytest.raises(kind, match=expected):
        DvD.local(model, **options)
    assert set(children_of(os.getpid())) <= before


def test_it_outlives_the_thread_that_started_it_and_says_which_server_died():
    before = set(children_of(os.getpid()))
    with ThreadPoolExecutor(1) as pool:
        system = pool.submit(DvD.local, "nano", colocated=True, threads=1).result()
    with system:
        assert system.generate(NUMBER.question, NUMBER.image, **GREEDY).text == NUMBER.answer
        pids = set(children_of(os.getpid())) - before
        (worker,) = (pid for pid in pids if b"deploy.colocated" in Path(f"/proc/{pid}/cmdline").read_bytes())
        stream = system.stream("Hello", ignore_eos=True, max_tokens=4000)
        next(stream)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(Unavailable, match="colocated ended with signal SIGKILL"):
            list(stream)
        with pytest.raises(Unavailable, match="colocated ended with signal SIGKILL"):
            system.generate("Hello")
    system.close()
    with pytest.raises(Unavailable, match="closed"):
        system.generate("Hello")
    assert [pid for pid in pids if is_alive(pid)] == []


@pytest.mark.parametrize("how", ["forgotten", "interrupted"])
def test_a_script_leaves_nothing(how):
    source = f"""
import os, signal, threading
from dvd import DvD
system = DvD.local("nano", threads=1)
print(system.generate("Hello", temperature=0).text, flush=True)
if {how!r} == "interrupted":
    with system:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        system.generate(["Hello"] * 3, ignore_eos=True, max_tokens=4000)
"""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as scratch:
        command = [sys.executable, "-W", "error", "-c", source]
        environ = {**os.environ, "TMPDIR": scratch}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        assert process.stdout is not None
        assert (process.stdout.readline() or "").startswith("I am a very small model.")
        children = children_of(process.pid)
        output, log = process.communicate(timeout=100)
        assert private_directories(Path(scratch)) == []
    assert output == ""
    assert log.strip().splitlines()[-1:] == ([] if how == "forgotten" else ["KeyboardInterrupt"])
    assert process.returncode == (0 if how == "forgotten" else -signal.SIGINT)
    assert [pid for pid in children if is_alive(pid)] == []


def test_a_server_that_is_full_is_asked_again(monkeypatch):
    monkeypatch.setattr(offline, "_MAX_PAUSE_SECONDS", 0.01)
    server, connect = scripted([FULL, FULL, saying("At ", "last.")])
    with server.running(), connect() as system:
        assert system.generate("Hello").text == "At last."
    assert len(server.requests) == 3
    monkeypatch.setattr(offline, "_OVERLOADED_SECONDS", 0.0)
    server, connect = scripted([FULL])
    with server.running(), connect() as system, pytest.raises(Overloaded, match="come again"):
        system.generate("Hello")


def test_no_more_at_once_than_allowed():
    server, connect = scripted([saying("x")] * 3, max_concurrency=1)
    with server.running(), connect() as system:
        assert [index for index, _ in system.stream(["a", "b", "c"])] == [0, 1, 2]
        with pytest.raises(ConfigError, match="max_concurrency"):
            DvD.connect(server.url, max_concurrency=0)


def test_what_is_no_server_of_ours():
    server, _ = scripted([])
    with pytest.raises(ConfigError, match="expected http"):
        DvD.connect("localhost:8000")
    with server.running():
        pass
    with pytest.raises(Unavailable, match="no server answers"):
        DvD.connect(server.url)
