"""Whole clusters on this machine: raylets with addresses of their own (127.0.0.2, ...), and an operator's shell."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cluster.rundir import KeeperFile
from deploy.cluster.state import resolve_name
from deploy.cluster.status import Observer, Snapshot, load_state
from deploy.keys import main as make_keys
from deploy.settings import KeysSettings

TOKEN = "5" * 64
UP_SECONDS = 120
NODE_CPUS = 4
SPEC: dict[str, Any] = {
    "model": "nano",
    "insecure_network": True,
    "vision": {"cpus": 1},
    "language": {"cpus": 1},
    "routers": {"cpus": 0.5, "port": 0},
    "autoscale": {"interval": 0.2},
}


def wait_until(is_true: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """What ``is_true`` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := is_true()):
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.1)
    return found


class Raylets:
    """``tests.deploy.cluster.raylets`` in a session of its own, to which every process of the cluster belongs."""

    def __init__(self, environ: dict[str, str], log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.deploy.cluster.raylets"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environ,
                text=True,
                start_new_session=True,
            )
        self.nodes: list[str] = []
        self.address = self._read()["address"]

    def add(self, *ips: str) -> None:
        self._obey("add", NODE_CPUS, *ips)
        self.nodes += ips

    def kill_raylet(self, ip: str) -> None:
        """The raylet alone: Ray's processes of the node follow it, ours do not."""
        self._obey("kill", ip)
        self.nodes.remove(ip)

    def kill_head(self) -> None:
        self._obey("kill-head")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def processes(self) -> dict[str, str]:
        """Pid -> command line of what lives in the session."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) == self._process.pid:
                    found[entry.name] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: line for pid, line in found.items() if line}  # a zombie has none

    def our_processes(self) -> list[str]:
        """Those that only a cluster of ours brings."""
        marks = (
            "-m deploy.cluster.",
            "vision_server",
            "language_server",
            "-m router",
            "ray::Replica",
            "ray::Controller",
        )
        return [line for line in self.processes().values() if any(mark in line for mark in marks)]

    def pids_of(self, mark: str) -> list[int]:
        return [int(pid) for pid, line in self.processes().items() if mark in line]

    def _obey(self, *command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the raylets ended; see their log"
        return dict(json.loads(line))


class Operator:
    """Types ``dvd`` commands."""

    def __init__(self, environ: dict[str, str], directory: Path, address: str) -> None:
        self._environ = environ
        self._directory = directory
        self._address = address
        self._observer: Observer | None = None
        self._keys = directory / "keys"
        if not self._keys.exists():
            make_keys(KeysSettings.load([]), ["init", str(self._keys)])

    def run(self, *words: str, seconds: float = UP_SECONDS) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=self._environ, check=False)

    def file(self, name: str, **changes: Any) -> str:
        """A cluster.yaml: ``SPEC`` with each group's keys changed. Its servers know one another by certificate."""
        content = {"name": name, "ray": {"address": self._address}, "keys": str(self._keys), **SPEC}
        for key, value in changes.items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        path = self._directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def done(self, *words: str) -> str:
        """Output of a command that must succeed."""
        result = self.run(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def refused(self, *words: str) -> str:
        """The one line of a command that must fail."""
        result = self.run(*words)
        assert result.returncode != 0 and result.stdout == ""
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr.strip()

    def look(self) -> Snapshot:
        """What ``dvd status --json`` prints, without starting a program for it."""
        if self._observer is None:
            self._observer = Observer(load_state(resolve_name([])))
        return self._observer.look()

    def close(self) -> None:
        """Before another cluster is started."""
        if self._observer is not None:
            self._observer.close()
        self._observer = None

    def servers(self, tier: str) -> list[dict[str, Any]]:
        return [server for server in self.look()["servers"] if server["tier"] == tier]

    def wait_well(self, seconds: float = 90.0) -> Snapshot:
        """Until ``dvd status`` finds nothing amiss and as many servers as desired."""

        def look() -> Snapshot | None:
            found = self.look()
            ready = [server["tier"] for server in found["servers"] if server["state"] == "ready"]
            wanted = {tier: group["desired"] for tier, group in found["groups"].items()}
            is_well = len(ready) == len(found["servers"]) and wanted == {tier: ready.count(tier) for tier in wanted}
            return found if wanted and is_well else None

        found: Snapshot = wait_until(look, seconds, "for all servers")
        return found


@pytest.fixture(scope="module")
def environ(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Of raylets and operator alike. Short paths: Ray puts sockets in them."""
    tmp_path_factory.getbasetemp()  # before this module's TMPDIR, which is gone with it
    root = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    (root / "tmp").mkdir()
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "4",  # raylets give up on a lost head soon
        "RAY_health_check_period_ms": "500",  # and the head on a raylet that refuses five times
        "RAY_TMPDIR": str(root),
        "TMPDIR": str(root / "tmp"),
        "XDG_STATE_HOME": str(root / "state"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", ours["TMPDIR"])
        yield dict(os.environ)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def raylets(environ, tmp_path_factory) -> Iterator[Raylets]:
    log = tmp_path_factory.mktemp("ray") / "raylets.log"
    started = Raylets(environ, log)
    try:
        started.add("127.0.0.2", "127.0.0.3", "127.0.0.4")
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def operator(environ, raylets, tmp_path_factory) -> Iterator[Operator]:
    typing = Operator(environ, tmp_path_factory.mktemp("operator"), raylets.address)
    yield typing
    typing.close()


def kill_node(raylets: Raylets, ip: str, servers: list[dict[str, Any]]) -> None:
    """As if its plug was pulled: the raylet, and every process of ours on the node."""
    keepers = [KeeperFile.read(Path(server["directory"])) for server in servers if server["node"] == ip]
    assert keepers
    for keeper in keepers:
        assert keeper is not None
        keeper.signal(signal.SIGKILL)
    raylets.kill_raylet(ip)
