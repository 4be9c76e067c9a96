"""One machine, one command: vision servers, language servers and a router as child processes of one parent.

With ``--colocated`` one process takes the place of both tiers; the router does not know the difference. All meet in a
private directory that holds their Unix sockets, options and announcements. This module starts them, waits until
requests can be served, notices when one ends, and stops them in the order in which work flows.
"""

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any, Self

import httpx
import yaml

from common.service.errors import StartupError, Unavailable
from deploy.process import Echo, ProcessSpec, ServerProcess
from deploy.settings import ServeSettings, model_directory, options_of

_POLL_SECONDS = 0.05
_HEALTH_SECONDS = 5.0
# After the router has drained nothing is left to do for the others.
_WORKER_GRACE_SECONDS = 10.0
_ROUTER_EXTRA_SECONDS = 5.0
_BACKGROUND_NICE = 19
_NVIDIA_DEVICE = Path("/dev/nvidiactl")

Tier = list[ServerProcess]


class LocalDeployment:
    """Vision servers, language servers and a router on this machine.

    ``start`` returns once ``/health`` answers 200; used as a context manager, nothing outlives the block. Start it from
    a thread that lives as long as it does.

    Args:
        settings: as ``dvd serve`` has them.
        echo: takes the stderr of all servers; None discards it (an error still quotes the last line).

    Raises:
        ConfigError: the model is not a directory with a checkpoint.
    """

    def __init__(self, settings: ServeSettings, echo: Echo | None = None) -> None:
        self._settings = settings
        self._model = model_directory(settings.model)
        self._echo = echo or _discard
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._vision: Tier = []
        self._language: Tier = []
        self._colocated: Tier = []  # instead of the two above
        self._router: Tier = []
        self._stop_requested = threading.Event()
        self._force_requested = threading.Event()
        self.address = ""
        """``http://host:port`` of the router, once started."""

    def __enter__(self) -> Self:
        return self if self.address else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def processes(self) -> tuple[ServerProcess, ...]:
        """All servers, in the order of a request's features: vision, language, router."""
        return (*self._workers, *self._router)

    @property
    def _workers(self) -> tuple[ServerProcess, ...]:
        return (*self._vision, *self._language, *self._colocated)

    @property
    def metrics_addresses(self) -> dict[str, str]:
        """``host:port`` of each worker's ``/metrics``, by server name; the router serves its own at ``address``."""
        announcements = {process.name: process.announcement() for process in self._workers}
        return {name: found.metrics_address for name, found in announcements.items() if found is not None}

    def start(self) -> Self:
        """Start everything and wait until it serves.

        Raises:
            StartupError: a server ended or the deadline passed; nothing is left running.
        """
        try:
            self._launch()
            self._wait_until_ready(time.monotonic() + self._settings.startup_timeout)
        except BaseException:
            self._force_requested.set()
            self.stop()
            raise
        return self

    def watch(self) -> None:
        """Return when ``request_stop`` was called.

        Raises:
            Unavailable: a server ended by itself.
        """
        while not self._stop_requested.wait(_POLL_SECONDS):
            ended = self._first_ended()
            if ended is not None:
                raise Unavailable(ended.failure())

    def request_stop(self) -> None:
        """From a signal handler: the first call ends ``watch``, the second cuts the draining short."""
        if self._stop_requested.is_set():
            self._force_requested.set()
        self._stop_requested.set()

    def stop(self) -> None:
        """Drain the router, then the language servers, then the vision servers; kill what does not end in time."""
        self._stop_tier(self._router, self._settings.shutdown_timeout + _ROUTER_EXTRA_SECONDS)
        self._stop_tier(self._language, _WORKER_GRACE_SECONDS)
        self._stop_tier(self._vision, _WORKER_GRACE_SECONDS)
        self._stop_tier(self._colocated, _WORKER_GRACE_SECONDS)
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _launch(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dvd-")  # mode 0700: its sockets are ours alone
        root, settings = Path(self._directory.name), self._settings
        if settings.colocated:
            visions, languages = ["vision"], ["language"]
            self._launch_colocated(root)
        else:
            visions = _names("vision", settings.vision_servers)
            languages = _names("language", settings.language_servers)
            self._launch_vision(root, visions)
            self._launch_language(root, languages)
        placed = {
            "vision": [_socket(root, name) for name in visions],
            "language": [_socket(root, name) for name in languages],
            "served_model_name": settings.model_names,
            "playground": settings.has_playground,
        }
        self._router.append(self._start_server(root, "router", "router", options_of("router", settings) | placed))

    def _launch_vision(self, root: Path, names: Sequence[str]) -> None:
        """Servers take the devices of their tier in turn."""
        settings = self._settings
        for name, device in zip(names, cycle(settings.vision_devices or [settings.device])):
            options = self._worker_options(root, name, "vision", device)
            options["nice"] = _vision_nice(settings, device)
            self._vision.append(self._start_server(root, name, "vision_server", options, settings.vision_cores))

    def _launch_language(self, root: Path, names: Sequence[str]) -> None:
        settings = self._settings
        for name, device in zip(names, cycle(settings.language_devices or [settings.device])):
            options = self._worker_options(root, name, "language", device)
            options["feature_listen"] = f"unix-dir:{_private_directory(root / name)}"
            self._language.append(self._start_server(root, name, "language_server", options, settings.language_cores))

    def _launch_colocated(self, root: Path) -> None:
        """One process for both tiers; what it is told in all, and what each side is told."""
        settings = self._settings
        tiers = {tier: self._worker_options(root, tier, tier, settings.device) for tier in ("vision", "language")}
        options = options_of("colocated", settings) | tiers
        self._colocated.append(self._start_server(root, "colocated", "deploy.colocated", options))

    def _worker_options(self, root: Path, name: str, program: str, device: str) -> dict[str, Any]:
        return options_of(program, self._settings) | {
            "model": str(self._model),
            "served_model_name": self._settings.model_names[0],
            "name": name,
            "listen": _socket(root, name),
            "device": device,
        }

    def _start_server(
        self, root: Path, name: str, module: str, options: Mapping[str, Any], cores: Sequence[int] = ()
    ) -> ServerProcess:
        """Options travel in a file of the private directory: keys stay out of the process list."""
        announce = root / f"{name}.json"
        options_file = root / f"{name}.yaml"
        options_file.write_text(yaml.safe_dump({**options, "announce": str(announce)}, sort_keys=False), "utf-8")
        spec = ProcessSpec(name, module, ["--config", str(options_file)], announce, cores)
        return ServerProcess(spec, self._echo)

    def _wait_until_ready(self, deadline: float) -> None:
        self._wait(deadline, lambda: ", ".join(each.name for each in self.processes if each.announcement() is None))
        announcement = self._router[0].announcement()
        assert announcement is not None  # waited for above
        self.address = _as_url(announcement.address)
        if self.address.startswith("https:"):  # it says so once it is healthy; its certificate is for other eyes
            return
        with httpx.Client(base_url=self.address, timeout=_HEALTH_SECONDS, trust_env=False) as client:
            self._wait(deadline, lambda: "" if _is_healthy(client) else "the router's /health")

    def _wait(self, deadline: float, pending: Callable[[], str]) -> None:
        """Until ``pending`` names nothing any more."""
        while missing := pending():
            ended = self._first_ended()
            if ended is not None:
                raise StartupError(ended.failure())
            if time.monotonic() > deadline:
                limit = self._settings.startup_timeout
                raise StartupError(f"not ready after {limit:g} s: {missing}; see --startup-timeout")
            if self._stop_requested.wait(_POLL_SECONDS):
                raise StartupError("stopped while starting")

    def _first_ended(self) -> ServerProcess | None:
        return next((each for each in self.processes if each.exit_status() is not None), None)

    def _stop_tier(self, tier: Tier, grace: float) -> None:
        for process in tier:
            process.terminate()
        deadline = time.monotonic() + grace
        while any(process.exit_status() is None for process in tier) and time.monotonic() < deadline:
            if self._force_requested.wait(_POLL_SECONDS):
                break
        for process in tier:
            process.kill()
        tier.clear()


def serve(settings: ServeSettings) -> int:
    """``dvd serve``: run until a signal comes or a server ends; returns the exit status."""
    deployment = LocalDeployment(settings, echo=to_stderr)
    with _on_signals(deployment.request_stop):
        try:
            deployment.start()
            print(_ready_line(deployment, settings), flush=True)
            deployment.watch()
        except (StartupError, Unavailable) as error:
            print(f"dvd serve: {error}", file=sys.stderr)
            return 1
        finally:
            deployment.stop()
    return 0


@contextmanager
def _on_signals(action: Callable[[], None]) -> Iterator[None]:
    def handle(_number: int, _frame: FrameType | None) -> None:
        action()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready_line(deployment: LocalDeployment, settings: ServeSettings) -> str:
    tiers = f"vision x{settings.vision_servers} language x{settings.language_servers}"
    servers = "colocated x1" if settings.colocated else tiers
    return f"ready at {deployment.address} model {settings.model_names[0]} {servers}"


def _vision_nice(settings: ServeSettings, device: str) -> int:
    """On a CPU both sides may use every core and decode comes first; a GPU must not wait for its own process."""
    if settings.vision_nice is not None:
        return settings.vision_nice
    has_gpu = _NVIDIA_DEVICE.exists() if device == "auto" else device != "cpu"
    return 0 if has_gpu else _BACKGROUND_NICE


def _socket(root: Path, name: str) -> str:
    return f"unix:{root / name}.sock"


def _private_directory(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def _names(tier: str, count: int) -> list[str]:
    return [tier] if count == 1 else [f"{tier}-{index}" for index in range(count)]


def _as_url(address: str) -> str:
    return address if "://" in address else f"http://{address}"


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def to_stderr(piece: str) -> None:
    """An ``echo`` for a terminal."""
    sys.stderr.write(piece)
    sys.stderr.flush()


def _discard(piece: str) -> None:
    del piece
