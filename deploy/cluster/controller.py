"""Makes a cluster what it shall be and keeps it so: hear, bury, scale, place, dismiss, tell the routers, see off.

One loop, one step at a time, all of it between two records: the ledger (what was made) and the ground (what is there).
Requests never pass here; when the controller or the Ray head is lost the servers go on as they are.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from common.service import metrics
from common.service.errors import Unavailable
from deploy.cluster.failures import Failures
from deploy.cluster.ground import Ground
from deploy.cluster.ledger import Ledger, Member, addresses
from deploy.cluster.listener import Listener
from deploy.cluster.membership import Members, Membership
from deploy.cluster.placement import Node, Placed, Room
from deploy.cluster.replica import Assignment, Report
from deploy.cluster.scaling import Scaling, export
from deploy.cluster.spec import ClusterSpec
from deploy.cluster.tiers import TIERS, Tier

log = logging.getLogger(__name__)

_FIRST_REPORT_SECONDS: Final = 120.0
"""For Ray to start the process of an actor, on a busy machine."""
_SILENT_SECONDS: Final = 15.0
"""A ready server that says nothing for this long is replaced; the routers gave up on it after three seconds."""
_SILENT_GRACE_SECONDS: Final = 5.0
_FORCED_GRACE_SECONDS: Final = 1.0
_STABLE_SECONDS: Final = 60.0
"""A server that was ready for this long and fails has failed for the first time."""
_MAX_FAILURES_BEFORE_SERVING: Final = 3
_PROBLEM_SECONDS: Final = 5.0
"""For Ray to know of room that was just given back."""


class Controller:
    """One cluster. Belongs to its event loop.

    Args:
        spec: what it shall be.
        incarnation: of this cluster.
        ground: to stand on.
        listener: hears the servers.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        incarnation: str,
        ground: Ground,
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._incarnation = incarnation
        self._ground = ground
        self._listener = listener
        self._clock = clock
        self._ledger = Ledger({tier: spec.group(tier).replicas for tier in TIERS})
        self._saved = ""
        self._scaling = Scaling(spec, listener, clock())
        self._failures = Failures()
        self._placed_at: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._silenced: set[str] = set()  # they leave because they say nothing
        self._membership = Membership()
        self._stopping: set[str] = set()  # asked to drain
        self._is_forced = False
        self._ready_at: dict[str, float] = {}
        self._problem = ""  # why a server cannot be placed
        self._problem_at = 0.0
        self.failure = ""
        """Why the cluster will never serve; empty while it may."""

    # --- the loop

    async def open(self) -> None:
        """Take over what an earlier life of this controller has made."""
        text = await self._ground.load()
        if text:
            self._saved = text
            self._ledger = Ledger.from_json(text)
            now = self._clock()
            self._placed_at = dict.fromkeys(self._ledger.members, now)
            log.info("taking over %d servers", len(self._ledger.members))

    async def run(self) -> None:
        """Until everything was asked to end and has."""
        metrics.CLUSTER_CONTROLLER_UP.set(1)
        while not (self._ledger.is_stopping and not self._ledger.members):
            try:
                await self.step()
            except Unavailable as error:
                log.warning("nothing is changed for now: %s", error)
            await asyncio.sleep(self._spec.autoscale.interval)
        await self.close()

    async def close(self) -> None:
        """Listen to nobody any more; the servers go on."""
        await self._listener.close()

    async def step(self) -> None:
        """Go one step towards what shall be. Raises Unavailable, having changed nothing, when the head is silent."""
        # First of all, and asked of the head: when that is lost, actors vanish although their servers live.
        nodes = await self._ground.nodes()
        await self._hear({node.node_id for node in nodes})
        self._follow()
        if not self._ledger.is_stopping:
            if self._ledger.has_served:
                self._scaling.follow_load(self._ledger, self._clock())
            await self._place(nodes)
        self._dismiss()
        await self._tell_routers()
        await self._see_off()
        await self._save()
        export(self._ledger)

    async def _hear(self, alive: set[str]) -> None:
        members = list(self._ledger.members.values())
        await asyncio.gather(*(self._hear_one(member, member.node_id in alive) for member in members))

    async def _hear_one(self, member: Member, is_node_alive: bool) -> None:
        try:
            report = await self._ground.report(member.replica) if is_node_alive else None
        except Unavailable as error:
            await self._bury(member, f"{error}")
            return
        if not is_node_alive:
            await self._bury(member, "its node was lost")
        elif report is not None:
            await self._take(member, report)
        elif member.phase == "placed" and self._clock() - self._placed_at[member.replica] > _FIRST_REPORT_SECONDS:
            await self._bury(member, f"Ray did not start it within {_FIRST_REPORT_SECONDS:g} s")

    async def _take(self, member: Member, report: Report) -> None:
        member.pid, member.directory = report.pid, report.directory
        if report.phase == "ended":
            for line in report.tail if member.phase != "leaving" else ():
                log.info("%s said: %s", member.replica, line)
            await self._bury(member, report.reason, is_final=report.is_final)
            return
        member.address, member.metrics_address = report.address, report.metrics_address
        if member.phase in ("placed", "starting"):
            member.phase = report.phase
            self._ready_at[member.replica] = self._clock()
        if member.phase == "ready":
            self._check_voice(member)

    def _check_voice(self, member: Member) -> None:
        """A server that hangs has an actor that says it is fine. The stop is asked for here, the rest is as always."""
        if member.tier == "router" or self._listener.hears(member.address):
            self._silent_since.pop(member.replica, None)
            return
        since = self._silent_since.setdefault(member.replica, self._clock())
        # One at a time: should it be us who hears nothing, the others go on.
        is_alone = not any(other.phase == "leaving" for other in self._ledger.of(member.tier))
        if self._clock() - since > _SILENT_SECONDS and is_alone:
            log.warning("%s has been silent for %g s: replacing it", member.replica, _SILENT_SECONDS)
            member.phase = "leaving"
            self._silenced.add(member.replica)

    async def _bury(self, member: Member, reason: str, *, is_final: bool = False) -> None:
        """It has ended: its place is free. An end that nobody asked for is a failure of its slot."""
        await self._ground.release(member.replica)
        if member.phase == "leaving":
            log.info("%s has left: %s", member.replica, reason)
        else:
            log.warning("%s on %s is lost: %s", member.replica, member.ip, reason)
            self._count_failure(member, reason, is_final)
        self._forget(member)

    def _forget(self, member: Member) -> None:
        del self._ledger.members[member.replica]
        self._stopping.discard(member.replica)
        self._silenced.discard(member.replica)
        self._membership.forget(member.replica)
        for times in (self._placed_at, self._ready_at, self._silent_since):
            times.pop(member.replica, None)

    def _count_failure(self, member: Member, reason: str, is_final: bool) -> None:
        now = self._clock()
        was_stable = member.phase == "ready" and now - self._ready_at.get(member.replica, now) >= _STABLE_SECONDS
        count = self._failures.note((member.tier, member.slot), reason, now, is_first=was_stable)
        if not self._ledger.has_served and (is_final or count >= _MAX_FAILURES_BEFORE_SERVING):
            self.failure = self.failure or f"on {member.ip}: {reason}"

    def _follow(self) -> None:
        """Listen to the servers themselves."""
        self._listener.follow(*self._addresses())
        self._ledger.has_served = self._ledger.has_served or self._ledger.is_complete

    # --- how many, and where

    def scale(self, sizes: Mapping[Tier, int]) -> None:
        """The operator's word. Raises InvalidRequest naming what is allowed; then nothing is changed."""
        self._scaling.order(self._ledger, sizes, self._clock())

    async def _place(self, nodes: list[Node]) -> None:
        room = Room(nodes, self._places())
        problem = ""
        for tier in TIERS:
            for slot in self._ledger.missing_slots(tier):
                if not self._failures.may_retry((tier, slot), self._clock()):
                    continue
                try:
                    node = room.take(tier, self._spec.group(tier).bundle, one_per_node=self._spec.is_one_per_node(tier))
                except Unavailable as error:
                    problem = f"{tier}-{slot} has no place: {error}"
                    break
                await self._start(tier, slot, node)
        self._note_problem(problem)

    def _note_problem(self, problem: str) -> None:
        if not problem or not self._problem:
            self._problem_at = self._clock()
        self._problem = problem
        if problem and not self._ledger.has_served and self._clock() - self._problem_at >= _PROBLEM_SECONDS:
            self.failure = self.failure or problem

    def _places(self) -> list[Placed]:
        bundles = {tier: self._spec.group(tier).bundle for tier in TIERS}
        return [Placed(m.tier, m.node_id, bundles[m.tier]) for m in self._ledger.members.values()]

    async def _start(self, tier: Tier, slot: int, node: Node) -> None:
        member = self._ledger.add(tier, slot, node.node_id, node.ip)
        self._placed_at[member.replica] = self._clock()
        await self._save()  # before it exists, so that nothing exists that nobody knows of
        log.info("%s goes to %s", member.replica, node.ip)
        assignment = Assignment.of(self._spec, self._incarnation, member)
        await self._ground.start(assignment, node, self._spec.group(tier).bundle)

    # --- leaving

    def stop(self, *, is_forced: bool = False) -> None:
        """Let everything go: routers first, then language, then vision servers; forced, all at once and soon."""
        self._ledger.is_stopping = True
        self._is_forced = self._is_forced or is_forced

    def _dismiss(self) -> None:
        if self._ledger.is_stopping:
            # A tier leaves when the one that sends it work is gone.
            tiers = [tier for tier in reversed(TIERS) if self._ledger.of(tier)]
            leaving = [member for tier in tiers[: None if self._is_forced else 1] for member in self._ledger.of(tier)]
        else:
            leaving = [member for tier in TIERS for member in self._ledger.surplus(tier)]
        for member in leaving:
            if member.phase != "leaving":
                log.info("%s is leaving", member.replica)
                member.phase = "leaving"

    async def _tell_routers(self) -> None:
        members = self._addresses()
        for router in self._running_routers():
            if self._membership.knows(router.replica, members):
                continue
            with contextlib.suppress(Unavailable):  # its report will say why; told again in the next step
                await self._ground.set_members(router.replica, *members)
                self._membership.note(router.replica, members, self._clock())

    async def _see_off(self) -> None:
        """Drain those who leave, once no router can send them anything new."""
        for member in [each for each in self._ledger.members.values() if each.phase == "leaving"]:
            if not member.directory:  # nothing was ever started
                await self._bury(member, "it had not begun")
            elif member.replica not in self._stopping and self._is_forgotten(member):
                with contextlib.suppress(Unavailable):
                    await self._ground.stop(member.replica, self._grace(member))
                    self._stopping.add(member.replica)

    def _grace(self, member: Member) -> float | None:
        """Seconds to end in; None: the program's own."""
        if self._is_forced:
            return _FORCED_GRACE_SECONDS
        return _SILENT_GRACE_SECONDS if member.replica in self._silenced else None

    def _is_forgotten(self, member: Member) -> bool:
        if member.tier == "router" or self._is_forced:
            return True
        routers = [router.replica for router in self._running_routers()]
        return self._membership.is_read(routers, self._addresses(), self._clock())

    def _running_routers(self) -> list[Member]:
        return [router for router in self._ledger.of("router") if router.phase in ("starting", "ready")]

    def _addresses(self) -> Members:
        """Vision and language servers that routers may use."""
        return addresses(self._ledger.ready("vision")), addresses(self._ledger.ready("language"))

    # --- telling

    async def _save(self) -> None:
        text = self._ledger.to_json()
        if text != self._saved:
            await self._ground.save(text)
            self._saved = text

    def status(self) -> dict[str, Any]:
        """What ``dvd status`` shows of us; the servers are asked by whoever wants to know."""
        return {
            "groups": self._scaling.overview(self._ledger),
            "members": [{**asdict(m), "server": m.server, "replica": m.replica} for m in self._ledger.members.values()],
            "waiting": [
                {"server": f"{tier}-{slot}", "reason": failure.reason, "retries": failure.count}
                for (tier, slot), failure in self._failures
                if slot in self._ledger.missing_slots(tier)
            ],
            "problem": self._problem,
            "failure": self.failure,
            "has_served": self._ledger.has_served,
            "is_complete": self._ledger.is_complete,
            "is_stopping": self._ledger.is_stopping,
        }
