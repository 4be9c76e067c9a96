"""A ground in memory: nodes that can be lost, servers that do what a test says, a head that can be silent."""

from dataclasses import dataclass, field

from common.service.errors import Unavailable
from deploy.cluster.ground import Ground
from deploy.cluster.placement import Bundle, Node
from deploy.cluster.replica import Assignment, Report


@dataclass
class FakeServer:
    assignment: Assignment
    node: Node
    report: Report = field(default_factory=Report)
    members: tuple[list[str], list[str]] | None = None
    graces: list[float | None] = field(default_factory=list)


class FakeGround(Ground):
    """``servers`` by replica; ``calls`` in order."""

    def __init__(self, num_nodes: int = 3, cpus: float = 4.0) -> None:
        self.alive = [Node(f"n{i}", f"10.0.0.{i}", {"CPU": cpus}, {"CPU": cpus}) for i in range(1, num_nodes + 1)]
        self.servers: dict[str, FakeServer] = {}
        self.calls: list[tuple[str, ...]] = []
        self.saved = ""
        self.is_head_lost = False
        self._num_ports = 0

    def of(self, tier: str) -> list[str]:
        return [name for name, server in self.servers.items() if server.assignment.tier == tier]

    def become_ready(self, *replicas: str) -> None:
        """All of them without a name."""
        for replica in replicas or list(self.servers):
            server = self.servers[replica]
            if server.report.phase == "starting":
                self._num_ports += 1
                server.report.phase, server.report.directory = "ready", f"/tmp/{replica}"
                server.report.address = f"127.0.0.1:{self._num_ports}"

    def end(self, replica: str, reason: str = "it ended", is_final: bool = False) -> None:
        report = self.servers[replica].report
        report.phase, report.reason, report.is_final = "ended", reason, is_final

    def lose_node(self, node_id: str) -> None:
        self.alive = [node for node in self.alive if node.node_id != node_id]
        for replica in [name for name, server in self.servers.items() if server.node.node_id == node_id]:
            del self.servers[replica]

    async def nodes(self) -> list[Node]:
        if self.is_head_lost:
            raise Unavailable("the Ray head does not answer")
        return self.alive

    async def start(self, assignment: Assignment, node: Node, bundle: Bundle) -> None:
        self.calls.append(("start", assignment.replica, node.node_id))
        self.servers[assignment.replica] = FakeServer(assignment, node)

    async def report(self, replica: str) -> Report | None:
        if replica not in self.servers:
            raise Unavailable("Ray has lost it")
        return self.servers[replica].report

    async def set_members(self, replica: str, vision: list[str], language: list[str]) -> None:
        self.calls.append(("tell", replica, *vision, *language))
        self.servers[replica].members = (vision, language)

    async def stop(self, replica: str, grace: float | None) -> None:
        self.calls.append(("stop", replica))
        self.servers[replica].graces.append(grace)

    async def release(self, replica: str) -> None:
        self.calls.append(("release", replica))
        self.servers.pop(replica, None)

    async def load(self) -> str:
        return self.saved

    async def save(self, text: str) -> None:
        self.saved = text
