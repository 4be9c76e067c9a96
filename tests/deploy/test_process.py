"""A child process is heard to its last line, and ends when it is told to or when its parent does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.process import ProcessSpec, ServerProcess, compute_defaults

DEADLINE = 20.0

SPEAKS_AND_FAILS = """
import sys
print("loading", file=sys.stderr)
print("half\\rwhole\\r", end="", file=sys.stderr)
print("fake: no such checkpoint", file=sys.stderr)
sys.exit(2)
"""
ANNOUNCES_AND_STAYS = """
import json, os, sys, time
record = {"name": "fake", "role": "vision", "address": "unix:/x", "metrics_address": "", "pid": os.getpid()}
open(sys.argv[1] + "~", "w").write(json.dumps({**record, "address": os.environ.get("DVD_LISTEN", "unset")}))
os.rename(sys.argv[1] + "~", sys.argv[1])
time.sleep(60)
"""
IGNORES_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write("null")
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a program from its source; ends what a test leaves."""
    started = []
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")

    def start_program(source: str, echo=lambda piece: None, **spec) -> ServerProcess:
        (tmp_path / "fake_program.py").write_text(source)
        announce = tmp_path / "announce.json"
        process = ServerProcess(ProcessSpec("fake", "fake_program", [str(announce)], announce, **spec), echo)
        started.append(process)
        return process

    yield start_program
    for process in started:
        process.kill()


def wait_until(is_true) -> None:
    deadline = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_failure_names_the_program_its_status_and_its_last_words(start):
    heard: list[str] = []
    process = start(SPEAKS_AND_FAILS, heard.append)
    assert process.wait(DEADLINE)
    assert process.failure() == "fake ended with status 2: fake: no such checkpoint"
    assert heard == ["loading\n", "half\r", "whole\r", "fake: no such checkpoint\n"]


def test_a_crash_of_native_code_says_where(start):
    process = start("import faulthandler, os; faulthandler.enable(); os.abort()")
    assert process.wait(DEADLINE)
    assert process.failure() == "fake ended with signal SIGABRT: Fatal Python error: Aborted"
    assert any("fake" in line for line in process.tail())


def test_announcement_is_none_until_the_program_is_ready(start):
    process = start(ANNOUNCES_AND_STAYS)
    wait_until(process.announcement)
    assert process.announcement().name == "fake"


def test_variables_of_the_parent_do_not_reach_the_programs(start, monkeypatch):
    """A serve-wide DVD_LISTEN must not become the address of each server."""
    monkeypatch.setenv("DVD_LISTEN", "here")
    process = start(ANNOUNCES_AND_STAYS)
    wait_until(process.announcement)
    assert process.announcement().address == "unset"


def test_cores_are_pinned(start, tmp_path):
    core = min(os.sched_getaffinity(0))
    process = start(ANNOUNCES_AND_STAYS, cores=[core])
    wait_until(process.announcement)
    assert os.sched_getaffinity(process.pid) == {core}


def test_terminate_is_enough_for_a_program_that_listens(start):
    process = start(ANNOUNCES_AND_STAYS)
    wait_until(process.announcement)
    process.terminate()
    assert process.wait(DEADLINE)
    assert process.failure() == "fake ended with signal SIGTERM: it said nothing"


def test_kill_is_enough_for_one_that_does_not(start, tmp_path):
    process = start(IGNORES_SIGTERM)
    wait_until((tmp_path / "announce.json").exists)
    process.terminate()
    assert not process.wait(0.2)
    process.kill()
    assert process.exit_status() == -signal.SIGKILL


def test_no_child_survives_a_killed_parent(tmp_path):
    """Nobody runs clean-up code after SIGKILL; the kernel does it."""
    (tmp_path / "fake_program.py").write_text(ANNOUNCES_AND_STAYS)
    announce = tmp_path / "announce.json"
    parent_source = (
        "import sys, time; from pathlib import Path; from deploy.process import ProcessSpec, ServerProcess\n"
        "ServerProcess(ProcessSpec('fake', 'fake_program', [sys.argv[1]], Path(sys.argv[1])), print)\n"
        "time.sleep(60)"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    parent = subprocess.Popen([sys.executable, "-c", parent_source, str(announce)], env=environ)
    try:
        wait_until(announce.exists)
        child = json.loads(announce.read_text())["pid"]
        assert is_alive(child)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_alive(child))


@pytest.mark.parametrize("theirs", [{"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "0"}])
def test_who_says_how_threads_wait_is_obeyed(theirs):
    assert "GOMP_SPINCOUNT" in compute_defaults({"PATH": "/bin"})
    assert "GOMP_SPINCOUNT" not in compute_defaults({"PATH": "/bin", **theirs})


def test_the_shapes_that_are_kept_are_bounded_unless_somebody_says_how_many():
    added = compute_defaults({"PATH": "/bin", "LRU_CACHE_CAPACITY": "1024"})
    assert added["ONEDNN_PRIMITIVE_CACHE_CAPACITY"].isdigit()
    assert "LRU_CACHE_CAPACITY" not in added
