"""``dvd generate``: answers on stdout and nothing else, mistakes in one line before anything is started."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from deploy import cli
from deploy.demo import questions
from deploy.offline.command import _serve_options
from deploy.settings import GenerateSettings
from dvd import DvD
from tests.deploy.scripted_server import ScriptedServer, saying
from tests.deploy.test_local import children_of, is_alive, private_directories

NUMBER, SHAPE, COUNT = questions()


@pytest.fixture(scope="module")
def nano():
    with DvD.local("nano", threads=1) as system:
        yield system


@pytest.fixture
def generate(nano, monkeypatch, capsys):
    """Runs the command on the system of this module; returns status, stdout and stderr."""
    monkeypatch.setattr(DvD, "local", lambda model, **options: DvD.connect(nano.address))

    def run(*arguments):
        status = cli.main(["generate", "nano", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def command():
    """Starts the command as a shell does; ends it whatever the test does. Its files are in ``scratch``."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as scratch:
        started = []

        def start(*arguments):
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", "generate", "nano", "--threads", "1", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TMPDIR": scratch},
            )
            started.append(process)
            return process, Path(scratch)

        yield start
        for process in started:
            process.kill()
            process.communicate()


def test_it_starts_answers_and_stops(command):
    process, scratch = command("--image", NUMBER.image, "--temperature", "0", NUMBER.question)
    output, log = process.communicate(timeout=100)
    assert (process.returncode, output) == (0, NUMBER.answer + "\n"), log
    assert "language server ready" in log  # for people; a pipe gets the answer
    assert private_directories(scratch) == []


def test_ctrl_c_while_it_answers_leaves_nothing(command):
    process, scratch = command("Hello", "--max-tokens", "4000", "--temperature", "2", "--seed", "1", "--colocated")
    assert process.stdout.read(1)
    children = children_of(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 130, log
    assert "Traceback" not in log
    assert [pid for pid in children if is_alive(pid)] == []
    assert private_directories(scratch) == []


def test_a_signal_while_it_starts_leaves_nothing(command):
    process, scratch = command("Hello")
    deadline = time.monotonic() + 60
    while len(children := children_of(process.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, log = process.communicate(timeout=100)
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")
    assert "Traceback" not in log
    assert [pid for pid in children if is_alive(pid)] == []
    assert private_directories(scratch) == []


def test_a_reader_that_has_enough(command):
    process, _ = command("Hello", "--max-tokens", "4000", "--temperature", "2", "--colocated")
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=100) == 141
    assert "Traceback" not in process.stderr.read()


def test_several_images(generate):
    arguments = ["--image", NUMBER.image, "--image", COUNT.image, "--temperature", "0", "--max-tokens", 32, "--json"]
    status, output, _ = generate(*arguments, "What is in the image?")
    assert status == 0
    assert json.loads(output)["usage"]["image_tokens"] == 512


def test_json_is_one_object(generate):
    status, output, log = generate("--json", "--temperature", 0, "--image", SHAPE.image, SHAPE.question)
    assert (status, log, output.count("\n")) == (0, "", 1)
    reply = json.loads(output)
    assert reply.keys() == {"text", "reasoning", "finish_reason", "usage", "timing"}
    assert (reply["text"], reply["finish_reason"]) == (SHAPE.answer, "stop")
    assert reply["reasoning"] == ""
    counts = {"prompt_tokens", "completion_tokens", "cached_tokens", "image_tokens", "reasoning_tokens"}
    assert reply["usage"].keys() == counts
    assert reply["timing"]["total"] >= reply["timing"]["time_to_first_token"] > 0


def test_options_of_sampling_arrive(generate):
    _, output, _ = generate("--json", "--max-tokens", 3, "--temperature", 0, "--system", "Be brief.", "Hello")
    reply = json.loads(output)
    assert (reply["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 3)
    _, bare, _ = generate("--json", "--max-tokens", 3, "--temperature", 0, "Hello")
    assert json.loads(bare)["usage"]["prompt_tokens"] < reply["usage"]["prompt_tokens"]
    twice = [generate("--temperature", 2, "--seed", 3, "--max-tokens", 8, "Hello")[1] for _ in range(2)]
    assert twice[0] == twice[1]


def test_a_file_of_prompts_is_answered_in_its_order(generate, tmp_path):
    entries: list[dict[str, Any]] = [
        {"prompt": each.question, "images": [str(each.image)]} for each in (NUMBER, SHAPE, COUNT) * 3
    ]
    answers = [each.answer for each in (NUMBER, SHAPE, COUNT) * 3]
    # Texts without an image take the one of the command line; the first answer is a long one.
    entries.insert(0, {"prompt": NUMBER.question, "max_tokens": 300, "ignore_eos": True, "system": "Go on."})
    lines = [json.dumps(entry) for entry in entries]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join([*lines, SHAPE.question]) + "\n")
    arguments = ["--prompts", path, "--image", SHAPE.image, "--temperature", 0]
    status, output, log = generate(*arguments)
    assert (status, log) == (0, "")
    assert output.splitlines()[-10:] == [*answers, SHAPE.answer]
    status, output, _ = generate(*arguments, "--json")
    replies = [json.loads(line) for line in output.splitlines()]
    assert [reply["text"] for reply in replies[1:]] == [*answers, SHAPE.answer]
    assert replies[0]["usage"]["completion_tokens"] == 300


def test_a_prompt_that_fails_costs_its_own_line_only(generate, monkeypatch, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    lines = [{"prompt": "What?", "images": [str(broken)]}, {"prompt": SHAPE.question, "images": [str(SHAPE.image)]}]
    text = "\n".join(json.dumps(line) for line in lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    status, output, log = generate("--prompts", "-", "--temperature", 0)
    assert (status, output) == (1, f"\n{SHAPE.answer}\n")
    assert log == "dvd generate: -:1: not a JPEG, PNG, WebP, GIF or BMP image\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    status, output, _ = generate("--prompts", "-", "--temperature", 0, "--json")
    failed, answered = (json.loads(line) for line in output.splitlines())
    assert (status, failed["error"]["code"], answered["text"]) == (1, "invalid_image", SHAPE.answer)


def test_thoughts_are_no_part_of_the_answer(monkeypatch, capsys):
    """On stdout is the answer alone; what was thought is on stderr, in JSON in a field of its own."""
    answers = [saying("4", ".", thinking=["two ", "twos"])] * 3
    with ScriptedServer(answers).running() as server:
        monkeypatch.setattr(DvD, "local", lambda model, **options: DvD.connect(server.url))
        assert cli.main(["generate", "nano", "2+2?", "--thinking"]) == 0
        assert capsys.readouterr() == ("4.\n", "two twos\n")
        assert cli.main(["generate", "nano", "2+2?", "--json"]) == 0
        reply = json.loads(capsys.readouterr().out)
        monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "2+2?", "thinking": true}'))
        assert cli.main(["generate", "nano", "--prompts", "-"]) == 0
        assert capsys.readouterr() == ("4.\n", "")
    assert (reply["text"], reply["reasoning"]) == ("4.", "two twos")
    asked = [request.get("chat_template_kwargs") for request in server.requests]
    assert asked == [{"enable_thinking": True}, None, {"enable_thinking": True}]
    assert "thinking" not in server.requests[2]


def test_thoughts_that_break_off_end_their_line(monkeypatch, capsys):
    late = f"event: error\ndata: {json.dumps({'error': {'message': 'a server died'}})}\n\n"
    with ScriptedServer([[*saying(thinking=["so"])[:2], late]]).running() as server:
        monkeypatch.setattr(DvD, "local", lambda model, **options: DvD.connect(server.url))
        assert cli.main(["generate", "nano", "Hello"]) == 1
    assert capsys.readouterr() == ("", "so\ndvd: error: a server died\n")


def test_a_failure_in_the_middle_of_an_answer_is_told_on_a_line_of_its_own(monkeypatch, capsys):
    late = (
        f"event: error\ndata: {json.dumps({'error': {'message': 'a server died', 'code': 'worker_unavailable'}})}\n\n"
    )
    with ScriptedServer([[*saying("four")[:2], late]]).running() as server:
        monkeypatch.setattr(DvD, "local", lambda model, **options: DvD.connect(server.url))
        assert cli.main(["generate", "nano", "Hello"]) == 1
    assert capsys.readouterr() == ("four\n", "dvd: error: a server died\n")


def test_what_the_server_refuses_is_one_line(generate):
    status, output, log = generate("--max-dynamic-patch", "5", "--max-tokens", "1", "word " * 20000)
    assert (status, output, log.count("\n")) == (1, "", 1)
    assert log.startswith("dvd: error: ")


PROMPTS = {
    "empty": ("\n \n", "prompts.txt: there is no prompt in it"),
    "not json": ('hello\n{"prompt": hello}\n', "prompts.txt:2: begins like a JSON object and is none"),
    "no prompt": ('{"images": []}', 'prompts.txt:1: expected "prompt" with a text'),
    "image": ('{"prompt": "a", "images": "b.png"}', 'prompts.txt:1: expected "images" with a list of paths or URLs'),
    "system": ('{"prompt": "a", "system": 1}', 'prompts.txt:1: expected "system" with a text'),
    "key": ('{"prompt": "a", "max_token": 1}', "prompts.txt:1: unknown key max_token; did you mean max_tokens?"),
    "no image": ('a\n{"prompt": "a", "images": ["/nowhere.png"]}', "prompts.txt:2: /nowhere.png: no such file"),
}


@pytest.mark.parametrize(("content", "expected"), PROMPTS.values(), ids=list(PROMPTS))
def test_mistakes_in_a_file_of_prompts(capsys, tmp_path, content, expected):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    _expect_mistake(capsys, ["nano", "--prompts", str(path)], expected)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["nano"], "there is no prompt: dvd generate MODEL PROMPT, or --prompts FILE"),
        ([], "--model is required"),
        (["/nowhere", "Hello"], "model /nowhere: no such directory"),
        (["nano", "What", "is", "it?"], "several prompts, the second is 'is'; put one in quotes"),
        (["nano", "Hello", "--prompts", "x"], "a prompt and --prompts: say one of them"),
        (["nano", "--prompts", "/nowhere.txt"], "--prompts /nowhere.txt: No such file or directory"),
        (["nano", "Hello", "--image", "/nowhere.png"], "--image /nowhere.png: No such file or directory"),
        (["nano", "Hello", "--image", __file__], "test_generate.py: the image cannot be read: it must be JPEG"),
        (["nano", "Hello", "--imagee", "x"], "unknown flag --imagee; did you mean --image?"),
        (["nano", "Hello", "--temperature", "9"], "temperature: Input should be less than or equal to 2"),
        (["nano", "Hello", "--colocated", "--vision-servers", "2"], "--vision-servers cannot be combined"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, expected):
    _expect_mistake(capsys, argv, expected)


def _expect_mistake(capsys, argv, expected):
    assert cli.main(["generate", *argv]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert expected in output.err


@pytest.mark.parametrize(
    "argv, image, prompt",
    [
        (["nano", "Hello", "--image", "a,b.png"], ["a,b.png"], "Hello"),
        (["--image=[a].png", "--image", "b.png", "nano", "Hello"], ["[a].png", "b.png"], "Hello"),
        (["--model", "nano", "Hello"], [], "Hello"),
        (["nano", "--", "-5 + 3?"], [], "-5 + 3?"),
    ],
)
def test_words_may_stand_anywhere(argv, image, prompt):
    flags, words = cli.generate_arguments(argv)
    settings = GenerateSettings.load(flags)
    assert (settings.model, settings.image, words) == ("nano", image, [prompt])


def test_serving_is_told_what_was_said_and_nothing_else():
    flags = ["--model=nano", "--max-num-seqs=7", "--colocated", "--max-dynamic-patch=6", "--seed=1", "--image=x.png"]
    settings = GenerateSettings.load(flags)
    assert _serve_options(settings) == {"max_num_seqs": 7, "colocated": True, "max_dynamic_patch": 6}
