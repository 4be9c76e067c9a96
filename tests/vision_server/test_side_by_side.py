"""Tiles side by side on a CPU: in order, at once, each with its part of the threads, whole after a failure."""

import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.model.config import load_config
from vision_server import side_by_side
from vision_server.internvit import InternViT
from vision_server.side_by_side import SideBySide

DEADLINE = 30.0


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def all_cores_are_free(monkeypatch):
    cores_are_free(monkeypatch, 4)


def cores_are_free(monkeypatch, num_cores: int) -> None:
    """What the clocks say, whatever this machine has and does."""
    seconds = itertools.count()
    monkeypatch.setattr(side_by_side, "_now", lambda: (now := float(next(seconds)), now * num_cores))


def numbered_tiles(num_tiles: int) -> Tensor:
    return torch.arange(num_tiles).view(num_tiles, 1, 1, 1).expand(num_tiles, 3, 2, 2).float()


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 4, 5, 9])
def test_features_come_in_tile_order(four_threads, num_tiles):
    encode = SideBySide(lambda tile: tile[:, 0] * 10, num_threads=4)
    assert torch.equal(encode(numbered_tiles(num_tiles)), numbered_tiles(num_tiles)[:, 0] * 10)


@pytest.mark.parametrize(("num_tiles", "threads_each"), [(1, [4]), (2, [2, 2]), (3, [1] * 3), (5, [1] * 4 + [4])])
def test_tiles_of_a_round_share_the_threads(four_threads, num_tiles, threads_each):
    seen: list[int] = []

    def encode(tile: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return tile

    SideBySide(encode, num_threads=4)(numbered_tiles(num_tiles))
    assert seen == threads_each
    assert torch.get_num_threads() == 4


def test_tiles_run_at_once(four_threads):
    together = threading.Barrier(4, timeout=DEADLINE)

    def encode(tile: Tensor) -> Tensor:
        together.wait()  # raises unless four are inside
        return tile

    assert len(SideBySide(encode, num_threads=4)(numbered_tiles(4))) == 4


def test_a_failure_is_raised_when_no_tile_runs_any_more(four_threads):
    inside: set[int] = set()
    has_failed = threading.Event()

    def encode(tile: Tensor) -> Tensor:
        number = int(tile[0, 0, 0, 0])
        if number == 0:
            has_failed.set()
            raise RuntimeError("out of memory")
        inside.add(number)
        has_failed.wait(DEADLINE)
        inside.discard(number)
        return tile

    encoder = SideBySide(encode, num_threads=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder(numbered_tiles(4))
    assert not inside
    assert len(encoder(numbered_tiles(4)[1:])) == 3
    assert torch.get_num_threads() == 4


def test_no_gradients_are_recorded_in_the_threads(four_threads):
    weight = torch.ones(1, requires_grad=True)
    with torch.inference_mode():
        features = SideBySide(lambda tile: tile * weight, num_threads=4)(numbered_tiles(2))
    assert not features.requires_grad


def test_beside_others_tiles_run_one_after_the_other(four_threads, monkeypatch):
    """The clocks say that the first round got one core of four."""
    cores_are_free(monkeypatch, 1)
    inside, most = 0, []
    lock = threading.Lock()

    def encode(tile: Tensor) -> Tensor:
        nonlocal inside
        with lock:
            inside += 1
            most.append((inside, torch.get_num_threads()))
        time.sleep(0.01)  # long enough to be seen by another, were there one
        with lock:
            inside -= 1
        return tile

    tiles = numbered_tiles(7)
    assert torch.equal(SideBySide(encode, num_threads=4)(tiles), tiles)
    assert most[4:] == [(1, 1)] * 3
    assert torch.get_num_threads() == 4


def test_beside_others_threads_never_share_the_last_tile_of_a_batch(four_threads, monkeypatch):
    cores_are_free(monkeypatch, 1)
    seen: list[int] = []

    def encode(tile: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return tile

    encoder = SideBySide(encode, num_threads=4)
    for _ in range(5):
        encoder(numbered_tiles(5))
    assert seen == [1] * 25
    for _ in range(4):
        encoder(numbered_tiles(1))
    assert 4 in seen[25:]  # where batches are never larger, they must do for a look


@pytest.mark.parametrize(("num_tiles", "num_cores"), [(1, 4), (3, 4), (5, 4), (5, 2), (3, 1)])
def test_fixed_a_tile_has_one_thread_always(four_threads, monkeypatch, num_tiles, num_cores):
    cores_are_free(monkeypatch, num_cores)
    seen: list[int] = []

    def encode(tile: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return tile

    encoder = SideBySide(encode, num_threads=4, fixed=True)
    for _ in range(3):
        assert torch.equal(encoder(numbered_tiles(num_tiles)), numbered_tiles(num_tiles))
    assert seen == [1] * 3 * num_tiles
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_a_tile_has_the_same_bits_whatever_it_is_encoded_with(four_threads, monkeypatch, checkpoint, dtype):
    """A real tower, wide enough that threads which share a tile would share its sums."""
    config = replace(
        load_config(checkpoint.path).vision, hidden_size=256, intermediate_size=1024, num_attention_heads=4
    )
    torch.manual_seed(0)
    tower = InternViT(config).requires_grad_(False).eval()
    for parameter in tower.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.05)
    tower.to(dtype).pack()
    pixels = torch.randn(7, 3, 112, 112).to(dtype)
    with torch.inference_mode():
        encoder = SideBySide(tower, num_threads=4, fixed=True)
        alone = torch.cat([encoder(tile) for tile in pixels.split(1)])
        for num_cores in (4, 2, 1):
            cores_are_free(monkeypatch, num_cores)
            for first in (0, 1, 2):  # other neighbours, other rounds
                for _ in range(2):  # the second time with as many threads as the first found free
                    assert torch.equal(encoder(pixels[first:]), alone[first:])
