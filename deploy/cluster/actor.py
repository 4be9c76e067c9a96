"""The controller as a Ray actor: detached, without a place of its own, started anew by Ray wherever it dies."""

import asyncio
import logging
import os
from typing import Any, Final

from common.service import log as logs
from common.service import metrics
from common.service.errors import InvalidRequest
from common.service.keys import Keys
from common.service.parent import die_with
from deploy.cluster.controller import Controller
from deploy.cluster.ground import RayGround
from deploy.cluster.listener import Listener
from deploy.cluster.spec import ClusterSpec
from deploy.cluster.tiers import Tier

log = logging.getLogger(__name__)

CONTROLLER: Final = "controller"
"""Name of the actor in the namespace of its cluster."""


class ControllerActor:
    """Its methods are called by the operator's commands.

    Args:
        spec: ``ClusterSpec.to_json``.
        incarnation: of this cluster.
    """

    async def __init__(self, spec: str, incarnation: str) -> None:  # type: ignore[misc]  # Ray awaits it
        import ray

        die_with(os.getppid())  # the raylet's: Ray leaves some of its workers behind when a raylet dies
        logs.configure(CONTROLLER)
        loaded = ClusterSpec.from_json(spec)
        metrics.set_model(loaded.model_names[0])
        self._where = {
            "ip": ray.util.get_node_ip_address(),
            "metrics_address": metrics.start_server("127.0.0.1:0", "cluster"),
        }
        keys = Keys.given(loaded.keys_directory, "client")
        self._controller = Controller(loaded, incarnation, RayGround(loaded.name), Listener(keys))
        self._living = asyncio.create_task(self._live(), name="controller")

    async def status(self) -> dict[str, Any]:
        """``Controller.status``, and where the controller is."""
        return {**self._controller.status(), "controller": self._where}

    async def scale(self, sizes: dict[Tier, int]) -> str:
        """Empty, or one line saying why not."""
        try:
            self._controller.scale(sizes)
        except InvalidRequest as error:
            return error.message
        return ""

    async def stop(self, is_forced: bool) -> None:
        """Begin to let every server go."""
        self._controller.stop(is_forced=is_forced)

    async def _live(self) -> None:
        try:
            await self._controller.open()
            await self._controller.run()
        except Exception:
            log.critical("the controller failed; Ray starts it anew", exc_info=True)
            os._exit(1)
