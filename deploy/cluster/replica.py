"""The Ray actor of one server: starts its keeper on this node and answers the controller. One actor, one life.

An actor, not the server itself: no request, image or feature ever passes through Ray. When the actor vanishes the
keeper decides what becomes of the server (``deploy.cluster.keeper``). Imported by every node, so light.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml

from common.service.announce import Announcement
from common.service.errors import StartupError
from common.service.parent import die_with
from common.service.program import EXIT_STARTUP
from deploy.cluster.keeper import ANNOUNCE_FILE, LOG_FILE, OPTIONS_FILE, Order
from deploy.cluster.ledger import Member
from deploy.cluster.rundir import cluster_directory, make_private, remove
from deploy.cluster.spec import ClusterSpec
from deploy.cluster.tiers import Tier
from deploy.settings import model_directory

_MODULES: Final[Mapping[Tier, str]] = {"vision": "vision_server", "language": "language_server", "router": "router"}
_RECORD_BYTES: Final = 65536
_EXTRA_GRACE_SECONDS: Final = 10.0
"""Beyond the program's own limit for draining, for closing down."""
_DEFAULT_GRACE_SECONDS: Final = 60.0
_WILDCARDS: Final = ("0.0.0.0", "::")

Phase = Literal["starting", "ready", "ended"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the controller wants of a replica. ``options`` are those of the program that do not depend on the node."""

    cluster: str
    incarnation: str
    tier: Tier
    replica: str
    server: str
    model: str
    gpus: float
    options: Mapping[str, Any]
    host: str | None = None
    port: int = 0

    @classmethod
    def of(cls, spec: ClusterSpec, incarnation: str, member: Member) -> Self:
        """What the cluster file says of a server like this one."""
        is_router = member.tier == "router"
        return cls(
            cluster=spec.name,
            incarnation=incarnation,
            tier=member.tier,
            replica=member.replica,
            server=member.server,
            model=spec.model,
            gpus=spec.group(member.tier).gpus,
            options=spec.options(member.tier),
            host=spec.routers.host if is_router else None,
            port=spec.routers.port if is_router else 0,
        )


@dataclass(slots=True)
class Report:
    """What a replica says of itself. ``is_final``: the server will not start on another try either."""

    phase: Phase = "starting"
    ip: str = ""
    address: str = ""
    metrics_address: str = ""
    pid: int = 0
    directory: str = ""
    reason: str = ""
    is_final: bool = False
    tail: list[str] = field(default_factory=list)


class Replica:
    """Its methods are called through Ray, one at a time, and none of them waits for the server."""

    def __init__(self) -> None:
        self._report = Report()
        self._directory = Path()
        self._keeper: socket.socket | None = None
        self._heard = b""

    def start(self, assignment: Mapping[str, Any]) -> None:
        """Start the server. What prevents it is in the next report."""
        try:
            self._start(Assignment(**assignment))
        except (StartupError, OSError, subprocess.SubprocessError) as error:
            self._report.phase, self._report.reason, self._report.is_final = "ended", str(error), True
            if self._report.directory:
                remove(self._directory)

    def report(self) -> dict[str, Any]:
        """The latest news, a ``Report``."""
        if self._keeper is not None:
            self._listen(self._keeper)
        if self._report.phase == "starting" and self._report.directory:
            self._look_for_announcement()
        return asdict(self._report)

    def set_members(self, vision: Sequence[str], language: Sequence[str]) -> None:
        """For a router: who its servers are, from now on and until told otherwise."""
        if self._report.phase == "ended":
            return
        for tier, addresses in (("vision", vision), ("language", language)):
            write_members(self._directory / tier, addresses)

    def stop(self, grace: float | None = None) -> None:
        """Drain and end the server; a report tells when. ``grace`` in seconds, None: the program's own."""
        if self._keeper is None:
            return
        seconds = self._grace if grace is None else grace
        with contextlib.suppress(OSError):  # the keeper has ended already
            self._keeper.sendall(json.dumps({"grace": seconds}).encode() + b"\n")

    def _start(self, assignment: Assignment) -> None:
        import ray

        die_with(os.getppid())  # the raylet's: Ray leaves some of its workers behind when a raylet dies
        ip = ray.util.get_node_ip_address()
        self._report.ip = ip
        parent = make_private(cluster_directory(assignment.cluster, assignment.incarnation))
        self._directory = make_private(parent / assignment.replica)
        self._report.directory = str(self._directory)
        options = self._options(assignment, ip)
        self._grace = float(options.get("shutdown_timeout", _DEFAULT_GRACE_SECONDS)) + _EXTRA_GRACE_SECONDS
        (self._directory / OPTIONS_FILE).write_text(yaml.safe_dump(options, sort_keys=False), "utf-8")
        order = Order(
            cluster=assignment.cluster,
            incarnation=assignment.incarnation,
            head=ray.get_runtime_context().gcs_address,
            tier=assignment.tier,
            replica=assignment.replica,
            server=assignment.server,
            module=_MODULES[assignment.tier],
            grace=self._grace,
        )
        order.write(self._directory)
        self._keeper = start_keeper(self._directory, has_gpu=assignment.gpus > 0)

    def _options(self, assignment: Assignment, ip: str) -> dict[str, Any]:
        options = {**assignment.options, "announce": str(self._directory / ANNOUNCE_FILE)}
        if assignment.tier == "router":
            for tier in ("vision", "language"):
                write_members(self._directory / tier, [])
                options[tier] = [f"file:{self._directory / tier}"]
            return options | {"host": assignment.host or ip, "port": assignment.port}
        options |= {
            "model": str(model_directory(assignment.model)),
            "name": assignment.server,
            "listen": f"{_in_url(ip)}:0",
        }
        if assignment.tier == "language":
            options["feature_listen"] = f"{_in_url(ip)}:0"
        return options

    def _listen(self, keeper: socket.socket) -> None:
        """Everything the keeper has said since the last time."""
        while True:
            try:
                received = keeper.recv(_RECORD_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            if not received:
                self._lose_keeper()
                return
            *lines, self._heard = (self._heard + received).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, record: Mapping[str, Any]) -> None:
        if record["event"] == "started":
            self._report.pid = record["pid"]
        else:  # the phase follows when the keeper itself is gone
            self._report.reason = record["reason"]
            self._report.is_final = record["status"] == EXIT_STARTUP
            self._report.tail = record["tail"]

    def _lose_keeper(self) -> None:
        assert self._keeper is not None
        self._keeper.close()
        self._keeper = None
        self._report.phase = "ended"
        self._report.reason = self._report.reason or f"its keeper ended: {_last_line(self._directory)}"

    def _look_for_announcement(self) -> None:
        found = Announcement.read(self._directory / ANNOUNCE_FILE)
        if found is None:
            return
        scheme, slashes, authority = found.address.rpartition("://")
        host, _, port = authority.rpartition(":")
        is_wildcard = host.strip("[]") in _WILDCARDS
        self._report.address = f"{scheme}{slashes}{_in_url(self._report.ip)}:{port}" if is_wildcard else found.address
        self._report.metrics_address = found.metrics_address
        self._report.phase = "ready"


def start_keeper(directory: Path, *, has_gpu: bool) -> socket.socket:
    """Start the keeper of the server that ``directory`` describes; returns our end of what we speak over."""
    ours, theirs = socket.socketpair()
    environ = dict(os.environ)
    if not has_gpu:  # Ray leaves them visible to who asked for none
        environ["CUDA_VISIBLE_DEVICES"] = ""
    with theirs, (directory / LOG_FILE).open("ab") as log:
        # It forks and ends at once: the keeper is nobody's child, and Ray ends its workers' children.
        subprocess.run(
            [sys.executable, "-m", "deploy.cluster.keeper", str(directory), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            pass_fds=[theirs.fileno()],
            check=True,
        )
    return ours


def write_members(path: Path, addresses: Iterable[str]) -> None:
    """As a router watches it: an address a line, replaced at once."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text("".join(f"{address}\n" for address in addresses), "utf-8")
    draft.replace(path)


def _last_line(directory: Path) -> str:
    try:
        lines = (directory / LOG_FILE).read_text("utf-8", "replace").split("\n")
    except OSError:
        return "it left nothing"
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _in_url(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
