"""Several router processes behind one listening socket: started, replaced when they die, ended together.

They are forks of this process, which computes nothing, has no threads and no event loop. The socket is one for all, so
that connections nobody has accepted yet outlive a process that dies, and a Unix socket serves as well as a port. Knows
nothing of HTTP.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import Final, NoReturn

from common.service.errors import StartupError
from common.service.parent import die_with
from common.service.program import EXIT_FAILURE, EXIT_STARTUP

log = logging.getLogger(__name__)

_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
_POLL_SECONDS: Final = 0.1
"""Between two looks at who is ready, until all are."""
REPLACE_SECONDS: Final = (1.0, 30.0)
"""Until a process that died is replaced; twice as long each time that it died young."""
_YOUNG_SECONDS: Final = 60.0
_MAX_LINES_BYTES: Final = 64 * 1024


class Place:
    """What one of the processes knows of its siblings: its index, and its connection to their parent."""

    def __init__(self, index: int, ready_pipe: int, life_line: int) -> None:
        self.index = index
        self._ready_pipe = ready_pipe
        self._life_line = life_line

    def watch(self, stop: asyncio.Event) -> None:
        """Set ``stop`` when the parent wants an end. Signals, held back so far, come from now on.

        Not by a signal: service managers and terminals send theirs to every process of a group, and the second one
        would end a drain.
        """
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            loop.remove_reader(self._life_line)
            stop.set()

        loop.add_reader(self._life_line, on_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def tell_ready(self, line: str) -> None:
        """Tell the parent, which speaks for all. ``line`` is for the operator."""
        os.write(self._ready_pipe, json.dumps([self.index, line]).encode() + b"\n")


@dataclass(slots=True)
class _Process:
    """One of them, or whoever takes its place next. ``pid`` 0: none now."""

    pid: int = 0
    is_ready: bool = False
    started_at: float = 0.0
    due_at: float = 0.0
    delay: float = REPLACE_SECONDS[0]


class Processes:
    """Args:
    count: processes at a time.
    serve: what each of them does; returns its exit status, or raises StartupError.
    on_ready: called once, when all are ready, as ``Place.tell_ready`` was by the last. May raise StartupError.
    drain_seconds: after a signal, until whoever has not ended is killed: it is stuck, its own drain is shorter.
    """

    def __init__(
        self, count: int, serve: Callable[[Place], int], on_ready: Callable[[str], None], drain_seconds: float
    ) -> None:
        self._drain_seconds = drain_seconds
        self._give_up_at = inf
        self._serve = serve
        self._on_ready = on_ready
        self._processes = [_Process() for _ in range(count)]
        self._ready_reader, self._ready_writer = os.pipe()
        self._life_reader, self._life_writer = os.pipe()
        os.set_blocking(self._ready_reader, False)
        self._has_been_ready = False
        self._is_stopping = False
        self._status = 0

    def run(self) -> int:
        """Until SIGTERM or SIGINT, then until all have drained; a second signal ends all at once. Returns the exit
        status: 0, or what one of them ended with."""
        with _held_back():
            try:
                while True:
                    self._start_those_due()
                    self._take(signal.sigtimedwait(_SIGNALS, self._patience()))
                    self._hear()
                    self._give_up_on_stuck_ones()
                    if self._is_stopping and not any(each.pid for each in self._processes):
                        return self._status
            finally:
                self._kill_rest()

    def _take(self, found: signal.struct_siginfo | None) -> None:
        if found is None:
            return
        if found.si_signo == signal.SIGCHLD:
            self._reap()
        elif self._is_stopping:
            log.warning("second signal: ending without a drain")
            self._status = EXIT_FAILURE
            self._kill_rest()
        else:
            self._stop()

    def _stop(self) -> None:
        self._is_stopping = True
        self._give_up_at = time.monotonic() + self._drain_seconds
        os.close(self._life_writer)

    def _give_up_on_stuck_ones(self) -> None:
        if time.monotonic() >= self._give_up_at:
            log.critical("router processes are stuck in their drain: they are killed")
            self._status = EXIT_FAILURE
            self._kill_rest()

    def _patience(self) -> float:
        """Seconds until there is something to do without a signal."""
        if self._is_stopping:
            return max(0.0, self._give_up_at - time.monotonic())
        if not self._has_been_ready:
            return _POLL_SECONDS
        now = time.monotonic()
        return max(0.0, min((each.due_at - now for each in self._processes if not each.pid), default=3600.0))

    def _start_those_due(self) -> None:
        for index, process in enumerate(self._processes):
            if not (self._is_stopping or process.pid) and process.due_at <= time.monotonic():
                process.is_ready, process.started_at = False, time.monotonic()
                process.pid = self._fork(index)

    def _fork(self, index: int) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.close(self._life_writer)
            os.close(self._ready_reader)
            _be_child(parent, lambda: self._serve(Place(index, self._ready_writer, self._life_reader)))
        return pid

    def _hear(self) -> None:
        """Who is ready."""
        with suppress(BlockingIOError):
            for line in os.read(self._ready_reader, _MAX_LINES_BYTES).splitlines():
                index, said = json.loads(line)
                self._processes[index].is_ready = True
                if all(each.is_ready for each in self._processes) and not self._has_been_ready:
                    self._has_been_ready = True
                    self._on_ready(said)

    def _reap(self) -> None:
        for index, process in enumerate(self._processes):
            if process.pid and (ended := os.waitpid(process.pid, os.WNOHANG))[0]:
                self._ended(index, process, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, index: int, process: _Process, status: int) -> None:
        pid, process.pid = process.pid, 0
        if self._is_stopping:
            self._status = self._status or (EXIT_FAILURE if status < 0 else status)
        elif status == EXIT_STARTUP and not self._has_been_ready:  # it has said why, and the others would as well
            self._status = status
            self._stop()
        else:
            is_young = time.monotonic() - process.started_at < _YOUNG_SECONDS
            wait = process.delay if is_young else REPLACE_SECONDS[0]
            process.delay = min(2 * wait, REPLACE_SECONDS[1])
            process.due_at = time.monotonic() + wait
            how = f"signal {-status}" if status < 0 else f"status {status}"
            log.error("router process %d (pid %d) ended with %s: replaced in %.0f s", index, pid, how, wait)

    def _kill_rest(self) -> None:
        for process in self._processes:
            if process.pid:
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
                process.pid = 0


def _be_child(parent: int, serve: Callable[[], int]) -> NoReturn:
    """Never back into the frames of the parent."""
    status = EXIT_FAILURE
    try:
        die_with(parent)
        status = serve()
    except StartupError as error:
        print(f"router cannot start: {error.message}", file=sys.stderr)
        status = EXIT_STARTUP
    except Exception:
        log.critical("the router failed", exc_info=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait until they are asked for, here and in every fork until it takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
