"""``GET /v1/models`` and ``/v1/models/{id}``: answered from the router's memory, never by a worker."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from common.service.errors import NotFound
from router.api.exchange import Exchange
from router.fleet import Fleet


class ModelList:
    """Under which names the one model is served."""

    def __init__(self, fleet: Fleet, names: Sequence[str]) -> None:
        self._fleet = fleet
        self._names = names
        self._created = int(time.time())

    @property
    def names(self) -> Sequence[str]:
        """The first one is shown; empty until a language server has spoken, unless names were configured."""
        if self._names:
            return self._names
        return [self._fleet.model.model] if self._fleet.model is not None else []

    @property
    def is_known(self) -> bool:
        return bool(self.names)

    def knows(self, name: str) -> bool:
        return name in self.names

    def name_for(self, asked: str | None) -> str:
        """What an answer calls its model: the name the client used, else the first."""
        return asked if asked is not None else next(iter(self.names), "")

    def describe(self, name: str) -> dict[str, Any]:
        """One entry of the list."""
        info = self._fleet.model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "dvd",
            "root": name if info is None else info.model,
            "max_model_len": None if info is None else info.max_model_len,
        }


class ListModels:
    """``GET /v1/models``."""

    def __init__(self, models: ModelList) -> None:
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entries = [self._models.describe(name) for name in self._models.names]
        await Exchange.of(scope).respond_json({"object": "list", "data": entries})


class GetModel:
    """``GET /v1/models/{id}``; ids may contain slashes."""

    def __init__(self, models: ModelList) -> None:
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["model_id"]
        if not self._models.knows(name):
            raise NotFound(f"no model {name[:64]!r} here", code="model_not_found", param="model")
        await Exchange.of(scope).respond_json(self._models.describe(name))
