"""``ray.address: local``: one machine needs no Ray cluster beforehand, and is left without one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.cluster.local_head import own_ip
from deploy.cluster.state import ClusterState
from tests.deploy.cluster.conftest import wait_until

SECONDS = 110
SPEC = {
    "name": "here",
    "model": "nano",
    "insecure_network": True,
    "ray": {"address": "local"},
    "vision": {"cpus": 0.2},
    "language": {"cpus": 0.2},
    "routers": {"cpus": 0.2, "port": 0},
    "autoscale": {"interval": 0.3},
}


@pytest.fixture
def environ(monkeypatch) -> Iterator[dict[str, str]]:
    """A user who has never used Ray. Short paths: Ray puts sockets in them."""
    root = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "RAY_TMPDIR", "TMPDIR", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(root))
    (root / "cluster.yaml").write_text(yaml.safe_dump(SPEC))
    yield dict(os.environ)
    state = ClusterState.load("here")
    if state is not None and state.local_head is not None:
        state.local_head.stop()
    shutil.rmtree(root, ignore_errors=True)


def dvd(environ: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environ, check=False)


def session_of(pid: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == pid:
                found.append((entry / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return [line for line in found if line]


def test_up_starts_a_guarded_head_and_down_ends_it(environ):
    home = Path(environ["HOME"])
    up = dvd(environ, "up", str(home / "cluster.yaml"))
    assert up.returncode == 0, up.stderr
    ready, join = up.stdout.splitlines()
    url = re.fullmatch(r"ready at (http://\S+) model nano vision x1 language x1", ready)
    assert url and httpx.get(f"{url[1]}/health", trust_env=False).is_success
    state = ClusterState.load("here")
    assert state is not None and state.local_head is not None
    assert join == f"other machines join with: RAY_AUTH_MODE=token ray start --address={state.address}"
    assert state.address.startswith(f"{own_ip()}:")
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    status = dvd(environ, "status")
    assert status.returncode == 0 and "vision 1/1, language 1/1, router 1/1" in status.stdout
    down = dvd(environ, "down")
    assert (down.returncode, down.stdout, down.stderr) == (0, "", "")
    assert session_of(state.local_head.pid) == []
    assert list(home.glob("dvd-*")) == [] and ClusterState.load("here") is None


def test_ctrl_c_while_starting_leaves_nothing(environ):
    command = [sys.executable, "-m", "deploy.cli", "up", str(Path(environ["HOME"]) / "cluster.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as up:
        state = wait_until(lambda: ClusterState.load("here"), SECONDS)
        wait_until(lambda: list(Path(environ["TMPDIR"]).glob("dvd-here-*/*")), SECONDS, "for a server to begin")
        up.send_signal(signal.SIGINT)
        output, log = up.communicate(timeout=SECONDS)
    assert (up.returncode, output) == (130, ""), log
    assert session_of(state.local_head.pid) == []
    assert list(Path(environ["TMPDIR"]).glob("dvd-*")) == [] and ClusterState.load("here") is None
