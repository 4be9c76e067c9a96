"""Where the time of one request went: its stages as intervals on the router's clock.

Pure. What servers report in milliseconds of their own clocks is placed by what the router saw itself: the reply to an
``Encode`` is small, so the call ended there when it ended here; a prompt has been read when its first token comes.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Literal

from msgspec import Struct

from protos.vision_pb2 import TileGroup
from router.record import EncodeCall, RequestRecord

Stage = Literal[
    "receive",  # router: the body comes
    "fetch",  # ... its media
    "queue",  # ... until a language server has taken it
    "score",  # vision: ViR
    "unpack",  # ... bytes -> tiles
    "vision_queue",  # ... which wait for a batch
    "encode",  # ... tiles -> features
    "transfer",
    "language_queue",  # language: until its first step
    "prefill",
    "decode",
]
MAX_GROUPS: Final = 48
"""Of one request. Beyond that the groups of each call are shown as one, and calls beyond it not at all."""
_SHORTEST: Final = 1e-5
"""Seconds. What is shorter did not take place: features that were in the cache, say."""


class Interval(Struct, omit_defaults=True, rename={"start": "start_ms", "end": "end_ms"}):
    """A stage, in milliseconds since the request came in; ``end`` is None while it lasts."""

    stage: Stage
    start: float
    end: float | None
    server: str = ""
    image: int | None = None  # position among the request's images
    first_tile: int | None = None
    num_tiles: int | None = None
    failed: bool = False


def intervals(record: RequestRecord, ended_at: float | None) -> list[Interval]:
    """The stages so far. ``ended_at``: of the request, monotonic seconds; None: it runs."""
    return list(_Timeline(record, ended_at).stages())


class _Timeline:
    def __init__(self, record: RequestRecord, ended_at: float | None) -> None:
        self._record = record
        self._ended_at = ended_at

    def stages(self) -> Iterator[Interval]:
        yield from self._router()
        yield from self._scores()
        yield from self._vision()
        yield from self._language()

    def _interval(self, stage: Stage, start: float, end: float | None, server: str = "") -> Interval:
        end = self._ended_at if end is None else end
        return Interval(stage, self._ms(start), None if end is None else self._ms(max(start, end)), server)

    def _ms(self, at: float) -> float:
        return round(1e3 * (at - self._record.received_at), 3)

    def _router(self) -> Iterator[Interval]:
        record, queued_at = self._record, self._record.received_at
        if record.stage == "read":
            yield self._interval("receive", record.received_at, None)
            return
        if record.media_started_at is not None and record.media_seconds is not None:
            queued_at = record.media_started_at + record.media_seconds
            yield self._interval("receive", record.received_at, record.media_started_at)
            yield self._interval("fetch", record.media_started_at, queued_at)
        yield self._interval("queue", queued_at, record.admitted_at)

    def _scores(self) -> Iterator[Interval]:
        record = self._record
        if record.score_started_at is not None and record.score_seconds is not None:
            yield self._interval("score", record.score_started_at, record.score_started_at + record.score_seconds)

    def _vision(self) -> Iterator[Interval]:
        calls = self._record.encodes[:MAX_GROUPS]
        num_groups = sum(len(call.reply.groups) for call in calls if call.reply is not None)
        for call in calls:
            groups: Sequence[TileGroup] = call.reply.groups if call.reply is not None else ()
            if groups:
                yield from self._groups(call, groups if num_groups <= MAX_GROUPS else [_joined(groups)])
            else:
                yield self._whole(call)

    def _whole(self, call: EncodeCall) -> Interval:
        """A call that is under way, that failed, or of which no more is known."""
        interval = self._interval("encode", call.started_at, call.ended_at, call.server)
        interval.image = call.image_index
        interval.failed = call.reply is None and interval.end is not None
        return interval

    def _groups(self, call: EncodeCall, groups: Sequence[TileGroup]) -> Iterator[Interval]:
        ended_at = call.started_at if call.ended_at is None else call.ended_at
        arrived_at = ended_at - max(group.acknowledged_ms for group in groups) / 1e3
        stations: Sequence[tuple[Stage, str, str]] = (
            ("vision_queue", "queued_ms", "started_ms"),
            ("encode", "started_ms", "ended_ms"),
            ("transfer", "sent_ms", "acknowledged_ms"),
        )
        unpacked = self._interval("unpack", arrived_at, arrived_at + groups[0].queued_ms / 1e3, call.server)
        unpacked.image = call.image_index
        yield from [unpacked] if groups[0].queued_ms / 1e3 > _SHORTEST else []
        for group in groups:
            for stage, start, end in stations:
                begun_at, done_at = (arrived_at + getattr(group, name) / 1e3 for name in (start, end))
                if done_at - begun_at > _SHORTEST:
                    interval = self._interval(stage, begun_at, done_at, call.server)
                    interval.image = call.image_index
                    interval.first_tile, interval.num_tiles = group.first_tile, group.num_tiles
                    yield interval

    def _language(self) -> Iterator[Interval]:
        record = self._record
        if record.admitted_at is None:
            return
        first = min(record.first_token_at.values(), default=None)
        prefill_ms = max((finished.timings.prefill_ms for finished in record.finished.values()), default=None)
        begun_at = record.admitted_at
        if first is not None and prefill_ms is not None:
            begun_at = max(begun_at, first - prefill_ms / 1e3)
        if begun_at - record.admitted_at > _SHORTEST:
            yield self._interval("language_queue", record.admitted_at, begun_at, record.language)
        yield self._interval("prefill", begun_at, first, record.language)
        if first is not None:
            is_done = record.stage == "done" or self._ended_at is not None
            last = max(record.last_token_at.values()) if is_done else None
            yield self._interval("decode", first, last, record.language)


def _joined(groups: Sequence[TileGroup]) -> TileGroup:
    """All of a call as one."""
    return TileGroup(
        first_tile=groups[0].first_tile,
        num_tiles=sum(group.num_tiles for group in groups),
        queued_ms=min(group.queued_ms for group in groups),
        started_ms=min(group.started_ms for group in groups),
        ended_ms=max(group.ended_ms for group in groups),
        sent_ms=min(group.sent_ms for group in groups),
        acknowledged_ms=max(group.acknowledged_ms for group in groups),
    )
