"""Stages on the router's clock: where a request's time went, placed by what the router itself saw."""

import pytest

from protos.language_pb2 import Finished, LanguageTimings
from protos.vision_pb2 import EncodeReply, TileGroup
from router.record import EncodeCall, RequestRecord
from router.ui.timeline import MAX_GROUPS, intervals

BEGIN = 1000.0


def at(milliseconds: float) -> float:
    return BEGIN + milliseconds / 1e3


def group(first_tile: int, *times: float, num_tiles: int = 1) -> TileGroup:
    queued, started, ended, sent, acknowledged = times
    return TileGroup(
        first_tile=first_tile,
        num_tiles=num_tiles,
        queued_ms=queued,
        started_ms=started,
        ended_ms=ended,
        sent_ms=sent,
        acknowledged_ms=acknowledged,
    )


def encode(begin: float, end: float | None, *groups: TileGroup, image: int = 0) -> EncodeCall:
    reply = EncodeReply(groups=groups) if groups else None
    return EncodeCall("v", image, at(begin), None if end is None else at(end), reply)


def finished_record(*encodes: EncodeCall) -> RequestRecord:
    """Fetched from 1 to 3 ms, admitted at 5, first token at 60, last one at 90."""
    return RequestRecord(
        "r",
        received_at=BEGIN,
        kind="image",
        stage="done",
        media_started_at=at(1),
        media_seconds=0.002,
        encodes=list(encodes),
        language="l",
        admitted_at=at(5),
        first_token_at={0: at(60)},
        last_token_at={0: at(90)},
        finished={0: Finished(timings=LanguageTimings(prefill_ms=45, decode_ms=30))},
    )


def shown(record: RequestRecord, ended: float | None = None) -> list[tuple[str, float, float | None]]:
    stages = intervals(record, None if ended is None else at(ended))
    return [
        (stage.stage, round(stage.start, 1), None if stage.end is None else round(stage.end, 1)) for stage in stages
    ]


def test_every_stage_has_its_place():
    """What a vision server tells ended there when its reply came here."""
    call = encode(6, 50, group(0, 4, 6, 20, 20, 25), group(1, 4, 20, 34, 34, 40, num_tiles=2))
    assert shown(finished_record(call), 91) == [
        ("receive", 0, 1),
        ("fetch", 1, 3),
        ("queue", 3, 5),
        ("unpack", 10, 14),
        ("vision_queue", 14, 16),
        ("encode", 16, 30),
        ("transfer", 30, 35),
        ("vision_queue", 14, 30),
        ("encode", 30, 44),
        ("transfer", 44, 50),
        ("language_queue", 5, 15),
        ("prefill", 15, 60),
        ("decode", 60, 90),
    ]
    encodes = [stage for stage in intervals(finished_record(call), at(91)) if stage.stage == "encode"]
    assert [(stage.server, stage.image, stage.first_tile, stage.num_tiles) for stage in encodes] == [
        ("v", 0, 0, 1),
        ("v", 0, 1, 2),
    ]


def test_what_was_in_the_cache_did_not_take_place():
    stages = shown(finished_record(encode(6, 10, group(0, 0, 0, 0, 1, 3))), 91)
    assert [stage for stage, _, _ in stages] == [
        *("receive", "fetch", "queue", "transfer", "language_queue", "prefill", "decode")
    ]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("read", [("receive", 0, None)]),
        ("admit", [("queue", 0, None)]),
    ],
)
def test_before_a_server_has_it(stage, expected):
    assert shown(RequestRecord("r", received_at=BEGIN, stage=stage)) == expected


def test_a_running_request_has_open_ends():
    record = RequestRecord("r", received_at=BEGIN, stage="vision", admitted_at=at(2), encodes=[encode(3, None)])
    assert shown(record) == [("queue", 0, 2), ("encode", 3, None), ("prefill", 2, None)]
    record.stage, record.first_token_at, record.last_token_at = "decode", {0: at(9)}, {0: at(12)}
    assert shown(record)[-2:] == [("prefill", 2, 9), ("decode", 9, None)]


def test_everything_ends_with_the_request():
    record = RequestRecord("r", received_at=BEGIN, stage="vision", admitted_at=at(2), encodes=[encode(3, 8)])
    stages = intervals(record, at(20))
    assert [stage.end for stage in stages] == [2, 8, 20]
    assert [stage.failed for stage in stages] == [False, True, False]


def test_no_request_is_told_at_any_length():
    groups = [group(tile, 0, tile + 1, tile + 2, tile + 2, tile + 3) for tile in range(40)]
    calls = [encode(0, 100, *groups, image=image) for image in range(MAX_GROUPS + 5)]
    stages = [stage for stage in intervals(finished_record(*calls), at(100)) if stage.stage == "encode"]
    assert len(stages) == MAX_GROUPS
    assert {(stage.first_tile, stage.num_tiles) for stage in stages} == {(0, 40)}
