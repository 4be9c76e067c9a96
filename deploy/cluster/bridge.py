"""``python -m deploy.cluster.bridge``: what the operator's commands ask of Ray, in a process of its own.

A client of Ray prints what nobody asked for and ends its process when the head is lost; ``dvd`` must do neither. One
JSON record a line: ``{"do": ..., ...}`` in, ``{"value": ...}`` or ``{"error": ...}`` out. See ``deploy.cluster.head``.
"""

import json
import os
import sys
from typing import Any, Final

from deploy.cluster.actor import CONTROLLER, ControllerActor
from deploy.cluster.ground import get_value, group_name, put_value, ray_namespace
from deploy.cluster.probe import ENDED, incarnation_key, ledger_key

_CALL_SECONDS: Final = 20.0


class Bridge:
    """The methods are what can be asked."""

    def __init__(self) -> None:
        self._cluster = ""

    def connect(self, address: str, cluster: str) -> str:
        """The address of the head."""
        import ray

        self._cluster = cluster
        ray.init(address=address, namespace=ray_namespace(cluster), log_to_driver=False, logging_level="CRITICAL")
        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[str]:
        """Addresses of the living nodes."""
        import ray

        return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]

    def incarnation(self) -> str:
        """Of the cluster with our name that is up; empty when none is."""
        held = get_value(incarnation_key(self._cluster))
        return "" if held == ENDED else held

    def start(self, spec: str, incarnation: str) -> None:
        """Start the controller; everything else is its doing."""
        import ray

        put_value(ledger_key(self._cluster), "")
        put_value(incarnation_key(self._cluster), incarnation)
        actor = ray.remote(ControllerActor).options(
            name=CONTROLLER,
            namespace=ray_namespace(self._cluster),
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
        )
        actor.remote(spec, incarnation)

    def ask(self, method: str, arguments: list[Any]) -> Any:
        """Call a method of the controller."""
        import ray

        controller = ray.get_actor(CONTROLLER, namespace=ray_namespace(self._cluster))
        return ray.get(getattr(controller, method).remote(*arguments), timeout=_CALL_SECONDS)

    def end(self) -> None:
        """Remove every trace in Ray. Keepers that still wait for their actors learn that the cluster was taken down."""
        import ray

        put_value(incarnation_key(self._cluster), ENDED)
        put_value(ledger_key(self._cluster), "")
        namespace = ray_namespace(self._cluster)
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == namespace:
                ray.kill(ray.get_actor(actor["name"], namespace=namespace))
        for group in ray.util.placement_group_table().values():
            if group["name"].startswith(group_name(self._cluster, "")) and group["state"] != "REMOVED":
                ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    bridge = Bridge()
    for line in sys.stdin:
        request = json.loads(line)
        method, number = request.pop("do"), request.pop("number")
        try:
            answer = {"value": getattr(bridge, method)(**request)}
        except Exception as error:  # noqa: BLE001 - the seam: every failure becomes an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({"number": number, **answer}) + "\n")


if __name__ == "__main__":
    main()
