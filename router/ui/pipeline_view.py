"""``GET /pipeline``: servers, what waits for them, and the latest requests with their stages, as one JSON object."""

import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
from starlette.types import Receive, Scope, Send

from router.admission import Admission
from router.api.exchange import Exchange
from router.fleet import Fleet
from router.ui.recent import Recent
from router.workers import Worker

_CURSOR: Final = re.compile(r"([0-9a-f]{8})\.([0-9]{1,15})")


class PipelineView:
    """Whoever names the ``cursor`` of an earlier answer as ``?since=`` is not told again of requests that had ended.

    Each router process tells of its own requests, and knows only its own cursors.
    """

    def __init__(self, fleet: Fleet, admission: Admission, recent: Recent, state: Callable[[], str]) -> None:
        self._fleet = fleet
        self._admission = admission
        self._recent = recent
        self._state = state
        self._process = secrets.token_hex(4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        since = self._place_of(scope.get("query_string", b""))
        await exchange.respond(
            200,
            msgspec.json.encode(self._snapshot(exchange.tenant, since)),
            {"content-type": "application/json", "cache-control": "no-store"},
        )

    def _snapshot(self, tenant: str, since: int) -> dict[str, Any]:
        return {
            "now": round(time.time(), 4),
            "state": self._state(),
            "cursor": f"{self._process}.{self._recent.num_ended}",
            "queue": {
                "running": self._admission.num_running,
                "waiting": self._admission.num_waiting,
                "waiting_for_a_turn": self._fleet.turns.num_waiting,
                "held_bytes": self._admission.held_bytes,
            },
            "servers": [_server(worker) for worker in self._fleet.workers],
            "requests": self._recent.of(tenant, since),
        }

    def _place_of(self, query: bytes) -> int:
        """0 for anything that is no cursor of ours: everything is told then."""
        asked = parse_qs(query.decode("latin-1")).get("since", [""])[0]
        match = _CURSOR.fullmatch(asked)
        return int(match[2]) if match is not None and match[1] == self._process else 0


def _server(worker: Worker) -> dict[str, Any]:
    """Of a server that was lost no more is known than its name."""
    facts: dict[str, Any] = {"tier": worker.tier, "name": worker.name, "state": worker.state_name}
    if worker.status is None:
        return facts
    if worker.tier == "vision":
        vision = worker.status.vision
        return facts | {
            "queued_tiles": vision.queued_tiles,
            "running_tiles": vision.running_tiles,
            "max_queued_tiles": vision.max_queued_tiles,
            "tiles_per_second": round(vision.tiles_per_second, 1),
        }
    language = worker.status.language
    return facts | {
        "running": language.num_running,
        "waiting": language.num_waiting,
        "max_waiting": language.max_num_waiting,
        "kv_blocks_used": language.total_kv_blocks - language.free_kv_blocks,
        "kv_blocks": language.total_kv_blocks,
        "free_feature_bytes": language.free_feature_bytes,
        "tokens_per_second": round(language.tokens_per_second, 1),
    }
