"""``python -m router --vision ADDRESS --language ADDRESS ...``: startup -> serve -> drain."""

import asyncio
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import uvicorn
import uvloop
from PIL import Image
from starlette.types import ASGIApp

from common.service import announce, metrics
from common.service.errors import StartupError
from common.service.listen import UNIX, cannot_listen, check_free, split_host_port
from common.service.program import EXIT_FAILURE, run_loop, start_program, stop_signal
from router.http_protocol import HttpProtocol
from router.https import https_options
from router.processes import Place, Processes
from router.server import RouterServer
from router.settings import RouterSettings

log = logging.getLogger(__name__)

_TITLE: Final = "router"
_CLOSE_GRACE_SECONDS: Final = 2
_STUCK_SECONDS: Final = 10.0
"""A process that ends no sooner than so long after its drain should have is not going to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a router until SIGTERM or SIGINT; returns the exit status."""
    # Pillow only warns of very large images; media.py wants to hear it.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return start_program(_TITLE, RouterSettings, argv, _run_processes)


def _run_processes(settings: RouterSettings) -> int:
    """In this process, or in several that share a listening socket."""
    if settings.workers == 1:
        return run_loop(_TITLE, settings, lambda: run(settings), uvloop.new_event_loop)
    listener = _listen(settings)

    def serve(place: Place) -> int:
        return run_loop(_TITLE, settings, lambda: run(settings, listener, place), uvloop.new_event_loop)

    drain_seconds = settings.shutdown_timeout + _STUCK_SECONDS
    return Processes(settings.workers, serve, lambda line: _announce(settings, listener, line), drain_seconds).run()


async def run(settings: RouterSettings, listener: socket.socket | None = None, place: Place | None = None) -> int:
    """Serve until told to stop, then drain. Raises ConfigError if an address cannot be had.

    Args:
        listener: a socket that listens already.
        place: among several processes; None: this is the only one.
    """
    stop = stop_signal()
    if place is not None:
        place.watch(stop)
        _serve_own_metrics(settings, place)
    router = RouterServer(settings)
    listener = listener or _listen(settings)
    http = HttpServer(http_config(router, router.settings))
    async with router.running():
        serving = asyncio.create_task(http.serve(sockets=[listener]), name="http")
        announcing = asyncio.create_task(_announce_when_ready(router, listener, place), name="announce")
        announcing.add_done_callback(lambda task: stop.set() if _has_failed(task) else None)
        stopping = asyncio.create_task(stop.wait(), name="stop signal")
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await router.drain()
            http.should_exit = True
            await serving
        finally:
            stopping.cancel()
            announcing.cancel()
            results = await asyncio.gather(stopping, announcing, return_exceptions=True)
    return _exit_status(results)


async def _announce_when_ready(router: RouterServer, listener: socket.socket, place: Place | None) -> None:
    """Say where we are once ``/health`` answers 200."""
    await router.fleet.wait_ready()
    name = next(iter(router.models.names), "")
    metrics.set_model(name)
    metrics.set_state("ready")
    num_vision, num_language = (sum(w.is_usable for w in tier) for tier in (router.fleet.vision, router.fleet.language))
    line = f"model {name} vision x{num_vision} language x{num_language}"
    if place is None:
        _announce(router.settings, listener, line)
    else:
        place.tell_ready(line)


def _announce(settings: RouterSettings, listener: socket.socket, line: str) -> None:
    """To whoever started this program, and to whoever looks at it."""
    address = _address_of(settings, listener)
    announce.write(settings.announce, name="router", role="router", address=address, metrics_address=address)
    url = address if ":/" in address else f"http://{address}"
    print(f"ready at {url} {line}", flush=True)


def _serve_own_metrics(settings: RouterSettings, place: Place) -> None:
    """Of one of several processes: the address that they share is answered by any of them. Raises ConfigError."""
    host, port = split_host_port(settings.worker_metrics_listen)
    listen = f"{f'[{host}]' if ':' in host else host}:{port + place.index if port else 0}"
    metrics.set_worker(place.index)
    address = metrics.start_server(listen, "router", "--worker-metrics-listen")
    log.info("router process %d (pid %d): metrics at %s", place.index, os.getpid(), address)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: a signal starts our drain, during which requests still get an answer."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        metrics.STREAM_BUFFER_BYTES.set_function(self._num_unread_bytes)

    def _num_unread_bytes(self) -> int:
        """Of answers on their way to clients, over all connections."""
        connections = tuple(self.server_state.connections)
        return sum(connection.transport.get_write_buffer_size() for connection in connections)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_config(app: ASGIApp, settings: RouterSettings) -> uvicorn.Config:
    """How HTTP is spoken here; ``app`` is a ``RouterServer``, or what one is compared with."""
    return uvicorn.Config(
        app,
        **https_options(settings),
        http=HttpProtocol.within(settings),
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_CLOSE_GRACE_SECONDS,
    )


def _listen(settings: RouterSettings) -> socket.socket:
    """A listening socket, so that its port is known before anything answers on it."""
    try:
        if settings.uds is not None:
            check_free(f"{UNIX}{settings.uds}")
            if settings.uds.is_socket():  # left by a router that was killed
                settings.uds.unlink()
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(settings.uds))
        else:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise cannot_listen(settings.uds or f"{settings.host}:{settings.port}", error) from None
    listener.setblocking(False)
    return listener


def _address_of(settings: RouterSettings, listener: socket.socket) -> str:
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    scheme = "" if settings.ssl_certfile is None else "https://"
    return f"{scheme}{host}:{listener.getsockname()[1]}"


def _has_failed(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is not None


def _exit_status(results: Sequence[object]) -> int:
    """0 after a drain. Raises what stopped the router if it was not a signal."""
    failures = [result for result in results if isinstance(result, Exception)]
    for failure in failures:
        if isinstance(failure, StartupError):
            raise failure
        log.critical("the router failed", exc_info=failure)
    return EXIT_FAILURE if failures else 0


if __name__ == "__main__":
    sys.exit(main())
