"""What the controller stands on: nodes with room, places to reserve, actors to start, one text that outlives it.

``Ground`` is the interface; ``RayGround`` does it through Ray, the only module of the controller that speaks to it.
Each server has a placement group of one bundle, tied to the node that ``deploy.cluster.placement`` chose, and one
detached actor in it, both named after the replica, so that a controller that was started anew finds them.
"""

import abc
import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final, TypeVar

from common.service.errors import Unavailable
from deploy.cluster.placement import Bundle, Node
from deploy.cluster.probe import NAMESPACE, ledger_key
from deploy.cluster.replica import Assignment, Replica, Report

_NODE_LABEL: Final = "ray.io/node-id"
_CALL_SECONDS: Final = 10.0
_NEWS_SECONDS: Final = 1.0

_Value = TypeVar("_Value")


def ray_namespace(cluster: str) -> str:
    """Names of our actors and placement groups are our own in it."""
    return f"dvd-{cluster}"


def group_name(cluster: str, replica: str) -> str:
    """Of the replica's placement group; the table of all groups knows no namespaces."""
    return f"dvd-{cluster}:{replica}"


class Ground(abc.ABC):
    """Every method may raise Unavailable: the head does not answer, or the replica is gone."""

    @abc.abstractmethod
    async def nodes(self) -> list[Node]:
        """The living nodes."""

    @abc.abstractmethod
    async def start(self, assignment: Assignment, node: Node, bundle: Bundle) -> None:
        """Reserve the place and start a replica there. Returns before it has started."""

    @abc.abstractmethod
    async def report(self, replica: str) -> Report | None:
        """The latest of a replica; None: no news yet. Raises Unavailable once it is gone for good."""

    @abc.abstractmethod
    async def set_members(self, replica: str, vision: list[str], language: list[str]) -> None:
        """Tell a router who its servers are."""

    @abc.abstractmethod
    async def stop(self, replica: str, grace: float | None) -> None:
        """Ask a replica to drain and end its server; None: in the program's own time."""

    @abc.abstractmethod
    async def release(self, replica: str) -> None:
        """End the actor if there is one, and give its place back."""

    @abc.abstractmethod
    async def load(self) -> str:
        """What ``save`` saved last, also before a restart; empty when nothing was."""

    @abc.abstractmethod
    async def save(self, text: str) -> None:
        """Outlives the controller."""


class RayGround(Ground):
    """Through Ray, from inside an actor. Ray's calls block, so they are made in threads."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._namespace = ray_namespace(cluster)
        self._handles: dict[str, Any] = {}
        self._news: dict[str, asyncio.Future[Any]] = {}  # one open question to each replica

    async def nodes(self) -> list[Node]:
        return await _in_thread(_nodes)

    async def start(self, assignment: Assignment, node: Node, bundle: Bundle) -> None:
        self._handles[assignment.replica] = await _in_thread(lambda: self._start(assignment, node, bundle))

    async def report(self, replica: str) -> Report | None:
        from ray.exceptions import ActorUnavailableError, RayError

        if replica not in self._news:
            handle = await self._handle(replica)
            self._news[replica] = _future_of(handle.report.remote())
        news = self._news[replica]
        await asyncio.wait({news}, timeout=_NEWS_SECONDS)
        if not news.done():
            return None
        del self._news[replica]
        try:
            return Report(**news.result())
        except ActorUnavailableError:  # Ray itself does not know yet
            return None
        except RayError as error:
            raise Unavailable(_one_line(error, "Ray has lost it")) from None

    async def set_members(self, replica: str, vision: list[str], language: list[str]) -> None:
        handle = await self._handle(replica)
        await _answered(_future_of(handle.set_members.remote(vision, language)))

    async def stop(self, replica: str, grace: float | None) -> None:
        handle = await self._handle(replica)
        await _answered(_future_of(handle.stop.remote(grace)))

    async def release(self, replica: str) -> None:
        self._handles.pop(replica, None)
        self._news.pop(replica, None)
        await _in_thread(lambda: release(replica, self._cluster))

    async def load(self) -> str:
        return await _in_thread(lambda: get_value(ledger_key(self._cluster)))

    async def save(self, text: str) -> None:
        await _in_thread(lambda: put_value(ledger_key(self._cluster), text))

    async def _handle(self, replica: str) -> Any:
        import ray

        if replica not in self._handles:
            try:
                self._handles[replica] = await _in_thread(lambda: ray.get_actor(replica, namespace=self._namespace))
            except ValueError:
                raise Unavailable("Ray has lost it") from None
        return self._handles[replica]

    def _start(self, assignment: Assignment, node: Node, bundle: Bundle) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group(
            [dict(bundle)],
            strategy="STRICT_PACK",
            name=group_name(self._cluster, assignment.replica),
            lifetime="detached",
            bundle_label_selector=[{_NODE_LABEL: node.node_id}],
        )
        named = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        actor = ray.remote(Replica).options(
            name=assignment.replica,
            namespace=self._namespace,
            lifetime="detached",
            max_restarts=0,  # one life; the controller decides on the next
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            resources=named,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        handle = actor.remote()
        handle.start.remote(asdict(assignment))
        return handle


def release(replica: str, cluster: str) -> None:
    """End a replica's actor and give its place back, as far as they exist. Blocks."""
    import ray

    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(replica, namespace=ray_namespace(cluster)))
    with contextlib.suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(group_name(cluster, replica)))


def get_value(key: str) -> str:
    """What the head holds for us under a key; empty when nothing. Blocks."""
    from ray.experimental.internal_kv import _internal_kv_get

    held = _internal_kv_get(key.encode(), namespace=NAMESPACE)
    return held.decode() if held else ""


def put_value(key: str, value: str) -> None:
    """Blocks."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key.encode(), value.encode(), namespace=NAMESPACE)


def delete_value(key: str) -> None:
    """Blocks."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key.encode(), namespace=NAMESPACE)


def _nodes() -> list[Node]:
    import ray
    from ray._private.state import available_resources_per_node

    free: Mapping[str, Bundle] = available_resources_per_node()
    return [
        Node(entry["NodeID"], entry["NodeManagerAddress"], entry["Resources"], free.get(entry["NodeID"], {}))
        for entry in ray.nodes()
        if entry["Alive"]
    ]


async def _in_thread(call: Callable[[], _Value]) -> _Value:
    """Seam: what Ray says of itself becomes ours."""
    from ray.exceptions import RayError

    try:
        return await asyncio.wait_for(asyncio.to_thread(call), _CALL_SECONDS)
    except (RayError, TimeoutError) as error:
        raise Unavailable(_one_line(error, "the Ray head does not answer")) from None


def _future_of(reference: Any) -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.wrap_future(reference.future())
    return future


async def _answered(future: asyncio.Future[Any]) -> Any:
    """Seam: an actor that is gone is Unavailable."""
    from ray.exceptions import RayError

    try:
        return await asyncio.wait_for(future, _CALL_SECONDS)
    except (RayError, TimeoutError) as error:
        raise Unavailable(_one_line(error, "its actor does not answer")) from None


def _one_line(error: BaseException, otherwise: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else otherwise
