"""One server program as a child process: started, listened to, stopped. Knows nothing of models or requests."""

import codecs
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import tty
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.service.announce import Announcement
from common.service.settings import ENV_PREFIX

Echo = Callable[[str], None]
"""Takes what the servers write to stderr: a piece of text that ends a line or redraws one (carriage return)."""

# Servers share the cores of a machine without a GPU. OpenMP threads that wait by spinning for long keep off a core the
# very thread they wait for; those that sleep at once wake late, hundreds of times a step (docs/decisions.md).
_SPIN_COUNT: Final = "2000"
_OPENMP_WAITING: Final = frozenset({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
# A step's shape is a new one nearly every time, and torch and oneDNN keep code for the last 1,024 shapes of each
# product: half a gigabyte, whatever the model's size (docs/decisions.md).
_KEPT_SHAPES: Final = {"LRU_CACHE_CAPACITY": "256", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
_TAIL_LINES = 100  # a crash of native code says where every thread was
_CRASH = "Fatal Python error"
_READ_BYTES = 65536
_PIECE_END = re.compile(r"(?<=[\r\n])")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start, and how. ``cores`` empty: all. ``environ``: variables for this program alone, ``DVD_*`` included.
    ``prefix``: words before the command, of a program that becomes it (``nsenter``)."""

    name: str
    module: str
    args: Sequence[str]
    announce: Path
    cores: Sequence[int] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()


class ServerProcess:
    """A started program. Its stderr is read to the end, so that it never blocks on us; the last lines are kept.

    Must be started from a thread that lives as long as the deployment: Linux ends the child with the thread it came
    from (``deploy.launch``).
    """

    def __init__(self, spec: ProcessSpec, echo: Echo) -> None:
        self.spec = spec
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        reader, writer = _stderr_pair()
        try:
            self._process = subprocess.Popen(
                [*spec.prefix, sys.executable, "-m", "deploy.launch", *_launch_arguments(spec)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a router says "ready at" there; its parent says it for all
                stderr=writer,
                env={**_environment(), **spec.environ},
                # Ctrl-C on the terminal reaches the parent only, which stops the servers in their order.
                # A group, not a session: Linux weighs priorities between sessions only as wholes (autogroup), so a nice
                # vision server in a session of its own would get as much of a busy core as the language server.
                process_group=0,
            )
        finally:
            os.close(writer)
        self._pump = threading.Thread(target=self._read_stderr, args=(reader, echo), name=f"stderr of {spec.name}")
        self._pump.daemon = True
        self._pump.start()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def announcement(self) -> Announcement | None:
        """None until the program is ready."""
        return Announcement.read(self.spec.announce)

    def failure(self) -> str:
        """One line for the operator: how the program ended, and the last thing it said."""
        self._pump.join(timeout=1)
        status = self.exit_status()
        how = f"status {status}" if status is None or status >= 0 else f"signal {_signal_name(-status)}"
        said = [line for line in self._tail if line.strip()]
        crash = next((line for line in said if line.startswith(_CRASH)), None)
        reason = crash or (said[-1] if said else "it said nothing")
        return f"{self.name} ended with {how}: {reason.strip()}"

    def tail(self) -> list[str]:
        """Its last lines on stderr."""
        return list(self._tail)

    def terminate(self) -> None:
        """Ask it to drain. Harmless when it has ended."""
        self._process.terminate()

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it now, and collect it."""
        self._process.kill()
        self._process.wait()
        self._pump.join(timeout=1)

    def _read_stderr(self, reader: int, echo: Echo) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        rest = ""
        with open(reader, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # a closed pty reads as EIO
            while chunk := stream.read(_READ_BYTES):
                *pieces, rest = _PIECE_END.split(rest + decode(chunk))
                for piece in pieces:
                    self._keep(piece, echo)
        if rest:
            self._keep(rest + "\n", echo)

    def _keep(self, piece: str, echo: Echo) -> None:
        if piece.endswith("\n"):
            self._tail.append(piece.rstrip())
        echo(piece)


def _stderr_pair() -> tuple[int, int]:
    """Where we read and where the child writes. A terminal for a terminal, so that progress bars draw themselves."""
    if not sys.stderr.isatty():
        return os.pipe()
    reader, writer = os.openpty()
    tty.setraw(writer)
    return reader, writer


def _launch_arguments(spec: ProcessSpec) -> list[str]:
    cores = ",".join(str(core) for core in spec.cores)
    return [str(os.getpid()), cores, spec.module, *spec.args]


def _environment() -> dict[str, str]:
    """Ours without ``DVD_*``: those were read by the parent, which passes on what each program needs."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return compute_defaults(ours) | ours


def compute_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to ``environ`` for a program that computes; what somebody has set stays."""
    waiting = {} if _OPENMP_WAITING & environ.keys() else {"GOMP_SPINCOUNT": _SPIN_COUNT}
    return waiting | {name: value for name, value in _KEPT_SHAPES.items() if name not in environ}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
