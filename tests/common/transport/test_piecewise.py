"""The checksum of a whole, put together from pieces that came in any rhythm and were checked by several threads."""

import random
import threading

import pytest

from common.transport import piecewise
from common.transport.piecewise import PIECE_BYTES, PiecewiseCheck
from protos.frame import checksum


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(20))
def test_it_is_that_of_the_whole_however_it_came(seed: int):
    chance = random.Random(seed)
    payload = memoryview(chance.randbytes(chance.choice([1, 2, 999, 1000, 1001, 7777, 20_000])))
    check = PiecewiseCheck(payload)
    num_ready = 0
    while num_ready < len(payload):
        num_ready = min(len(payload), num_ready + chance.randint(1, 3000))
        assert check.grow(num_ready) and check.is_waiting and not check.is_complete
        check.run()
        assert not check.is_waiting
    assert check.is_complete
    assert check.crc() == checksum(payload)


def test_several_threads_share_the_work():
    payload = memoryview(random.Random(1).randbytes(3 * PIECE_BYTES + 5))
    copy = memoryview(bytearray(len(payload)))
    check = PiecewiseCheck(copy, payload)
    assert check.grow(len(payload))
    threads = [threading.Thread(target=check.run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert check.crc() == checksum(payload)
    assert copy == payload


def test_what_was_written_does_not_shrink_or_overflow():
    check = PiecewiseCheck(memoryview(bytes(100)))
    assert check.grow(50)
    assert check.grow(50)
    assert not check.grow(49)
    assert not check.grow(101)
    assert check.grow(100)


def test_nothing_is_checked_before_it_is_written():
    check = PiecewiseCheck(memoryview(bytes(100)))
    assert not check.is_waiting
    check.run()
    assert not check.is_complete
