"""``dvd serve``: one line when it serves, one line when it cannot, and nothing left behind either way."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.service.errors import StartupError, Unavailable
from deploy.local import LocalDeployment
from deploy.settings import NANO, ServeSettings, model_directory

DEADLINE = 60.0
READY = re.compile(r"ready at (http://127\.0\.0\.1:\d+) model nano vision x1 language x1\n")


@pytest.fixture
def scratch(monkeypatch) -> Iterator[Path]:
    """Where the system under test puts its private directory; short, as socket paths are."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield Path(directory)


@pytest.fixture
def serve(scratch):
    """Starts ``dvd serve`` as a user does; ends it by its pid whatever the test does."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deploy.cli", "serve", *arguments, "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def children_of(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, from the kernel's table."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def private_directories(scratch: Path) -> list[Path]:
    """Those of ``dvd serve``; libraries keep caches beside them."""
    return list(scratch.glob("dvd-*"))


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def broken_model(directory: Path) -> Path:
    """The nano checkpoint without the end of its weights."""
    shutil.copytree(model_directory(NANO), directory)
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return directory


def test_sigterm_lets_a_running_answer_end(serve, scratch):
    process = serve("nano")
    ready = READY.fullmatch(process.stdout.readline())
    assert ready, process.stderr.read()
    children = children_of(process.pid)
    assert len(children) == 3

    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 200, "ignore_eos": True}
    with httpx.stream("POST", f"{ready[1]}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        first = next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert json.loads(first)["choices"]
    assert rest[-1] == "[DONE]"
    reasons = [choice["finish_reason"] for line in rest[:-1] for choice in json.loads(line)["choices"]]
    assert reasons[-1] == "length"

    output, log = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, log
    assert output == ""  # the ready line was all of it
    assert [pid for pid in children if is_alive(pid)] == []
    assert private_directories(scratch) == []


def test_a_signal_while_starting_leaves_nothing(serve, scratch):
    process = serve("nano")
    deadline = time.monotonic() + DEADLINE
    while len(children_of(process.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    output, log = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert (output, log.splitlines()[-1]) == ("", "dvd serve: stopped while starting")
    assert [pid for pid in children if is_alive(pid)] == []
    assert private_directories(scratch) == []


def test_a_broken_checkpoint_is_one_line_that_names_the_program(serve, scratch, tmp_path):
    process = serve(str(broken_model(tmp_path / "broken")))
    output, log = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert output == ""
    assert re.match(r"dvd serve: (vision|language) ended with status 2: .*model\.safetensors", log.splitlines()[-1])
    assert "Traceback" not in log
    assert private_directories(scratch) == []


def test_a_port_that_is_taken(scratch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = ServeSettings(model=NANO, port=other.getsockname()[1])
        deployment = LocalDeployment(settings)
        with pytest.raises(StartupError, match=r"router ended with status \d: .*"):
            deployment.start()
    assert deployment.processes == ()
    assert private_directories(scratch) == []


def test_a_deadline_for_starting(scratch):
    deployment = LocalDeployment(ServeSettings(model=NANO, port=0, vision_servers=2, startup_timeout=0.1))
    with pytest.raises(StartupError, match=r"not ready after 0\.1 s: vision-0, vision-1, language, router; see"):
        deployment.start()
    assert private_directories(scratch) == []


def test_a_server_that_dies_ends_the_system_and_a_second_signal_cuts_the_drain_short(scratch):
    """Nothing restarts a server yet, so half a system must not go on in silence."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4000, "ignore_eos": True}
    with LocalDeployment(ServeSettings(model=NANO, port=0)) as deployment:
        assert [process.name for process in deployment.processes] == ["vision", "language", "router"]
        assert list(deployment.metrics_addresses) == ["vision", "language"]
        for address in (deployment.address, *(f"http://{each}" for each in deployment.metrics_addresses.values())):
            assert httpx.get(f"{address}/metrics").is_success
        (private,) = private_directories(scratch)
        assert private.stat().st_mode & 0o777 == 0o700
        pids = [process.pid for process in deployment.processes]
        with httpx.stream("POST", f"{deployment.address}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(pids[0], signal.SIGKILL)
            with pytest.raises(Unavailable, match="vision ended with signal SIGKILL"):
                deployment.watch()
            deployment.request_stop()
            deployment.watch()  # returns: told to stop
            deployment.request_stop()
            deployment.stop()
            with pytest.raises(httpx.TransportError):
                list(lines)
    assert deployment.processes == ()
    assert [pid for pid in pids if is_alive(pid)] == []
    assert private_directories(scratch) == []
