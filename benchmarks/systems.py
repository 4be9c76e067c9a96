"""Systems under test: each is started on this machine, measured, and stopped before the next one starts.

DvD divided, DvD undivided (``--colocated``), and vLLM from an environment of its own. All get the same cores, the same
checkpoint and the same precision; the client is the same for all. Knows nothing of loads and figures.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import httpx

from benchmarks.plan import Target
from common.service.errors import ConfigError, Unavailable
from deploy.local import LocalDeployment
from deploy.settings import ServeSettings, model_directory

_STARTUP_SECONDS: Final = 1800.0
_STOP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.5
_TAIL_LINES: Final = 3
Dtype = Literal["float32", "bfloat16"]


class System(Protocol):
    """Something that can be started and asked."""

    @property
    def name(self) -> str:
        """As it stands in a table."""

    @property
    def command(self) -> str:
        """What somebody else would type to start it."""

    def serving(self) -> AbstractContextManager[Target]:
        """It answers while the block runs. Raises DvdError when it does not start."""


@dataclass(frozen=True, slots=True)
class Dvd:
    """This project, with any option of ``dvd serve``. ``cores``: all its processes stay on these; empty: on any."""

    name: str
    model: str
    options: dict[str, Any]
    cores: frozenset[int] = frozenset()

    @property
    def command(self) -> str:
        words = [f"--{name.replace('_', '-')}{_value(value)}" for name, value in self.options.items()]
        pinned = f"taskset -c {','.join(map(str, sorted(self.cores)))} " if self.cores else ""
        return " ".join([f"{pinned}dvd serve {self.model}", *words])

    @contextmanager
    def serving(self) -> Iterator[Target]:
        # Unknown options are refused when the deployment validates them.
        settings = ServeSettings.model_validate(
            {"model": self.model, "port": 0, "enable_per_request_metrics": True, **self.options}
        )
        deployment = LocalDeployment(settings)
        with _on_cores(self.cores):
            deployment.start()
        with deployment:
            yield Target(deployment.address)


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM, by the path of its ``vllm`` command. ``environment`` is set for it beside our own."""

    executable: Path
    model: str
    dtype: Dtype
    max_model_len: int = 8192
    name: str = "vLLM"
    environment: tuple[tuple[str, str], ...] = (
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_CPU_KVCACHE_SPACE", "2"),
        ("VLLM_NO_USAGE_STATS", "1"),
    )

    @property
    def command(self) -> str:
        variables = " ".join(f"{name}={value}" for name, value in self.environment)
        return f"{variables} {shlex.join(['vllm', *self._arguments(self.model)])}"

    @contextmanager
    def serving(self) -> Iterator[Target]:
        if not self.executable.is_file():
            raise ConfigError(f"--vllm {self.executable}: no such file")
        port = _free_port()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [str(self.executable), *self._arguments(str(model_directory(self.model))), "--port", str(port)],
                env={**os.environ, **dict(self.environment)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # it starts processes of its own: all are ended together
            )
            try:
                address = f"http://127.0.0.1:{port}"
                self._wait_until_healthy(process, address, output.fileno())
                yield Target(address)
            finally:
                _end_group(process)

    def _arguments(self, model: str) -> list[str]:
        images = ["--limit-mm-per-prompt", '{"image":2,"video":0}']  # else it profiles videos for minutes
        return ["serve", model, "--dtype", self.dtype, "--max-model-len", str(self.max_model_len), *images]

    def _wait_until_healthy(self, process: subprocess.Popen[bytes], address: str, output: int) -> None:
        deadline = time.monotonic() + _STARTUP_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Unavailable(f"{self.name} ended with status {process.returncode}: {_tail(output)}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health", timeout=_POLL_SECONDS, trust_env=False).is_success:
                    return
            time.sleep(_POLL_SECONDS)
        raise Unavailable(f"{self.name} was not ready after {_STARTUP_SECONDS:g} s: {_tail(output)}")


@contextmanager
def _on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Programs that are started meanwhile inherit these cores; this process goes back to its own."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    if not cores <= before:
        raise ConfigError(f"cores {sorted(cores)}: this process may use {sorted(before)}")
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _value(value: object) -> str:
    if value is True:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "=" + ",".join(map(str, value))
    return f"={value}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The program and everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a child that outlived it


def _tail(output: int) -> str:
    size = os.fstat(output).st_size
    text = os.pread(output, 4096, max(0, size - 4096)).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:]) or "it said nothing"
