"""A Ray head that ``dvd up`` starts on this machine and ``dvd down`` ends (``ray.address: local``).

Other machines may join it as nodes. Its token guards it, and it has no dashboard.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from common.service.errors import StartupError, Unavailable
from deploy.cluster.head import has_token, is_reachable, require_ray
from deploy.cluster.rundir import birth_of

_START_SECONDS: Final = 90.0
_STOP_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.1


@dataclass(slots=True)
class LocalHead:
    """As the state file remembers it; ``born`` tells it from a later process with the same pid."""

    pid: int
    born: int
    address: str = ""

    @classmethod
    def start(cls) -> Self:
        """Start one: token required, no dashboard, no usage reports.

        Raises:
            StartupError: it did not come up; nothing is left running.
        """
        require_ray()
        environ = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        _make_token(environ)
        ip, port = own_ip(), _free_port()
        command = [_ray(), "start", "--head", "--block", "--include-dashboard=false"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [*command, f"--node-ip-address={ip}", f"--port={port}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,  # it outlives us, and `stop` finds what belongs to it
            )
            head = cls(process.pid, birth_of(process.pid) or 0, f"{ip}:{port}")
            try:
                _wait_for_head(process, head.address)
            except BaseException as error:
                head.stop()
                process.wait()
                if isinstance(error, Unavailable):
                    log.seek(0)
                    lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
                    raise StartupError(f"ray start --head failed: {lines[-1].strip() if lines else error}") from None
                raise
        return head

    def stop(self) -> None:
        """End it and everything in its session; harmless when it has ended."""
        if birth_of(self.pid) == self.born:
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while _session(self.pid) and time.monotonic() < deadline:
            _collect(self.pid)
            time.sleep(_POLL_SECONDS)
        for pid in _session(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _make_token(environ: Mapping[str, str]) -> None:
    if has_token():
        return
    command = [_ray(), "get-auth-token", "--generate"]
    made = subprocess.run(
        command,
        env=environ,
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
        umask=0o077,  # Ray writes it for everybody to read
    )
    if made.returncode:
        raise StartupError(f"ray get-auth-token --generate failed: {made.stderr.strip()[-200:]}")


def _wait_for_head(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not is_reachable(address):
        if process.poll() is not None:
            raise Unavailable("it ended")
        if time.monotonic() > deadline:
            raise Unavailable(f"no answer within {_START_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)


def _ray() -> str:
    """The command beside our interpreter."""
    return str(Path(sys.executable).with_name("ray"))


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def own_ip() -> str:
    """The address that Ray gives this node: where a packet to the world would leave. Sends none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            pid = int(entry.name)
            if os.getsid(pid) == leader and birth_of(pid) is not None:
                found.append(pid)
    return found


def _collect(pid: int) -> None:
    """Should it be our child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
