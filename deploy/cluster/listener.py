"""What the vision and language servers of a cluster say of themselves, heard directly: the controller's ears."""

from collections.abc import Iterable

from common.service.keys import Keys
from protos.status_pb2 import LanguageLoad, VisionLoad, WorkerStatus
from router.fleet import Fleet


class Listener:
    """Follows servers as a router does, and sends them nothing. Belongs to the event loop."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._fleet = Fleet(keys=keys)

    def follow(self, vision: Iterable[str], language: Iterable[str]) -> None:
        """Their addresses, from now on."""
        self._fleet.set_vision(vision)
        self._fleet.set_language(language)

    def hears(self, address: str) -> bool:
        """Whether the server there speaks."""
        return address in self._statuses()

    @property
    def vision_loads(self) -> list[VisionLoad]:
        """Of those that speak."""
        return [status.vision for status in self._statuses().values() if status.HasField("vision")]

    @property
    def language_loads(self) -> list[LanguageLoad]:
        """Likewise."""
        return [status.language for status in self._statuses().values() if status.HasField("language")]

    async def close(self) -> None:
        """Hang up."""
        await self._fleet.close()

    def _statuses(self) -> dict[str, WorkerStatus]:
        workers = [worker for worker in self._fleet.workers if not worker.is_leaving]
        return {worker.address: worker.status for worker in workers if worker.status is not None}
