"""The latest requests, for whoever wants to see where their time goes. Ids, counts and times; never what was said."""

import time
from collections import deque
from typing import Any, Final

import msgspec

from router.api.exchange import Exchange
from router.record import CLIENT_LEFT, RequestRecord
from router.ui.timeline import intervals

MAX_REQUESTS: Final = 100


class Recent:
    """The last hundred requests for text, running or ended. For the event loop only."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=MAX_REQUESTS)
        self._num_ended = 0

    def begin(self, exchange: Exchange) -> None:
        """A request has come."""
        self._entries.append(_Entry(exchange.record, exchange.tenant))

    def end(self, exchange: Exchange) -> None:
        """It has been answered, or its client has left. One that is no longer among the latest is not missed."""
        for entry in reversed(self._entries):
            if entry.record is exchange.record:
                self._num_ended += 1
                entry.end(self._num_ended, exchange)

    @property
    def num_ended(self) -> int:
        """A mark: what ended up to now is not told again to whoever names it."""
        return self._num_ended

    def of(self, tenant: str, since: int = 0) -> list[msgspec.Raw]:
        """What a tenant may see: its own, as JSON, oldest first; of those that ended, the ones after ``since``."""
        mine = [entry for entry in self._entries if entry.tenant == tenant]
        return [entry.told() for entry in mine if entry.number is None or entry.number > since]


class _Entry:
    def __init__(self, record: RequestRecord, tenant: str) -> None:
        self.record = record
        self.tenant = tenant
        self.number: int | None = None  # of those that ended
        self._told = msgspec.Raw()
        self._came_at = time.time() - record.age()

    def end(self, number: int, exchange: Exchange) -> None:
        """From now on nothing changes: it is told in the same bytes every time."""
        self.number = number
        status = exchange.status or 0
        outcome = "left" if status == CLIENT_LEFT else "failed" if exchange.code is not None else "ok"
        self._told = self._tell(outcome, exchange.code, time.monotonic())

    def told(self) -> msgspec.Raw:
        return self._told if self.number is not None else self._tell("running", None, None)

    def _tell(self, state: str, code: str | None, ended_at: float | None) -> msgspec.Raw:
        record = self.record
        usage = record.usage()
        first = min(record.first_token_at.values(), default=None)
        waits = [finished.timings.feature_wait_ms for finished in record.finished.values()]
        summary: dict[str, Any] = {
            "id": record.request_id,
            "came_at": round(self._came_at, 4),
            "state": state,
            "code": code,
            "stage": record.stage,
            "kind": record.kind,
            "images": record.num_images,
            "videos": record.num_videos,
            "tiles": record.num_tiles,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "transport": next((reply.transport for reply in record.encoded), None),
            "feature_bytes": sum(reply.feature_bytes for reply in record.encoded),
            "feature_cache_hits": sum(reply.cache_hit for reply in record.encoded),
            "first_token_ms": None if first is None else round(1e3 * (first - record.received_at), 3),
            "feature_wait_ms": round(max(waits), 3) if waits else None,
            "total_ms": round(1e3 * ((ended_at or time.monotonic()) - record.received_at), 3),
            "stages": intervals(record, ended_at),
        }
        return msgspec.Raw(msgspec.json.encode(summary))
