"""``dvd up``, ``scale`` and ``down``: what the operator asks for, from the first line read to the last trace gone."""

import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.service.errors import ConfigError, StartupError, Unavailable
from common.service.keys import Keys
from common.service.listen import is_loopback
from deploy.cluster.head import Head, is_reachable
from deploy.cluster.ledger import Member
from deploy.cluster.local_head import LocalHead
from deploy.cluster.rundir import cluster_directory, end_all, is_private
from deploy.cluster.settings import DownSettings, ScaleSettings, StatusSettings, UpSettings
from deploy.cluster.spec import LOCAL, ClusterSpec
from deploy.cluster.state import ClusterState, resolve_name
from deploy.cluster.status import attach, load_state, show
from deploy.cluster.tiers import TIERS, Tier

_INCARNATION_BYTES: Final = 8
_POLL_SECONDS: Final = 0.25
_CONTROLLER_SECONDS: Final = 120.0
_DRAIN_SECONDS: Final = 300.0
_FORCED_SECONDS: Final = 30.0
_FORCED_GRACE_SECONDS: Final = 1.0
_LOCAL_GRACE_SECONDS: Final = 70.0
_GROUP_NAMES: Final[dict[str, Tier]] = {"vision": "vision", "language": "language", "routers": "router"}


def up(settings: UpSettings, words: Sequence[str]) -> int:
    """Start what the file describes, wait until it serves, say where."""
    if len(words) != 1:
        raise ConfigError("dvd up takes one file: dvd up cluster.yaml")
    spec = ClusterSpec.load(Path(words[0]))
    Keys.given(spec.keys_directory, "client")  # this machine needs them as well, for `dvd status`
    if ClusterState.load(spec.name) is not None:
        raise ConfigError(
            f"cluster {spec.name} is up already: dvd down {spec.name} first, or give this one another name"
        )
    local = LocalHead.start() if spec.ray.address == LOCAL else None
    address = spec.ray.address if local is None else local.address
    try:
        with Head(address, spec.name, is_insecure=settings.insecure) as head:
            status = _bring_up(spec, head, local, settings.insecure)
    except BaseException:
        if local is not None:
            local.stop()
        raise
    for line in _ready_lines(spec, status, local):
        print(line, flush=True)
    return 0


def scale(settings: ScaleSettings, words: Sequence[str]) -> int:
    """Have more or fewer servers; the controller does it from here on."""
    del settings
    sizes = dict(_parse_size(word) for word in words if "=" in word)
    state = load_state(resolve_name([word for word in words if "=" not in word]))
    if not sizes:
        raise ConfigError(f"which group? dvd scale {state.name} vision=3")
    if not is_reachable(state.address):
        raise Unavailable(
            f"cannot scale: the Ray head at {state.address} does not answer; the servers go on as they are"
        )
    with attach(state) as head:
        refusal = head.ask("scale", sizes)
        if refusal:
            raise ConfigError(refusal)
        state.take(head.ask("status"))
    state.save()
    return 0


def down(settings: DownSettings, words: Sequence[str]) -> int:
    """End everything, with Ray's help or without it. Harmless when there is nothing."""
    name = resolve_name(list(words))
    state = ClusterState.load(name)
    if state is None:
        return _end_without_state(name, settings.force)
    is_led = _end_through_ray(state, settings.force)
    ended = end_all(_directory(state), _grace(settings.force))
    if state.local_head is not None:
        state.local_head.stop()
    state.remove()
    remaining = [] if is_led else _remaining(state.members, ended)
    for host in remaining:
        print(f"dvd down: the Ray head is lost: also run `dvd down {name}` on {host}", file=sys.stderr)
    return 1 if remaining else 0


def status(settings: StatusSettings, words: Sequence[str]) -> int:
    """See ``deploy.cluster.status``."""
    state = load_state(resolve_name(list(words)))
    return show(state, as_json=settings.format == "json", watch=settings.watch, interval=settings.interval)


# --- up


def _bring_up(spec: ClusterSpec, head: Head, local: LocalHead | None, is_insecure: bool) -> dict[str, Any]:
    """Returns the controller's status once everything serves; else nothing is left running."""
    _check_network(spec, head.call("nodes"))
    if head.call("incarnation"):
        raise ConfigError(
            f"a cluster {spec.name} is up on this Ray cluster: end it where it was started, or take another name"
        )
    state = ClusterState(
        name=spec.name,
        incarnation=secrets.token_hex(_INCARNATION_BYTES),
        address=head.address,
        model=spec.model_names[0],
        started_at=time.time(),
        is_insecure=is_insecure,
        keys=spec.keys,
        local_head=local,
    )
    state.save()  # before anything is started: should we be killed, `dvd down` knows
    try:
        head.call("start", spec=spec.to_json(), incarnation=state.incarnation)
        found = _wait_until_complete(spec, head)
    except BaseException:
        _take_down(head, state, is_forced=True)
        end_all(_directory(state), _FORCED_GRACE_SECONDS)
        state.remove()
        raise
    state.take(found)
    state.save()
    return found


def _check_network(spec: ClusterSpec, nodes: Sequence[str]) -> None:
    """Servers of different nodes speak in the clear without keys, and obey whoever reaches them."""
    exposed = [ip for ip in nodes if not is_loopback(ip)]
    if exposed and spec.keys is None and not spec.insecure_network:
        raise ConfigError(
            f"servers on {', '.join(exposed[:3])} will listen there without encryption or keys: make some with dvd keys"
            " init, put them on every node and say keys: DIR; or keep that network to them alone and say"
            " insecure_network: true"
        )


def _wait_until_complete(spec: ClusterSpec, head: Head) -> dict[str, Any]:
    console = Console(stderr=True)
    now = heard_at = time.monotonic()
    deadline = now + spec.startup_timeout
    pending = "the controller"
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while (now := time.monotonic()) < deadline:
            time.sleep(_POLL_SECONDS)
            try:
                found = cast(dict[str, Any], head.ask("status"))
            except Unavailable as error:  # Ray is still starting it
                if now - heard_at > _CONTROLLER_SECONDS or "ActorDiedError" in str(error):
                    raise StartupError(f"the controller does not answer: {error}") from None
                continue
            heard_at = now
            if found["failure"]:
                raise StartupError(found["failure"])
            if found["is_complete"]:
                return found
            pending = _pending(found)
            if console.is_terminal:
                live.update(_progress(found), refresh=True)
    raise StartupError(f"not ready after {spec.startup_timeout:g} s: {pending}; see startup_timeout")


def _pending(found: dict[str, Any]) -> str:
    parts = []
    for tier in TIERS:
        num_ready = sum(member["tier"] == tier and member["phase"] == "ready" for member in found["members"])
        parts.append(f"{tier} {num_ready}/{found['groups'][tier]['desired']}")
    return ", ".join(parts)


def _progress(found: dict[str, Any]) -> Table:
    """For a terminal, while it waits."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("server", "node", "state"):
        table.add_column(title)
    for member in found["members"]:
        table.add_row(member["server"], member["ip"], member["phase"])
    for waiting in found["waiting"]:
        table.add_row(waiting["server"], "", f"failed, is tried again: {waiting['reason']}")
    return table


def _ready_lines(spec: ClusterSpec, found: dict[str, Any], local: LocalHead | None) -> list[str]:
    num_vision, num_language = (found["groups"][tier]["desired"] for tier in ("vision", "language"))
    lines = [
        f"ready at {_as_url(member['address'])} model {spec.model_names[0]}"
        f" vision x{num_vision} language x{num_language}"
        for member in found["members"]
        if member["tier"] == "router"
    ]
    if local is not None:
        lines.append(f"other machines join with: RAY_AUTH_MODE=token ray start --address={local.address}")
    return lines


def _as_url(address: str) -> str:
    return address if "://" in address else f"http://{address}"


# --- scale


def _parse_size(word: str) -> tuple[Tier, int]:
    group, _, number = word.partition("=")
    if group not in _GROUP_NAMES:
        raise ConfigError(f"{word[:64]}: expected one of {', '.join(_GROUP_NAMES)}, such as vision=3")
    if not number.isdecimal() or not number.isascii() or len(number) > 4:
        raise ConfigError(f"{word[:64]}: expected a number of servers, such as {group}=3")
    return _GROUP_NAMES[group], int(number)


# --- down


def _end_through_ray(state: ClusterState, is_forced: bool) -> bool:
    """False: the head is lost, or another. Raises StartupError when it is there and does not let us in."""
    if not is_reachable(state.address):
        return False
    try:
        with attach(state) as head:
            _take_down(head, state, is_forced=is_forced)
    except Unavailable:
        return False
    except StartupError:
        if not is_forced:  # its controller would start again what we end here
            raise
        return False
    return True


def _take_down(head: Head, state: ClusterState, *, is_forced: bool) -> None:
    """Through Ray: drain in order, then remove every trace there. Never fails: what is left is ended without Ray."""
    try:
        _drain(head, is_forced=is_forced)
        head.call("end")
    except (Unavailable, KeyError) as error:
        print(f"dvd down: going on without Ray: {error}", file=sys.stderr)
    # Keepers whose actors were gone before ask the head, and learn that the cluster was taken down.


def _drain(head: Head, *, is_forced: bool) -> None:
    deadline = time.monotonic() + (_FORCED_SECONDS if is_forced else _DRAIN_SECONDS)
    try:
        head.ask("stop", is_forced)
    except Unavailable:
        return  # there is no controller
    while time.monotonic() < deadline:
        if not head.ask("status")["members"]:
            return
        time.sleep(_POLL_SECONDS)


def _end_without_state(name: str, is_forced: bool) -> int:
    """On a host that is not the one where the cluster was started: what lies here."""
    pattern = cluster_directory(name, "[0-9a-f]" * 2 * _INCARNATION_BYTES)
    for directory in pattern.parent.glob(pattern.name):
        if is_private(directory):  # others could have us end what they name
            end_all(directory, _grace(is_forced))
    return 0


def _remaining(members: Sequence[Member], ended: Sequence[str]) -> list[str]:
    return sorted({member.ip for member in members if member.replica not in ended})


def _directory(state: ClusterState) -> Path:
    return cluster_directory(state.name, state.incarnation)


def _grace(is_forced: bool) -> float:
    return _FORCED_GRACE_SECONDS if is_forced else _LOCAL_GRACE_SECONDS
