"""``python -m deploy.health`` says of a real program whether it is ready, with keys and without."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.service.announce import Announcement, write
from deploy import cli, health
from deploy.settings import model_directory


@contextlib.contextmanager
def program(module: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 100
    while Announcement.read(path) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(environ: dict[str, str], capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = health.main(arguments, environ)
    return status, capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shipped") / "keys"
    assert cli.main(["keys", "init", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def vision(keys, tmp_path_factory) -> Iterator[Path]:
    """What a vision server with keys, on all addresses, has announced: as in compose.yaml."""
    path = tmp_path_factory.mktemp("vision") / "dvd.json"
    arguments = ["--listen", "0.0.0.0:0", "--keys", keys / "vision", "--announce", path, "--metrics-listen", "null"]
    with program("vision_server", "--model", model_directory("nano"), *arguments, "--threads", "1"):
        wait_for(path)
        yield path


def test_a_server_with_keys_is_ready(vision, keys, capsys):
    environ = {"DVD_ANNOUNCE": str(vision), "DVD_KEYS": str(keys / "vision")}
    assert ask(environ, capsys) == (0, "")
    assert ask(environ, capsys, "--live") == (0, "")


def test_without_keys_it_lets_nobody_in(vision, capsys):
    status, said = ask({"DVD_ANNOUNCE": str(vision)}, capsys, "--live")
    assert status == 1
    assert said.endswith("does not answer: UNAVAILABLE")


def test_a_router_without_servers_is_alive_but_not_ready(tmp_path, capsys):
    socket, path = tmp_path / "router.sock", tmp_path / "dvd.json"
    arguments = ["--vision", "127.0.0.1:1", "--language", "127.0.0.1:1", "--uds", socket, "--announce", path]
    with program("router", *arguments):
        deadline = time.monotonic() + 100
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        write(path, name="router", role="router", address=f"unix:{socket}")  # it has not: it is not ready
        environ = {"DVD_ANNOUNCE": str(path)}
        while ask(environ, capsys, "--live") != (0, ""):
            assert time.monotonic() < deadline
        assert ask(environ, capsys) == (1, "not ready: /health says 503")


def test_nobody_is_there(tmp_path, capsys):
    path = tmp_path / "dvd.json"
    for role, said in {"router": "ConnectError", "language": "UNAVAILABLE"}.items():
        write(path, name=role, role=role, address="127.0.0.1:1")
        status = ask({"DVD_ANNOUNCE": str(path)}, capsys, "--live")
        assert status == (1, f"127.0.0.1:1 does not answer: {said}")


def test_before_anything_was_announced(tmp_path, capsys):
    assert ask({"DVD_ANNOUNCE": str(tmp_path / "none")}, capsys) == (1, "not ready: nothing was announced yet")
    assert ask({}, capsys) == (1, "DVD_ANNOUNCE is not set: who shall be asked?")


def test_it_is_run_as_a_program(tmp_path):
    environ = {**os.environ, "DVD_ANNOUNCE": str(tmp_path / "none")}
    ran = subprocess.run([sys.executable, "-m", "deploy.health"], env=environ, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "not ready: nothing was announced yet\n")


@pytest.mark.parametrize(
    ("said", "dialled"),
    [("0.0.0.0:8000", "127.0.0.1:8000"), ("[::]:8000", "[::1]:8000"), ("10.0.0.1:1", "10.0.0.1:1")],
)
def test_all_addresses_include_loopback(said, dialled):
    assert health.nearest(said) == dialled
