"""Failpoints do what their text says, and only in a test build."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from common.service import failpoints
from common.service.errors import ConfigError
from common.service.failpoints import Failpoints, check_build

PLACE = "vision.encode.before"
RELEASE, TEST = {"DVD_FAILPOINTS": f"{PLACE}=kill"}, {"DVD_FAILPOINTS": f"{PLACE}=kill", "DVD_TEST_BUILD": "1"}


def due(points: Failpoints, num_hits: int, content: bytes = b"") -> list[int]:
    """The numbers of the hits that acted, from 1."""
    return [number for number in range(1, num_hits + 1) if points.due(PLACE, content) is not None]


@pytest.mark.parametrize(
    ("when", "hits"), [("", [1, 2, 3, 4]), (":3", [3]), (":3+", [3, 4]), (":100%", [1, 2, 3, 4]), (":0%", [])]
)
def test_when_it_acts(when, hits):
    assert due(Failpoints(f"{PLACE}=raise{when}"), 4) == hits


def test_only_hits_with_the_content_count():
    points = Failpoints(f"{PLACE}=raise:has(poison)&2")
    assert due(points, 3, b"harmless") == []
    assert due(points, 3, b"a poisoned picture") == [2]


def test_chance_is_seeded():
    text = f"seed=5; {PLACE}=raise:50%"
    hits = due(Failpoints(text), 40)
    assert hits == due(Failpoints(text), 40)
    assert 0 < len(hits) < 40


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "points"
    points = Failpoints(f"file:{path}")
    assert due(points, 1) == []
    path.write_text(f"{PLACE}=raise:1")
    assert due(points, 3) == [1]
    path.with_suffix(".new").write_text(f"{PLACE}=corrupt(nan)")
    path.with_suffix(".new").replace(path)
    point = points.due(PLACE)
    assert point is not None and (point.action, point.value) == ("corrupt", "nan")
    path.unlink()
    assert due(points, 1) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere=kill", "'nowhere': must be one of"),
        (f"{PLACE}=explode", "'explode': must be one of"),
        (f"{PLACE}", "expected NAME=ACTION"),
        (f"{PLACE}=sleep", "'' is no number"),
        (f"{PLACE}=kill:soon", "'soon' is no number"),
    ],
)
def test_what_cannot_be_understood_is_named(text, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Failpoints(text)


def test_many_threads_pass_and_every_hit_counts():
    points = Failpoints(f"{PLACE}=raise:100+")
    acted = []
    threads = [threading.Thread(target=lambda: acted.extend(due(points, 50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(acted) == 101


def test_a_release_build_refuses():
    assert not failpoints.ARE_ON
    check_build({})
    check_build(TEST)
    with pytest.raises(ConfigError, match="DVD_FAILPOINTS is set, and this is no test build"):
        check_build(RELEASE)


@pytest.mark.parametrize("command", [["-m", "router"], ["-m", "deploy.cli", "router"]], ids=["router", "dvd"])
def test_a_server_of_a_release_build_does_not_start(command):
    arguments = [sys.executable, *command, "--vision=127.0.0.1:1", "--language=127.0.0.1:2", "--port=0"]
    ended = subprocess.run(arguments, env=os.environ | RELEASE, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "router cannot start: DVD_FAILPOINTS is set, and this is no test build (DVD_TEST_BUILD=1): unset it"
    ]


def test_kill_is_not_survived():
    """In a process of its own, which knows from its environment what to do."""
    script = f"from common.service import failpoints as f; assert f.ARE_ON; f.hit({PLACE!r}); print('alive')"
    ended = subprocess.run([sys.executable, "-c", script], env=os.environ | TEST, capture_output=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")
