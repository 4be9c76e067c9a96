"""The checksum of a whole, taken from pieces that came in any rhythm."""

import random

import pytest

from common.transport import piecewise
from common.transport.piecewise import PIECE_BYTES, PiecewiseCheck
from protos.frame import checksum


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_that_of_the_whole_however_it_came(seed: int, is_copied: bool):
    chance = random.Random(seed)
    payload = memoryview(chance.randbytes(chance.choice([1, 2, 999, 1000, 1001, 7777, 20_000])))
    memory = memoryview(bytearray(len(payload))) if is_copied else payload
    check = PiecewiseCheck(memory, payload if is_copied else None)
    num_ready = 0
    while not check.is_complete:
        if not check.is_waiting or chance.random() < 0.5:
            num_ready = min(len(payload), num_ready + chance.randint(1, 3000))
            assert check.grow(num_ready)
        check.step()
    assert not check.is_waiting
    assert check.crc == checksum(payload)
    assert memory == payload


def test_a_step_is_one_piece():
    payload = memoryview(random.Random(1).randbytes(2 * PIECE_BYTES + 5))
    check = PiecewiseCheck(payload)
    assert check.grow(len(payload))
    for num_bytes in (PIECE_BYTES, 2 * PIECE_BYTES, len(payload)):
        assert check.is_waiting
        check.step()
        assert check.crc == checksum(payload[:num_bytes])
    assert check.is_complete


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
    check.grow(10)
    check.step()
    assert check.crc == checksum(bytes(10))
    assert not check.is_complete and not check.is_waiting
