"""What every program of ours does between its command line and its exit status: startup -> serve -> drain.

Knows nothing of models or requests. Exit status: 0 after a drain, 1 when the server failed, 2 when it could not start.
"""

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from tqdm import tqdm

from common.service import failpoints, tracing
from common.service import log as logs
from common.service.errors import Cancelled, StartupError
from common.service.heap import freeze_heap, keep_freed_memory
from common.service.loop_lag import measured_lag
from common.service.rpc import Guard
from common.service.settings import Field, Settings

log = logging.getLogger(__name__)

EXIT_FAILURE: Final = 1
EXIT_STARTUP: Final = 2

DRAIN_NOTICE_SECONDS: Final = 0.25
"""An idle server that drains still listens for so long: calls that were on their way when it said so are refused with a
word that sends them elsewhere, not by a connection that breaks like that of a server that crashed."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class ServerSettings(Settings):
    """Options that every server has."""

    announce: Path | None = Field(None, description="file to write name and addresses to, once ready")
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+$",
        description="send spans of requests to this collector, such as http://127.0.0.1:4317 (OTLP over gRPC)",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe records to print")


KEYS_DESCRIPTION: Final = (
    "directory with the certificates by which servers and routers know one another; dvd keys init makes it"
)


class WorkerSettings(ServerSettings):
    """Options that every server has that routers talk to."""

    keys: Path | None = Field(None, description=KEYS_DESCRIPTION)
    insecure_network: bool = Field(
        False,
        description="without --keys: listen also where other machines come in, and obey whoever does; for networks that"
        " something else guards",
    )

    @property
    def guard(self) -> Guard:
        """What keeps strangers out where there are no keys."""
        return "network" if self.insecure_network else "keys"


_Options = TypeVar("_Options", bound=ServerSettings)


class Worker(Protocol):
    """A server with a model in it."""

    @property
    def ready_line(self) -> str:
        """What the operator reads once it is ready."""

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the thread that computes is; before ``close`` that is a failure."""

    async def start(self) -> None:
        """Listen, answering that the server is not ready."""

    async def load(self, progress: Progress) -> None:
        """Read the weights and open the doors. Raises Cancelled after ``abort_load``."""

    def abort_load(self) -> None:
        """Make ``load`` fail soon."""

    async def drain(self) -> None:
        """Refuse new requests and wait for the admitted ones, for a bounded time."""

    async def close(self) -> bool:
        """Let go of everything. False if the computing thread does not end."""


def run_program(
    title: str,
    options: type[_Options],
    argv: Sequence[str] | None,
    run: Callable[[_Options], Coroutine[Any, Any, int]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Read the options, run, and return the exit status. What stops a start is one line on stderr."""
    return start_program(
        title, options, argv, lambda settings: run_loop(title, settings, lambda: run(settings), loop_factory)
    )


def run_loop(
    title: str,
    settings: ServerSettings,
    run: Callable[[], Coroutine[Any, Any, int]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run to the end on an event loop of its own. Raises ConfigError: traces are asked for and cannot be sent."""
    exporting = tracing.exported(settings.otlp_traces_endpoint, title)
    with exporting, asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_measured(run()))


def start_program(
    title: str, options: type[_Options], argv: Sequence[str] | None, run: Callable[[_Options], int]
) -> int:
    """``run_program`` for what has no event loop of its own."""
    with suppress(OSError):  # stderr is no file
        faulthandler.enable()  # native code that crashes leaves word of where
    keep_freed_memory()
    try:
        failpoints.check_build()
        settings = options.load(sys.argv[1:] if argv is None else argv)
        logs.configure(title, settings.log_level)
        freeze_heap()
        return run(settings)
    except StartupError as error:
        print(f"{title} cannot start: {error.message}", file=sys.stderr)
        return EXIT_STARTUP


async def _measured(program: Coroutine[Any, Any, int]) -> int:
    async with measured_lag():
        return await program


async def run_worker(title: str, make: Callable[[], Worker]) -> int:
    """A worker's life. ``make`` reads headers only and raises StartupError on what cannot work."""
    stop = asyncio.create_task(stop_signal().wait(), name="stop signal")
    worker = make()
    try:
        await worker.start()
        if not await _load(title, worker, stop):
            return 0
        freeze_heap()
        print(worker.ready_line, file=sys.stderr, flush=True)
        return await _serve(title, worker, stop)
    finally:
        stop.cancel()
        if not await worker.close():
            log.critical("the computing thread is stuck: ending without it")
            os._exit(EXIT_FAILURE)  # an ordinary exit would wait for the thread


def stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT. The second one ends the process on the spot."""
    stopping = asyncio.Event()
    num_signals = 0  # others may set the event as well

    def on_signal() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            log.warning("second signal: ending without a drain")
            os._exit(EXIT_FAILURE)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopping


async def _load(title: str, worker: Worker, stop: asyncio.Task[bool]) -> bool:
    """Load and warm up; False when the process was told to stop meanwhile."""
    with _progress_bar(f"{title} weights") as progress:
        loading = asyncio.create_task(worker.load(progress), name="load")
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            worker.abort_load()
        try:
            await loading
        except Cancelled:
            return False
    return True


async def _serve(title: str, worker: Worker, stop: asyncio.Task[bool]) -> int:
    """Until the signal, then until drained; a computing thread that dies ends either at once."""
    signal_or_end: set[asyncio.Future[Any]] = {stop, worker.ended}
    await asyncio.wait(signal_or_end, return_when=asyncio.FIRST_COMPLETED)
    if not worker.ended.done():
        draining = asyncio.create_task(worker.drain(), name="drain")
        either: set[asyncio.Future[None]] = {draining, worker.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
    if worker.ended.done():
        log.critical("the computing thread of the %s has died: this process ends", title, exc_info=_why(worker.ended))
        return EXIT_FAILURE
    return 0


def _why(ended: asyncio.Future[None]) -> BaseException | None:
    return None if ended.cancelled() else ended.exception()


@contextmanager
def _progress_bar(title: str) -> Iterator[Progress]:
    """On a terminal only."""
    is_hidden = not sys.stderr.isatty()
    with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=is_hidden) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
