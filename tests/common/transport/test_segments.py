"""Segments of few sizes, bounded in all, the warmest first."""

import pytest

from common.transport import segments
from common.transport.segments import MAX_IDLE, SegmentPool, keep_bytes, pool_bytes, round_up
from common.transport.sender import TransportLimits

KIB = 2**10


@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, 65_537, 2_621_440, 34_078_720, 2**26 - 1, 2**26])
def test_sizes_are_pages_and_at_most_an_eighth_too_large(num_bytes: int):
    rounded = round_up(num_bytes)
    assert rounded % 4096 == 0
    assert num_bytes <= rounded <= max(4096, num_bytes * 9 / 8 + 4096)
    assert round_up(rounded) == rounded


def test_there_are_few_sizes():
    assert len({round_up(num_bytes) for num_bytes in range(2**21, 2**22, 4096)}) <= 9


def test_the_warmest_segment_of_the_size_is_taken():
    pool = SegmentPool(1000 * KIB)
    (first, _), (second, _), (other, _) = pool.take(64 * KIB), pool.take(64 * KIB), pool.take(128 * KIB)
    for segment in (first, second, other):
        assert pool.give_back(segment) == []
    assert pool.take(64 * KIB) == (second, [])
    assert pool.take(63 * KIB) == (first, [])
    assert pool.num_bytes == 256 * KIB


def test_idle_segments_of_other_sizes_give_way_and_those_in_use_do_not():
    pool = SegmentPool(256 * KIB)
    old, young = pool.take(64 * KIB)[0], pool.take(128 * KIB)[0]
    pool.give_back(old)
    pool.give_back(young)
    large, evicted = pool.take(192 * KIB)
    assert evicted == [old, young]
    with pytest.raises(MemoryError):
        pool.take(128 * KIB)
    pool.remove(large)
    assert pool.num_bytes == 0
    assert pool.take(256 * KIB)[1] == []


def test_few_are_kept_idle():
    pool = SegmentPool(10_000 * KIB)
    taken = [pool.take(64 * KIB)[0] for _ in range(MAX_IDLE + 2)]
    evicted = [each for segment in taken for each in pool.give_back(segment)]
    assert evicted == taken[:2]
    assert pool.num_bytes == MAX_IDLE * 64 * KIB


def test_there_is_room_for_all_that_may_be_in_flight_beside_all_that_may_be_kept():
    limits = TransportLimits()
    for frame_bytes in (40_000, 2_621_440, 4_194_305, 33_554_433, limits.max_frame_bytes):
        num_frames = limits.max_inflight_bytes // frame_bytes
        in_flight = num_frames * round_up(frame_bytes)
        assert in_flight + keep_bytes(limits) <= pool_bytes(limits)


def test_closing_unmaps():
    pool = SegmentPool(1000 * KIB)
    segment, _ = pool.take(64 * KIB)
    segment.make()
    segment.write(memoryview(b"feature"), 0, 7)
    pool.close()
    assert not segment.is_there
    assert len(segments._MAPPED) == 0
