"""Ranks 1 and up as rank 0 sees them: child processes that it starts, tells what to do, watches and ends.

One thread of our own starts them, because Linux ends them with the thread they came from, and hears them from then on.
The first of them that ends, or says that it cannot go on, ends all. Knows nothing of what they compute.
"""

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from common.service.errors import CheckpointError, ConfigError, DvdError, InternalError, StartupError, Unavailable
from language_server.tensor_parallel.channel import Channel, Kind, Message
from language_server.tensor_parallel.order import Order

log = logging.getLogger(__name__)

ERRORS: Final[tuple[type[DvdError], ...]] = (InternalError, ConfigError, CheckpointError)
"""What a worker can say that it failed of; anything else is the first."""
EXIT_ALONE: Final = 3
"""Status of a worker that ended only because another rank was gone."""
_MODULE: Final = "language_server.tensor_parallel"
_START_SECONDS: Final = 120.0
"""For imports, before the first word; busy machines take long."""
_BLAME_SECONDS: Final = 0.3
"""After the first sign, the others' may arrive before the one that was the cause."""
_EXPLAIN_SECONDS: Final = 3.0
_END_SECONDS: Final = 5.0
_TICK_SECONDS: Final = 0.5
_SIGNALS: Final = {number.value: number.name for number in signal.Signals}


class _Worker:
    """One process and what it said."""

    def __init__(self, order: Order) -> None:
        self.rank = order.rank
        ours, theirs = socket.socketpair()
        ours.settimeout(order.timeout)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # Ctrl-C reaches rank 0 only, which ends the others when it has drained.
                process_group=0,
            )
        self.channel = Channel(ours)
        self.channel.send(Message(Kind.START, text=order.to_json()))
        self.heard = time.monotonic()
        self.kv_bytes: int | None = None  # once loaded
        self.error: DvdError | None = None
        self.is_silent = False  # for good

    def listen(self) -> None:
        """Take one message, which is there."""
        try:
            message = self.channel.receive()
        except (InternalError, OSError) as error:
            self.error, self.is_silent = InternalError(f"rank {self.rank} makes no sense ({error})"), True
            return
        self.heard = time.monotonic()
        match message:
            case None:
                self.is_silent = True
            case Message(Kind.LOADED, (kv_bytes,)):
                self.kv_bytes = kv_bytes
            case Message(Kind.FAILED, (index,), text):
                self.error = ERRORS[index](f"rank {self.rank}: {text}")

    def ending(self, seconds: float) -> str | None:
        """How it ended, if it does within that time and not because of others."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        if status == EXIT_ALONE:
            return None
        return f"signal {_SIGNALS.get(-status, -status)}" if status < 0 else f"status {status}"


class Workers:
    """Public methods but ``check`` belong to rank 0's one computing thread, and none of them waits for ever.

    ``on_failure`` is called in our thread, once it is known why.
    """

    def __init__(self, orders: Sequence[Order], on_failure: Callable[[], None] = lambda: None) -> None:
        self._orders = orders
        self._on_failure = on_failure
        self._timeout = orders[0].timeout
        self._workers: list[_Worker] = []
        self._changed = threading.Condition()  # guards what the workers said, and the three fields below
        self._failure: DvdError | None = None
        self._are_serving = False
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="tensor-parallel workers", daemon=True)

    def start(self) -> None:
        """Returns at once; what goes wrong is told by the other methods."""
        self._thread.start()

    def check(self) -> None:
        """Raises what ended the group, if anything has. From any thread."""
        if self._failure is not None:
            raise self._failure

    def wait_until_loaded(self, on_tick: Callable[[], None]) -> list[int]:
        """Bytes that each could give to KV memory, once all have their weights. ``on_tick`` may raise to stop waiting.

        Raises:
            StartupError: one of them failed, or said nothing for too long.
        """
        with self._changed:
            while True:
                self.check()
                loaded = [worker.kv_bytes for worker in self._workers if worker.kv_bytes is not None]
                if len(loaded) == len(self._orders):
                    return loaded
                self._complain_of_silence()
                on_tick()
                self._changed.wait(_TICK_SECONDS)

    def serve(self) -> None:
        """From now on a failure is one of a running server."""
        self._are_serving = True

    def tell(self, message: Message) -> None:
        """To all. Raises as ``explain``."""
        self.check()
        try:
            for worker in self._workers:
                worker.channel.send(message)
        except OSError as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> DvdError:
        """Why we cannot go on, after ``error`` showed that we cannot."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, timeout=_EXPLAIN_SECONDS)
            if self._failure is None:
                self._failure = self._ended(f"ranks gave no answer within {self._timeout:g} s ({error})")
            return self._failure

    def close(self) -> None:
        """End all, by force if need be. Harmless when they have ended."""
        with self._changed:
            self._is_closing = True
        for worker in self._workers:
            worker.channel.end()
        if self._thread.ident is not None:
            self._thread.join(2 * _END_SECONDS)

    def _complain_of_silence(self) -> None:
        for worker in self._workers:
            patience = max(_START_SECONDS, self._timeout)
            if worker.kv_bytes is None and time.monotonic() - worker.heard > patience:
                raise StartupError(f"tensor-parallel rank {worker.rank} said nothing for {patience:g} s while loading")

    # --- in the thread

    def _run(self) -> None:
        try:
            for order in self._orders:
                worker = _Worker(order)
                with self._changed:
                    self._workers.append(worker)
            self._listen()
        except OSError as error:
            self._fail(StartupError(f"tensor-parallel workers cannot be started ({error.strerror})"))
        finally:
            for worker in self._workers:
                self._end(worker)

    def _listen(self) -> None:
        """Until one of them has failed, or we are done with them."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            give_up = None
            while give_up is None or time.monotonic() < give_up:
                for key, _ in selector.select(_TICK_SECONDS if give_up is None else _BLAME_SECONDS / 4):
                    self._hear(key.data)
                    if key.data.is_silent:
                        selector.unregister(key.fileobj)
                if self._is_closing:
                    return
                if give_up is None and any(worker.is_silent or worker.error for worker in self._workers):
                    give_up = time.monotonic() + _BLAME_SECONDS
        self._fail(self._cause())

    def _hear(self, worker: _Worker) -> None:
        with self._changed:
            worker.listen()
            self._changed.notify_all()

    def _cause(self) -> DvdError:
        """Who ended of itself comes before who only missed the others."""
        for worker in self._workers:
            if worker.error is None and worker.is_silent and (ending := worker.ending(_BLAME_SECONDS)):
                return self._ended(f"rank {worker.rank} ended with {ending}")
        error = next((worker.error for worker in self._workers if worker.error is not None), None)
        if isinstance(error, StartupError):
            return error
        return self._ended("ranks lost one another" if error is None else error.message)

    def _ended(self, reason: str) -> DvdError:
        kind = Unavailable if self._are_serving else StartupError
        return kind(f"tensor-parallel {reason}")

    def _fail(self, failure: DvdError) -> None:
        """Whoever waits for one that is gone is ended, too, so that nobody waits."""
        if self._are_serving:
            log.critical("%s: all ranks end", failure)
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()
        self._on_failure()

    def _end(self, worker: _Worker) -> None:
        worker.channel.end()
        if self._are_serving and self._failure is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_END_SECONDS)
        worker.process.kill()
        worker.process.wait()
        worker.channel.close()
