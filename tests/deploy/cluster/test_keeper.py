"""A server ends when its keeper is told to or dies, and goes on when the Ray head is lost. All processes are real."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster.keeper import CONFIRM_SECONDS, LOG_FILE, LogFile, Order, Vigil
from deploy.cluster.probe import Answer
from deploy.cluster.replica import start_keeper
from deploy.cluster.rundir import KeeperFile, birth_of, end_all, keepers_in
from tests.deploy.cluster.conftest import wait_until

DRAINS = """
import signal, sys, time
def end(*_):
    print("drained", file=sys.stderr)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("serving", file=sys.stderr, flush=True)
time.sleep(60)
"""
FAILS = "import sys; print('no such checkpoint', file=sys.stderr); sys.exit(2)"
REFUSES_TO_END = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", file=sys.stderr, flush=True)
time.sleep(60)
"""


class Kept:
    """A keeper and the actor's end of its line."""

    def __init__(self, directory: Path, grace: float) -> None:
        self.directory = directory
        order = Order(
            cluster="c",
            incarnation="i",
            head="127.0.0.1:1",  # nobody listens there
            tier="vision",
            replica=directory.name,
            server="vision-0",
            module="kept_program",
            grace=grace,
        )
        order.write(directory)
        self.line = start_keeper(directory, has_gpu=False)
        self.line.settimeout(30)
        self._lines = self.line.makefile("r")
        started = self.hear()
        self.keeper, self.pid = started["keeper"], started["pid"]
        self._births = {pid: birth_of(pid) for pid in (self.keeper, self.pid)}

    def hear(self) -> dict[str, Any]:
        return dict(json.loads(self._lines.readline()))

    def tell(self, **record: Any) -> None:
        self.line.sendall(json.dumps(record).encode() + b"\n")

    def hang_up(self) -> None:
        """What the end of its actor looks like."""
        self._lines.close()
        self.line.close()

    @property
    def log(self) -> str:
        return (self.directory / LOG_FILE).read_text()

    @property
    def is_over(self) -> bool:
        return all(birth_of(pid) != born for pid, born in self._births.items())


@pytest.fixture
def keep(tmp_path, monkeypatch) -> Iterator[Any]:
    """Starts a keeper for a program given as source."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    cluster = tmp_path / "dvd-c-i"
    cluster.mkdir()
    started: list[Kept] = []

    def start(source: str, grace: float = 20.0) -> Kept:
        (tmp_path / "kept_program.py").write_text(source)
        directory = cluster / f"vision-0.{len(started)}"
        directory.mkdir()
        started.append(Kept(directory, grace))
        return started[-1]

    yield start
    for kept in started:
        kept.hang_up()
        if birth_of(kept.keeper) is not None and not kept.is_over:
            os.kill(kept.keeper, signal.SIGKILL)


def test_told_to_stop_it_lets_the_server_drain_and_leaves_nothing(keep):
    kept = keep(DRAINS)
    wait_until(lambda: "serving" in kept.log)
    assert os.getsid(kept.keeper) == os.getsid(0) and os.getpgid(kept.keeper) == kept.keeper
    kept.tell(grace=20)
    ended = kept.hear()
    assert (ended["event"], ended["status"], ended["reason"]) == ("ended", 0, "vision-0 ended with status 0: drained")
    wait_until(lambda: kept.is_over)
    assert not kept.directory.parent.exists()


def test_the_end_of_a_server_is_told_with_its_last_words(keep):
    kept = keep(FAILS)
    ended = kept.hear()
    assert (ended["status"], ended["reason"]) == (2, "vision-0 ended with status 2: no such checkpoint")
    wait_until(lambda: kept.is_over)


def test_a_server_that_does_not_drain_in_time_is_killed(keep):
    kept = keep(REFUSES_TO_END)
    wait_until(lambda: "deaf" in kept.log)
    kept.tell(grace=0.3)
    assert kept.hear()["status"] == -signal.SIGKILL


def test_without_actor_and_head_it_goes_on_until_it_is_told_by_signal(keep):
    kept = keep(DRAINS)
    wait_until(lambda: "serving" in kept.log)
    kept.hang_up()
    wait_until(lambda: "the Ray head at 127.0.0.1:1 does not answer" in kept.log)
    assert not kept.is_over
    assert [keeper.replica for keeper in keepers_in(kept.directory.parent)] == ["vision-0.0"]
    assert end_all(kept.directory.parent, 20) == ["vision-0.0"]
    assert kept.is_over and not kept.directory.parent.exists()


def test_a_second_signal_does_not_wait(keep):
    kept = keep(REFUSES_TO_END, grace=60)
    wait_until(lambda: "deaf" in kept.log)
    os.kill(kept.keeper, signal.SIGTERM)
    os.kill(kept.keeper, signal.SIGINT)  # another one: two of a kind may become one
    wait_until(lambda: kept.is_over)


def test_no_server_outlives_its_keeper(keep):
    kept = keep(DRAINS)
    wait_until(lambda: "serving" in kept.log)
    os.kill(kept.keeper, signal.SIGKILL)
    wait_until(lambda: kept.is_over)
    assert kept.line.recv(1) == b""  # which is how its actor learns it


def test_end_all_kills_what_does_not_end(keep):
    kept = keep(REFUSES_TO_END)
    wait_until(lambda: "deaf" in kept.log and KeeperFile.read(kept.directory))
    end_all(kept.directory.parent, 0.2)
    wait_until(lambda: kept.is_over)
    assert not kept.directory.parent.exists()


def test_the_token_stays_with_the_keeper(keep, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("DVD_LISTEN", "here")
    kept = keep("import os, sys; print(sorted(n for n in os.environ if n[:4] in ('RAY_', 'DVD_')), file=sys.stderr)")
    assert kept.hear()["reason"] == "vision-0 ended with status 0: []"


def vigil_over(*answers: tuple[float, Answer]) -> list[bool]:
    vigil = Vigil()
    return [vigil.hear(now, answer) for now, answer in answers]


def test_a_place_given_to_another_is_left_after_a_confirmation():
    ours = Answer.OURS
    assert vigil_over((0, ours), (CONFIRM_SECONDS - 1, ours), (CONFIRM_SECONDS, ours)) == [False, False, True]


def test_a_head_that_dies_after_its_raylet_is_not_taken_for_a_living_one():
    lost = Answer.UNREACHABLE
    assert vigil_over((0, Answer.OURS), (2, lost), (100, lost)) == [False] * 3
    assert vigil_over((0, Answer.OURS), (2, lost), (4, Answer.OURS), (8, Answer.OURS)) == [False] * 4


def test_a_strange_head_changes_nothing_and_a_successor_ends_it_at_once():
    assert vigil_over(*((second, Answer.STRANGE) for second in range(0, 100, 10))) == [False] * 10
    assert vigil_over((0, Answer.UNREACHABLE), (30, Answer.REPLACED)) == [False, True]


def test_a_lost_head_is_asked_less_and_less_often():
    vigil, now, pauses = Vigil(), 0.0, []
    for _ in range(8):
        vigil.hear(now, Answer.UNREACHABLE)
        asked_at = now
        while not vigil.is_due(now):
            now += 0.5
        pauses.append(now - asked_at)
    assert pauses == sorted(pauses) and pauses[0] == 4 and pauses[-1] == 30


def test_a_log_is_bounded(tmp_path):
    log = LogFile(tmp_path / "log", max_bytes=100)
    for number in range(100):
        log.write(f"line {number}\n")
    log.close()
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert len(sizes) == 2 and sum(sizes) < 250
    assert "line 99" in (tmp_path / "log").read_text() + (tmp_path / "log.1").read_text()


def test_our_end_is_not_inherited(keep):
    """Else the line would stay open when the actor dies."""
    kept = keep(DRAINS)
    assert isinstance(kept.line, socket.socket) and not kept.line.get_inheritable()
