"""What the controller must remember when it is started anew: how many servers shall be, and which ones were made.

Kept by the Ray head as one JSON text. Pure; knows nothing of how servers are started or heard.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

from deploy.cluster.tiers import TIERS, Tier

Phase = Literal["placed", "starting", "ready", "leaving"]
"""A server is placed (Ray has it), starting (its process runs), ready, leaving (no router names it: it drains)."""


@dataclass(slots=True)
class Member:
    """One life of one server. ``slot`` gives the name that metrics carry; ``life`` makes the replica's name unique."""

    tier: Tier
    slot: int
    life: int
    node_id: str
    ip: str
    phase: Phase = "placed"
    address: str = ""
    metrics_address: str = ""
    pid: int = 0
    directory: str = ""

    @property
    def server(self) -> str:
        return f"{self.tier}-{self.slot}"

    @property
    def replica(self) -> str:
        return f"{self.server}.{self.life}"

    @property
    def is_wanted(self) -> bool:
        return self.phase in ("placed", "starting", "ready")


@dataclass(slots=True)
class Ledger:
    """``has_served``: every server was ready at least once, so that what fails now is not a mistake in the file."""

    desired: dict[Tier, int]
    members: dict[str, Member] = field(default_factory=dict)
    num_lives: int = 0
    has_served: bool = False
    is_stopping: bool = False

    @classmethod
    def from_json(cls, text: str) -> Self:
        content = json.loads(text)
        members = [Member(**member) for member in content.pop("members")]
        return cls(members={member.replica: member for member in members}, **content)

    def to_json(self) -> str:
        content = {name: getattr(self, name) for name in ("desired", "num_lives", "has_served", "is_stopping")}
        return json.dumps({**content, "members": [asdict(member) for member in self.members.values()]})

    def of(self, tier: Tier) -> list[Member]:
        return [member for member in self.members.values() if member.tier == tier]

    def wanted(self, tier: Tier) -> list[Member]:
        return [member for member in self.of(tier) if member.is_wanted]

    def ready(self, tier: Tier) -> list[Member]:
        return [member for member in self.of(tier) if member.phase == "ready"]

    def add(self, tier: Tier, slot: int, node_id: str, ip: str) -> Member:
        """The next life in a slot."""
        self.num_lives += 1
        member = Member(tier, slot, self.num_lives, node_id, ip)
        self.members[member.replica] = member
        return member

    def missing_slots(self, tier: Tier) -> list[int]:
        """Where servers have to be started: the lowest free slots. One that drains still has its name."""
        taken = {member.slot for member in self.of(tier)}
        num_missing = self.desired[tier] - len(self.wanted(tier))
        free = [slot for slot in range(len(taken) + max(num_missing, 0)) if slot not in taken]
        return free[: max(num_missing, 0)]

    def surplus(self, tier: Tier) -> list[Member]:
        """Who should leave: those that do not serve yet, then those on the fullest node, then the highest slot."""
        wanted = self.wanted(tier)
        chosen: list[Member] = []
        while len(wanted) > self.desired[tier]:
            counts = {member.node_id: 0 for member in wanted}
            for member in wanted:
                counts[member.node_id] += 1
            leaving = max(wanted, key=lambda m: (m.phase != "ready", counts[m.node_id], m.slot))
            wanted.remove(leaving)
            chosen.append(leaving)
        return chosen

    @property
    def is_complete(self) -> bool:
        """As many servers as desired are ready, and nobody is on the way in or out."""
        return all(len(self.ready(tier)) == self.desired[tier] == len(self.of(tier)) for tier in TIERS)


def addresses(members: Iterable[Member]) -> list[str]:
    return sorted(member.address for member in members)
