"""``python -m deploy.cluster.keeper DIRECTORY SOCKET``: looks after one server, also when Ray is gone.

The Ray actor of a server (``deploy.cluster.replica``) starts a keeper and speaks with it over a socket, one JSON record
a line. The keeper starts the server and is the only one who ends it. When its actor vanishes it asks the Ray head:

    the head knows this cluster          our node was given up and our place filled: drain and end
    the head knows a successor of it     likewise
    the head does not answer             it is lost, and with it all scaling: serve on, ask again
    the head does not know the cluster   it is another head: serve on, ask again

A keeper that is killed takes its server with it (``deploy.launch``). Knows nothing of Ray but its address.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from deploy.cluster.probe import Answer, Probe
from deploy.cluster.rundir import KeeperFile, birth_of, remove
from deploy.cluster.tiers import Tier
from deploy.process import ProcessSpec, ServerProcess

ORDER_FILE: Final = "order.json"
ANNOUNCE_FILE: Final = "announce.json"
OPTIONS_FILE: Final = "options.yaml"
LOG_FILE: Final = "log"

CONFIRM_SECONDS: Final = 5.0
"""The head must know the cluster for this long without our actor: a head that dies takes a moment to do so."""
_ASK_SECONDS: Final = 2.0
_MAX_ASK_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.2
_MAX_LOG_BYTES: Final = 16 * 2**20
_MAX_RECORD_BYTES: Final = 65536
_KILL_GRACE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Order:
    """What a keeper shall look after. ``grace``: seconds a server gets to end after SIGTERM."""

    cluster: str
    incarnation: str
    head: str
    tier: Tier
    replica: str
    server: str
    module: str
    grace: float

    @classmethod
    def read(cls, directory: Path) -> Self:
        return cls(**json.loads((directory / ORDER_FILE).read_text("utf-8")))

    def write(self, directory: Path) -> None:
        (directory / ORDER_FILE).write_text(json.dumps(asdict(self)), "utf-8")


class Vigil:
    """Decides whether a server without an actor goes on. Pure: times are in seconds and come from the caller."""

    def __init__(self) -> None:
        self._ours_since: float | None = None
        self._next_ask = 0.0
        self._pause = _ASK_SECONDS

    def is_due(self, now: float) -> bool:
        """Whether to ask the head again."""
        return now >= self._next_ask

    def hear(self, now: float, answer: Answer) -> bool:
        """True: drain and end."""
        if answer is Answer.REPLACED:
            return True
        if answer is Answer.OURS:
            self._pause = _ASK_SECONDS
            self._ours_since = now if self._ours_since is None else self._ours_since
        else:
            self._ours_since = None
            self._pause = min(2 * self._pause, _MAX_ASK_SECONDS)
        self._next_ask = now + self._pause
        return self._ours_since is not None and now - self._ours_since >= CONFIRM_SECONDS


class LogFile:
    """What a server says, in two files of bounded size."""

    def __init__(self, path: Path, max_bytes: int = _MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file = path.open("a", encoding="utf-8", errors="replace")

    def write(self, text: str) -> None:
        """A full disk costs the log, not the server; neither does a word after ``close``."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)
            self._file.flush()
            if self._file.tell() > self._max_bytes:
                self._file.close()
                self._path.replace(self._path.with_suffix(".1"))
                self._file = self._path.open("a", encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Nothing is written any more."""
        self._file.close()


class Keeper:
    """Lives as long as its server.

    Args:
        directory: of this server; removed in the end.
        actor: the other end of it is our actor's.
        environ: for asking the head; the server gets it without Ray's variables.
    """

    def __init__(self, directory: Path, actor: socket.socket, environ: Mapping[str, str]) -> None:
        self._directory = directory
        self._order = Order.read(directory)
        self._log = LogFile(directory / LOG_FILE)
        self._actor: socket.socket | None = actor
        self._heard = b""
        self._probe = Probe(self._order.head, self._order.cluster, self._order.incarnation, environ)
        self._vigil = Vigil()
        self._is_asking = False
        self._last_answer: Answer | None = None
        self._kill_at: float | None = None  # set once the server was asked to end
        self._signals = 0
        options = ["--config", str(directory / OPTIONS_FILE)]
        spec = ProcessSpec(self._order.server, self._order.module, options, directory / ANNOUNCE_FILE)
        self._server = ServerProcess(spec, self._log.write)

    def run(self) -> None:
        """Until the server has ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        born = birth_of(os.getpid()) or 0
        record = KeeperFile(self._order.tier, self._order.replica, os.getpid(), born, self._server.pid)
        record.write(self._directory)
        self._tell(event="started", keeper=os.getpid(), pid=self._server.pid)
        while self._server.exit_status() is None:
            self._listen()
            self._obey_signals()
            if self._actor is None:
                self._keep_vigil(time.monotonic())
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._server.kill()
        self._leave()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _obey_signals(self) -> None:
        """The first one drains, the second one does not wait for it."""
        if self._signals:
            self._end(self._order.grace if self._signals == 1 else 0.0)

    def _listen(self) -> None:
        if self._actor is None:
            time.sleep(_POLL_SECONDS)
            return
        readable, _, _ = select.select([self._actor], [], [], _POLL_SECONDS)
        if not readable:
            return
        received = _receive(self._actor)
        if not received:
            self._say("its actor is gone")
            self._actor.close()
            self._actor = None
            return
        *lines, self._heard = (self._heard + received).split(b"\n")
        for line in lines:
            self._end(float(json.loads(line)["grace"]))

    def _keep_vigil(self, now: float) -> None:
        if not self._is_asking:
            if not self._vigil.is_due(now):
                return
            self._probe.start()
            self._is_asking = True
        answer = self._probe.poll()
        if answer is None:
            return
        self._is_asking = False
        if answer is not self._last_answer:
            self._last_answer = answer
            self._say(f"the Ray head at {self._order.head} {answer.value}")
        if self._vigil.hear(now, answer) and self._kill_at is None:
            self._say("our place was given to another: draining")
            self._end(self._order.grace)

    def _end(self, grace: float) -> None:
        """Ask the server to drain; asked again, the earlier end counts."""
        kill_at = time.monotonic() + grace
        if self._kill_at is None:
            self._server.terminate()
        self._kill_at = kill_at if self._kill_at is None else min(self._kill_at, kill_at)

    def _leave(self) -> None:
        is_asked = self._kill_at is not None
        reason = self._server.failure()
        status = self._server.exit_status()
        self._say(reason)
        self._tell(event="ended", reason=reason, status=status, is_asked=is_asked, tail=self._server.tail())
        self._probe.close()
        self._log.close()
        remove(self._directory)

    def _tell(self, **record: Any) -> None:
        if self._actor is not None:
            with contextlib.suppress(OSError):  # the actor has just gone
                self._actor.sendall(json.dumps(record).encode() + b"\n")

    def _say(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} keeper of {self._order.replica}: {text}\n")


def _receive(actor: socket.socket) -> bytes:
    try:
        return actor.recv(_MAX_RECORD_BYTES)
    except OSError:
        return b""


def main(argv: list[str]) -> int:
    if os.fork():  # our starter waits for this one; nobody will ever wait for the other
        os._exit(0)
    # A group, not a session: priorities count within a session only, and Ray ends the groups of its workers.
    os.setpgid(0, 0)
    # Ray runs its workers at nice 15, which is for them and not for a server. Without the right to change it, start the
    # node with RAY_worker_niceness=0.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    directory, descriptor = Path(argv[0]), int(argv[1])
    environ = dict(os.environ)
    for name in environ:
        if name.startswith("RAY_"):  # the token among them
            del os.environ[name]
    Keeper(directory, socket.socket(fileno=descriptor), environ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
