"""``python -m vision_server --model DIRECTORY ...``: startup -> serve -> drain."""

import asyncio
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from common.service import log as logs
from common.service.errors import Cancelled, StartupError
from vision_server.server import Progress, VisionServer
from vision_server.settings import VisionSettings

log = logging.getLogger(__name__)

_EXIT_FAILURE = 1
_EXIT_STARTUP = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a vision server until SIGTERM or SIGINT; returns the exit status."""
    try:
        settings = VisionSettings.load(sys.argv[1:] if argv is None else argv)
        logs.configure("vision", settings.log_level)
        _configure_process(settings)
        return asyncio.run(run(settings))
    except StartupError as error:
        print(f"vision server cannot start: {error.message}", file=sys.stderr)
        return _EXIT_STARTUP


async def run(settings: VisionSettings) -> int:
    """0 after a drain, 1 when the device thread died."""
    stop = asyncio.create_task(_stop_signal().wait(), name="stop signal")
    server = VisionServer(settings)
    await server.start()
    try:
        if not await _load(server, stop):
            return 0
        print(_ready_line(server), file=sys.stderr, flush=True)
        ended = server.compute.ended
        either: list[asyncio.Future[Any]] = [stop, ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            log.critical("the device thread has died: this process ends", exc_info=ended.exception())
            return _EXIT_FAILURE
        await server.drain()
        return 0
    finally:
        stop.cancel()
        if not await server.close():
            log.critical("the device thread is stuck: ending without it")
            os._exit(_EXIT_FAILURE)  # an ordinary exit would wait for the thread


async def _load(server: VisionServer, stop: asyncio.Task[bool]) -> bool:
    """Load and warm up; False when the process was told to stop meanwhile."""
    with _progress_bar() as progress:
        loading = asyncio.create_task(server.load(progress), name="load")
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            server.abort_load()
        try:
            await loading
        except Cancelled:
            return False
    return True


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """On a terminal only."""
    with tqdm(
        desc="vision weights", unit="B", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _ready_line(server: VisionServer) -> str:
    encoder = server.encoder
    return (
        f"vision server ready at {server.address} model {server.settings.model_name}"
        f" device {encoder.device} dtype {str(encoder.dtype).removeprefix('torch.')}"
        f" weights {encoder.weight_bytes / 1e6:.1f} MB"
    )


def _configure_process(settings: VisionSettings) -> None:
    """Before any other thread exists: threads inherit the priority of the one that starts them."""
    os.nice(settings.nice)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # Pillow warns of strangers' images in words of its own; media.py judges them by number.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT. The second one ends the process on the spot."""
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            log.warning("second signal: ending without a drain")
            os._exit(_EXIT_FAILURE)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopping


if __name__ == "__main__":
    sys.exit(main())
