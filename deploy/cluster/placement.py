"""Which node gets the next server. Pure: knows nodes as names with room, not what runs on them or how it gets there."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from common.service.errors import Unavailable
from deploy.cluster.tiers import Tier

Bundle = Mapping[str, float]
"""Resource -> amount, as Ray counts: CPU, GPU, and what the operator named."""

_TOLERANCE: Final = 1e-6
_KEYS: Final = {"CPU": "cpus", "GPU": "gpus"}


@dataclass(frozen=True, slots=True)
class Node:
    """A living node. ``free`` may be a moment old."""

    node_id: str
    ip: str
    total: Bundle
    free: Bundle


@dataclass(frozen=True, slots=True)
class Placed:
    """A server that has its place."""

    tier: Tier
    node_id: str
    bundle: Bundle


class Room:
    """What is left on the nodes while several servers are placed one after the other.

    Args:
        nodes: the living ones.
        placed: our servers. What they take is subtracted from the nodes' totals too, since ``free`` lags behind.
    """

    def __init__(self, nodes: Iterable[Node], placed: Iterable[Placed] = ()) -> None:
        self._nodes = {node.node_id: node for node in nodes}
        self._free = {node_id: dict(node.free) for node_id, node in self._nodes.items()}
        self._counts: dict[str, Counter[Tier]] = {node_id: Counter() for node_id in self._nodes}
        rest = {node_id: dict(node.total) for node_id, node in self._nodes.items()}
        for server in placed:
            if server.node_id in self._nodes:
                self._counts[server.node_id][server.tier] += 1
                _subtract(rest[server.node_id], server.bundle)
        for node_id, free in self._free.items():
            for name in free:
                free[name] = min(free[name], rest[node_id].get(name, free[name]))

    def take(self, tier: Tier, bundle: Bundle, *, one_per_node: bool = False) -> Node:
        """Give the server its place: the node with the fewest of its tier, of those the one with the most room.

        All of ``bundle`` comes from one node, so a group of ranks is packed and the servers of a tier are spread.

        Raises:
            Unavailable: one line saying what is missing.
        """
        if one_per_node and all(self._counts[node_id][tier] for node_id in self._nodes):
            raise Unavailable(f"every node has a {tier} already, and their port is fixed: add a node, or say port: 0")
        candidates = [
            node
            for node_id, node in self._nodes.items()
            if _covers(self._free[node_id], bundle) and not (one_per_node and self._counts[node_id][tier])
        ]
        if not candidates:
            raise Unavailable(self._explain(tier, bundle))
        chosen = min(candidates, key=lambda node: self._rank(node, tier, bundle))
        self._counts[chosen.node_id][tier] += 1
        _subtract(self._free[chosen.node_id], bundle)
        return chosen

    def _rank(self, node: Node, tier: Tier, bundle: Bundle) -> tuple[int, float, str]:
        free = self._free[node.node_id]
        num_more = min(free[name] / amount for name, amount in bundle.items())
        return self._counts[node.node_id][tier], -num_more, node.node_id

    def _explain(self, tier: Tier, bundle: Bundle) -> str:
        """The first resource that no node has enough of, by itself or together with the others."""
        key = "routers" if tier == "router" else tier
        for name, amount in bundle.items():
            most = max((node.total.get(name, 0.0) for node in self._nodes.values()), default=0.0)
            if most + _TOLERANCE < amount:
                what = _KEYS.get(name, f"resources.{name}")
                return f"no node has {name} {amount:g} (the largest has {most:g}): lower {key}.{what}, or add a node"
        wanted = " ".join(f"{name} {amount:g}" for name, amount in bundle.items())
        return f"no node has {wanted} free: lower {key}.replicas or what one takes, or add a node"


def _covers(free: Bundle, bundle: Bundle) -> bool:
    return all(free.get(name, 0.0) + _TOLERANCE >= amount for name, amount in bundle.items())


def _subtract(free: dict[str, float], bundle: Bundle) -> None:
    for name, amount in bundle.items():
        free[name] = free.get(name, 0.0) - amount
