"""``dvd status``: one cluster as a table or as JSON, also when Ray is lost."""

import asyncio
import contextlib
import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.service.announce import Announcement
from common.service.errors import ConfigError, StartupError, Unavailable
from common.service.keys import Keys
from deploy.cluster.head import Head, is_reachable
from deploy.cluster.keeper import ANNOUNCE_FILE
from deploy.cluster.ledger import Member
from deploy.cluster.look import Row, look_at
from deploy.cluster.rundir import cluster_directory, keepers_in
from deploy.cluster.state import ClusterState
from deploy.cluster.tiers import TIERS

_NOT_ASKED: Final = "-"
_PIPE_WIDTH: Final = 200

Snapshot = Mapping[str, Any]
"""``name model controller problem groups servers``: what ``--json`` prints."""


def attach(state: ClusterState) -> Head:
    """To the head on which the cluster was started; `dvd up` has judged how it is guarded.

    Raises:
        StartupError: it does not let us in.
        Unavailable: it does not know the cluster.
    """
    return Head(state.address, state.name, incarnation=state.incarnation, is_insecure=True)


class Observer:
    """Looks at one cluster, as often as wanted."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._keys = Keys.given(None if state.keys is None else Path(state.keys), "client")
        self._head: Head | None = None
        self._runner = asyncio.Runner()  # one loop for all looks: gRPC does not like to see one closed

    def close(self) -> None:
        """Hang up."""
        self._hang_up()
        self._runner.close()

    def look(self) -> Snapshot:
        """What there is now."""
        state = self._state
        status, problem = self._ask_controller()
        if status is not None:
            state.take(status)
        elif state.lost_at is None:
            state.lost_at = time.time()
        state.save()
        members = state.members if status is not None else with_local_members(state)
        ordered = sorted(members, key=lambda m: (TIERS.index(m.tier), m.slot, m.life))
        rows = self._runner.run(look_at(ordered, self._keys))
        return {
            "name": state.name,
            "model": state.model,
            "ray": state.address,
            "controller": {"up": status is not None, "lost_at": state.lost_at, **(status or {}).get("controller", {})},
            "problem": problem,
            "groups": (status or {}).get("groups", {}),
            "waiting": (status or {}).get("waiting", []),
            "servers": [asdict(row) for row in rows],
        }

    def _ask_controller(self) -> tuple[dict[str, Any] | None, str]:
        """Its status and what hinders it; None and why it cannot be asked."""
        state = self._state
        # A connection that Ray has not given up on yet would wait for it.
        if not is_reachable(state.address):
            self._hang_up()
            return None, f"the Ray head at {state.address} does not answer"
        try:
            if self._head is None:
                self._head = attach(state)
            status = self._head.ask("status")
        except (Unavailable, StartupError) as error:
            self._hang_up()
            return None, str(error)
        return status, status["failure"] or status["problem"]

    def _hang_up(self) -> None:
        if self._head is not None:
            self._head.close()
        self._head = None


def with_local_members(state: ClusterState) -> list[Member]:
    """The last known ones, corrected by what this host knows: autoscaling may have gone on since they were noted."""
    members = {member.replica: member for member in state.members}
    for keeper in keepers_in(cluster_directory(state.name, state.incarnation)):
        if keeper.replica not in members:
            server, _, life = keeper.replica.partition(".")
            directory = cluster_directory(state.name, state.incarnation) / keeper.replica
            found = Announcement.read(directory / ANNOUNCE_FILE)
            member = Member(keeper.tier, int(server.rpartition("-")[2]), int(life), "", "this host", "starting")
            if found is not None:
                member.phase, member.address, member.pid = "ready", found.address, found.pid
            members[keeper.replica] = member
    return list(members.values())


def show(state: ClusterState, *, as_json: bool, watch: bool, interval: float) -> int:
    """Print it once, or again and again; exit status 1 when a server does not serve or nobody looks after them."""
    observer = Observer(state)
    try:
        if watch:
            with contextlib.suppress(KeyboardInterrupt):
                _watch(observer, as_json, interval)
            return 0
        snapshot = observer.look()
        _print(snapshot, as_json)
        return 0 if is_well(snapshot) else 1
    finally:
        observer.close()


def is_well(snapshot: Snapshot) -> bool:
    """Every server is ready, and the controller is there."""
    return snapshot["controller"]["up"] and all(server["state"] == "ready" for server in snapshot["servers"])


def _watch(observer: Observer, as_json: bool, interval: float) -> None:
    if as_json:
        while True:
            print(json.dumps(observer.look()), flush=True)
            time.sleep(interval)
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(render(observer.look()), refresh=True)
            time.sleep(interval)


def _print(snapshot: Snapshot, as_json: bool) -> None:
    if as_json:
        print(json.dumps(snapshot, indent=2))
    elif sys.stdout.isatty():
        Console().print(render(snapshot))
    else:
        print(render_text(snapshot), end="")


def render(snapshot: Snapshot) -> RenderableType:
    """For people."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("server", "state", "node", "address", "queue", "running", "rate", "KV"):
        table.add_column(
            title, justify="right" if title in ("queue", "running", "rate", "KV") else "left", no_wrap=True
        )
    for server in snapshot["servers"]:
        table.add_row(*_cells(Row(**server)))
    return Group(Text(_headline(snapshot)), *map(Text, _notes(snapshot)), table)


def render_text(snapshot: Snapshot) -> str:
    """The same for a pipe, which has no width: nothing is cut off."""
    console = Console(width=_PIPE_WIDTH, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(render(snapshot), soft_wrap=True)
    return captured.get()


def _headline(snapshot: Snapshot) -> str:
    counts = []
    for tier in TIERS:
        num_ready = sum(server["tier"] == tier and server["state"] == "ready" for server in snapshot["servers"])
        group = snapshot["groups"].get(tier)
        wanted = "" if group is None else f"/{group['desired']}"
        bounds = f" ({group['min']}-{group['max']})" if group is not None and group["is_scaled"] else ""
        counts.append(f"{tier} {num_ready}{wanted}{bounds}")
    return f"{snapshot['name']}: {snapshot['model']}, {', '.join(counts)}"


def _notes(snapshot: Snapshot) -> list[str]:
    notes = []
    if not snapshot["controller"]["up"]:
        since = time.strftime("%H:%M:%S", time.localtime(snapshot["controller"]["lost_at"]))
        notes.append(f"controller lost (seen at {since}): no scaling, no restarts. {snapshot['problem']}")
    elif snapshot["problem"]:
        notes.append(snapshot["problem"])
    notes += [f"{each['server']} waits to be started again: {each['reason']}" for each in snapshot["waiting"]]
    return notes


def _cells(row: Row) -> list[str]:
    tiles = " tiles" if row.tier == "vision" else ""
    unit = "tiles/s" if row.tier == "vision" else "tok/s"
    return [
        row.server,
        row.state,
        row.node,
        row.address or _NOT_ASKED,
        _NOT_ASKED if row.queue is None else f"{row.queue}{tiles}",
        _NOT_ASKED if row.running is None else f"{row.running}{tiles}",
        _NOT_ASKED if row.rate is None else f"{row.rate:.1f} {unit}",
        _NOT_ASKED if row.kv_usage is None else f"{row.kv_usage:.0%}",
    ]


def load_state(name: str) -> ClusterState:
    """Raises ConfigError when no cluster of this name was started here."""
    state = ClusterState.load(name)
    if state is None:
        raise ConfigError(f"no cluster {name} was started from this machine: dvd up cluster.yaml")
    return state
