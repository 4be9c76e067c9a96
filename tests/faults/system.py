"""A whole system of real programs, each of which can be killed, stopped, drained or started again by itself.

How to use it (``tests/faults/conftest.py`` has fixtures that do the first two lines)::

    with System(directory) as system, Load(system) as load:     # 2 vision, 2 language, 1 router; steady, checked load
        story = Story(load, "vision-a is killed")
        story.before()
        with story.fault():
            system["vision-a"].kill()
            story.detected(lambda: system.ready("vision") == 1, within=3)
            story.go_on()
            system["vision-a"].start()
            system.until_ready()
        story.recovery()
        story.report.assert_no_harm()                           # no failed, no wrong, no hung request
        load.pause()
        system.assert_baseline()                                # every gauge of held work is back

By hand: ``python -m tests.faults.system --vision 2 --language 2`` starts one, prints where everything is, keeps a load
on it, prints a line a second of what became of the requests, and ends with Ctrl-C; kill what you like meanwhile.

Every system has a loopback address of its own (127.x.y.z), so that ports stay the same when a server starts again and
two systems never meet. With ``proxied=True`` every connection between two servers goes through a ``Proxy`` that can be
told to misbehave (``system.links["vision-a"]``, and ``system.links["language-a features"]`` for features).
"""

import argparse
import contextlib
import http.client
import json
import os
import resource
import secrets
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.process import ProcessSpec, ServerProcess
from deploy.settings import NANO, model_directory
from tests.end_to_end.namespaces import Host
from tests.faults.load import Load
from tests.faults.proxy import Links, Proxy

Tier = Literal["vision", "language", "router"]

DEADLINE: Final = 170.0
"""Seconds for anything that must happen on a machine that others use too; none of it is a measurement."""
_POLL_SECONDS: Final = 0.05
_MODULES: Final[dict[Tier, str]] = {"vision": "vision_server", "language": "language_server", "router": "router"}
_PORTS: Final[dict[Tier, int]] = {"vision": 9000, "language": 9100, "router": 8000}
_FEATURE_PORTS: Final = 9200
_PORTS_PER_SERVER: Final = 8  # each transport takes the next one

# A small machine: one thread a server, and so little KV memory that a leak of a few sequences shows. In float32 the
# company that a sequence has in its batch does not change what is drawn for it.
_OPTIONS: Final[dict[Tier, dict[str, Any]]] = {
    "vision": {"threads": 1, "device": "cpu", "dtype": "float32", "decode_workers": 1, "nice": 5},
    "language": {
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "kv_cache_bytes": 32 << 20,
        "max_num_seqs": 16,
    },
    "router": {"request_timeout": 60.0},
}

HELD: Final = (
    "dvd_requests_running",
    "dvd_requests_waiting",
    "dvd_language_requests_running",
    "dvd_language_requests_waiting",
    "dvd_language_requests_waiting_for_features",
    "dvd_language_kv_cache_usage_ratio",
    "dvd_language_features_held_bytes",
    "dvd_vision_items_running",
    "dvd_vision_items_waiting",
    "dvd_vision_tiles_waiting",
    "dvd_transfer_inflight_bytes",
    "dvd_transfer_reservations",
    "dvd_transfer_pool_bytes{state=reserved}",
    "dvd_transfer_pool_bytes{state=quarantined}",
)
"""Gauges of held work: zero where nothing is asked. A name without labels means all its series."""
_FDS: Final = "process_open_fds"
_FDS_TOLERANCE: Final = 12
"""Connections that are kept for a while after their last use, on either side."""


class Server:
    """One program of the system. ``start`` may be called again after it has ended; it is then a new incarnation."""

    def __init__(self, system: "System", name: str, tier: Tier, options: Mapping[str, Any], address: str) -> None:
        self._system = system
        self.name = name
        self.tier = tier
        self.options = dict(options)
        self.address = address
        self.process: ServerProcess | None = None
        self._may_hang = False
        self.prefix: Sequence[str] = ()

    def __repr__(self) -> str:
        return self.name

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Also while it is stopped."""
        return self.process is not None and self.process.exit_status() is None

    @property
    def is_ready(self) -> bool:
        """It has said so itself; it may have died since."""
        return self.is_running and self.process is not None and self.process.announcement() is not None

    @property
    def metrics_address(self) -> str:
        announcement = self.process.announcement() if self.process is not None else None
        assert announcement is not None, f"{self.name} is not ready"
        return announcement.metrics_address

    @property
    def log(self) -> str:
        """All it has said on stderr, earlier incarnations included."""
        return self._log_file.read_text("utf-8", "replace") if self._log_file.exists() else ""

    def start(self) -> None:
        """Begin; see ``System.until_ready``. Must not be running."""
        assert not self.is_running, f"{self.name} runs"
        root = self._system.directory
        announce, config = root / f"{self.name}.json", root / f"{self.name}.yaml"
        announce.unlink(missing_ok=True)
        config.write_text(yaml.safe_dump(self.options | {"announce": str(announce)}), "utf-8")
        environ = {"DVD_FAILPOINTS": f"file:{self._failpoints_file}", "DVD_TEST_BUILD": "1"}
        spec = ProcessSpec(
            self.name, _MODULES[self.tier], ["--config", str(config)], announce, environ=environ, prefix=self.prefix
        )
        self.process = ServerProcess(spec, self._write_log)
        self._may_hang = False

    def arm(self, failpoints: str = "") -> None:
        """Failpoints from now on, in the spelling of ``DVD_FAILPOINTS``; none: as if there were none. They outlive a
        restart, so whoever starts a server again after ``kill`` had better disarm it first."""
        self._may_hang |= "=hang" in failpoints
        draft = self._failpoints_file.with_suffix(".draft")
        draft.write_text(failpoints)
        draft.replace(self._failpoints_file)

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has closed its connections."""
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.kill()

    def stop(self) -> None:
        """SIGSTOP: its connections live, and nobody answers on them."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it drains."""
        self._signal(signal.SIGTERM)

    def drain(self, seconds: float = DEADLINE) -> int:
        """SIGTERM, and wait until it has ended; its exit status."""
        self.terminate()
        return self.ended(seconds)

    def ended(self, seconds: float = DEADLINE) -> int:
        """Wait until it has ended by itself; its exit status."""
        assert self.process is not None
        assert self.process.wait(seconds), f"{self.name} does not end:\n{self.log[-4000:]}"
        status = self.process.exit_status()
        assert status is not None
        return status

    def metrics(self) -> dict[str, float]:
        """Samples of its ``/metrics`` by name and labels, the model's name left out: ``name{a=b}``."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return {_key(sample.name, sample.labels): sample.value for sample in samples}

    def limit_files(self, number: int) -> int:
        """It may have so many descriptors open from now on; returns how many it might before."""
        before, most = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (number, most))
        return before

    def mend(self) -> None:
        """Running, not stopped, and no thread of it hangs."""
        if self.is_running and self._may_hang:
            self.kill()
        if self.is_running:
            self.go_on()
        else:
            self.start()

    def hits(self, place: str) -> float:
        """How often this incarnation's failpoint of that name has acted."""
        return self.metrics().get(f"dvd_failpoint_hits_total{{name={place}}}", 0.0)

    def _signal(self, number: int) -> None:
        assert self.is_running, f"{self.name} does not run:\n{self.log[-4000:]}"
        os.kill(self.pid, number)

    @property
    def _failpoints_file(self) -> Path:
        return self._system.directory / f"{self.name}.failpoints"

    @property
    def _log_file(self) -> Path:
        return self._system.directory / f"{self.name}.log"

    def _write_log(self, piece: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._log_file.open("a", encoding="utf-8") as log:
            log.write(piece)  # the directory may go while the last words arrive


class System:
    """Vision servers, language servers and routers on this machine; nothing outlives the block.

    Args:
        directory: for options, announcements and logs; None: a temporary one.
        options: by tier or by server name, beyond those of ``_OPTIONS``.
        failpoints: ``DVD_FAILPOINTS`` by server name.
        proxied: put a ``Proxy`` on every connection between servers; features go over ``transports`` of the options,
            or over those that cross hosts.
        hosts: by server name, one each; all on this machine without. Whoever uses the system must be on one of them.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        num_vision: int = 2,
        num_language: int = 2,
        num_routers: int = 1,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        failpoints: Mapping[str, str] | None = None,
        proxied: bool = False,
        hosts: Mapping[str, Host] | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._options = options or {}
        self._hosts = hosts or {}
        self.directory = directory or Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dvd-faults-")))
        self.host = _own_loopback_address()
        self.links: dict[str, Proxy] = {}
        self._links = Links(_own_loopback_address()) if proxied else None
        self.servers: dict[str, Server] = {}
        for tier, number in (("vision", num_vision), ("language", num_language), ("router", num_routers)):
            for index in range(number):
                self._add(tier, index)  # type: ignore[arg-type]
        for name, text in (failpoints or {}).items():
            self[name].arm(text)
        self._baseline: dict[str, float] = {}

    def __enter__(self) -> Self:
        try:
            if self._links is not None:
                self._stack.enter_context(self._links)
                self._make_links(self._links)
            for tier in ("vision", "language"):
                self.set_members(tier, [server.name for server in self.of(tier)])
            self.start(self.servers)
            self.until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            if server.is_running:
                server.kill()
        self._stack.close()

    def __getitem__(self, name: str) -> Server:
        return self.servers[name]

    def of(self, tier: str) -> list[Server]:
        return [server for server in self.servers.values() if server.tier == tier]

    @property
    def routers(self) -> list[str]:
        """``http://host:port`` of each."""
        return [f"http://{server.address}" for server in self.of("router")]

    # --- coming and going

    def start(self, names: Iterable[str]) -> None:
        for name in names:
            self[name].start()

    def until_ready(self, *names: str, seconds: float = DEADLINE) -> None:
        """Wait until these servers (all, where none is named) say they are ready and every running router uses them."""
        wanted = [self[name] for name in names] if names else list(self.servers.values())

        def pending() -> list[str]:
            missing = [server.name for server in wanted if not server.is_ready]
            dead = [server.name for server in wanted if not server.is_running]
            assert not dead, f"{dead[0]} ended:\n{self[dead[0]].log[-4000:]}"
            return missing or [
                f"{router.name} uses {tier}"
                for router in self.of("router")
                for tier in ("vision", "language")
                if router.is_ready and self.ready(tier, router.name) < sum(s.is_ready for s in self.of(tier))
            ]

        self.until(lambda: not pending(), lambda: f"not ready: {pending()}", seconds)

    def ready(self, tier: str, router: str = "router-a") -> int:
        """How many servers of a tier a router may send work to."""
        return self.states(tier, router).get("ready", 0)

    def states(self, tier: str, router: str = "router-a") -> dict[str, int]:
        """How many servers of a tier a router has in which state."""
        prefix = "dvd_servers{state="
        return {
            key.removeprefix(prefix).partition(",")[0]: int(value)
            for key, value in self[router].metrics().items()
            if key.startswith(prefix) and key.endswith(f"tier={tier}}}") and value
        }

    def set_members(self, tier: str, names: Sequence[str]) -> None:
        """Replace the file that tells the routers which servers there are."""
        draft = self.directory / f".{tier}"
        draft.write_text("".join(f"{self.reached_at(name)}  # {name}\n" for name in names))
        draft.replace(self.directory / tier)

    def reached_at(self, name: str) -> str:
        """Where routers dial a server: itself, or its proxy."""
        return self.links[name].address if name in self.links else self[name].address

    def until(
        self, condition: Callable[[], object], what: str | Callable[[], str] = "", seconds: float = DEADLINE
    ) -> float:
        """Wait for it; the seconds it took. A server that does not answer right now is no reason to stop waiting."""
        started = time.monotonic()
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if condition():
                    return time.monotonic() - started
            if time.monotonic() > started + seconds:
                text = what() if callable(what) else what
                logs = "\n".join(f"--- {server.name}\n{server.log[-2000:]}" for server in self.servers.values())
                raise AssertionError(f"not within {seconds:g} s: {text}\n{logs}")
            time.sleep(_POLL_SECONDS)

    def mend(self) -> None:
        """Whatever a test has done to the servers is undone: all run, honestly, and are used."""
        for proxy in self.links.values():
            proxy.heal()
        for server in self.servers.values():
            server.arm()
            server.mend()
        self.until_ready()

    # --- what is held

    def held(self, *tiers: Tier) -> dict[str, float]:
        """Gauges of held work that are not zero, over all servers that run, of some tiers: ``server name{labels}``."""
        return {
            f"{server.name} {key}": value
            for server in self._answering()
            if not tiers or server.tier in tiers
            for key, value in server.metrics().items()
            if value and any(key == name or key.startswith(f"{name}{{") for name in HELD)
        }

    def open_files(self) -> dict[str, float]:
        """Open file descriptors of every server that runs, less its segments of shared memory: those are kept for use
        again, up to a bound."""
        return {
            server.name: server.metrics()[_FDS] - sum("/memfd:" in path for path in _open_paths(server.pid))
            for server in self._answering()
        }

    def baseline(self) -> None:
        """Take down what is open while nothing is asked: what it must come back to. Waits until nothing is held."""
        self.until(lambda: not self.held(), lambda: f"still held: {self.held()}")
        self._baseline = self.open_files()

    def assert_baseline(self, seconds: float = 30.0) -> None:
        """All held work is gone, and no server has more files open than when ``baseline`` was taken."""
        self.until(lambda: not self.held(), lambda: f"still held: {self.held()}", seconds)
        self.until(lambda: not self._leaked_files(), lambda: f"files are still open: {self._leaked_files()}", seconds)

    def _leaked_files(self) -> dict[str, str]:
        most = {
            tier: max([self._baseline.get(server.name, 0.0) for server in self.of(tier)], default=0.0)
            for tier in _MODULES
        }
        return {
            name: f"{most[self[name].tier]:g} before, now {now:g}"
            for name, now in self.open_files().items()
            if self._baseline and now > most[self[name].tier] + _FDS_TOLERANCE
        }

    def _answering(self) -> list[Server]:
        return [server for server in self.servers.values() if server.is_ready]

    # --- making

    def _add(self, tier: Tier, index: int) -> None:
        name = f"{tier}-{'abcdefgh'[index]}"
        host = self._hosts[name].address if name in self._hosts else self.host
        address = f"{host}:{_PORTS[tier] + index + 1}"
        options = {**_OPTIONS[tier], **self._options.get(tier, {}), **self._options.get(name, {})}
        if tier == "router":
            options |= {"host": host, "port": _PORTS[tier] + index + 1}
            options |= {peer: [f"file:{self.directory / peer}"] for peer in ("vision", "language")}
        else:
            options = {"model": str(model_directory(NANO))} | options
            options |= {"name": name, "listen": address, "metrics_listen": f"{host}:0"}
            options["insecure_network"] = name in self._hosts  # which is then those hosts' alone
        if tier == "language":
            port = _FEATURE_PORTS + _PORTS_PER_SERVER * index if self._links is not None else 0
            options |= {"feature_listen": f"{host}:{port}"}
        self.servers[name] = Server(self, name, tier, options, address)
        if name in self._hosts:
            self.servers[name].prefix = self._hosts[name].command()

    def _make_links(self, links: Links) -> None:
        """A proxy before every server, and before every port on which a language server takes features."""
        for server in [*self.of("vision"), *self.of("language")]:
            self.links[server.name] = links.add(server.address)
        for server in self.of("language"):
            transports = server.options.setdefault("transports", ["tcp", "grpc"])
            first = int(server.options["feature_listen"].rpartition(":")[2])
            for place, transport in enumerate(transports):
                proxy = links.add(f"{self.host}:{first + place}")
                self.links[f"{server.name} {transport}"] = proxy
            self.links[f"{server.name} features"] = self.links[f"{server.name} {transports[0]}"]
            server.options["feature_advertise"] = links.host


def _open_paths(pid: int) -> list[str]:
    """What the descriptors of a process stand for."""
    paths = []
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                paths.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return paths


def _own_loopback_address() -> str:
    """All of 127/8 is this machine; few others use more than the first address."""
    first, second, third = (secrets.randbelow(250) + 2 for _ in range(3))
    return f"127.{first}.{second}.{third}"


def _key(name: str, labels: dict[str, str]) -> str:
    rest = ",".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != "model")
    return f"{name}{{{rest}}}" if rest else name


def main(argv: Sequence[str]) -> int:
    """A system to play with."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.system", description="a system under load, by hand")
    parser.add_argument("--vision", type=int, default=2)
    parser.add_argument("--language", type=int, default=2)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--options", type=json.loads, default={}, help='JSON: {"vision": {"max_queued_tiles": 8}}')
    parser.add_argument("--failpoints", type=json.loads, default={}, help='JSON: {"vision-a": "vision.encode=kill"}')
    arguments = parser.parse_args(argv)
    with (
        contextlib.suppress(KeyboardInterrupt),
        System(
            num_vision=arguments.vision,
            num_language=arguments.language,
            num_routers=arguments.routers,
            options=arguments.options,
            failpoints=arguments.failpoints,
        ) as system,
        Load(system) as load,
    ):
        for server in system.servers.values():
            print(f"{server.name}: pid {server.pid} at {server.address}, logs {system.directory}/{server.name}.log")
        while True:
            time.sleep(1)
            print(load.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
