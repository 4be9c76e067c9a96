"""Tiles leave in the order in which images became ready; nothing exceeds its bound."""

import random

import pytest

from common.service.errors import Overloaded
from vision_server.batcher import Batcher, TileGroup


def batcher_with(*sizes: int, max_batch_tiles: int = 8, max_queued_tiles: int = 100) -> Batcher:
    """One ready image per size, numbered from 0."""
    batcher = Batcher(max_batch_tiles, max_queued_tiles)
    for image, num_tiles in enumerate(sizes):
        batcher.admit(image, num_tiles)
        batcher.make_ready(image)
    return batcher


def test_a_batch_takes_tiles_of_many_images():
    batcher = batcher_with(1, 2, 3, 4)
    assert batcher.take() == [TileGroup(0, 0, 1), TileGroup(1, 0, 2), TileGroup(2, 0, 3), TileGroup(3, 0, 2)]
    assert batcher.take() == [TileGroup(3, 2, 2)]
    assert batcher.take() == []


def test_an_image_larger_than_a_batch_is_spread_over_several():
    batcher = batcher_with(13, 1, max_batch_tiles=6)
    assert batcher.take() == [TileGroup(0, 0, 6)]
    assert batcher.take() == [TileGroup(0, 6, 6)]
    assert batcher.take() == [TileGroup(0, 12, 1), TileGroup(1, 0, 1)]


def test_an_image_that_is_not_decoded_yet_holds_up_nobody():
    batcher = Batcher(8, 100)
    batcher.admit(0, 5)
    batcher.admit(1, 2)
    batcher.make_ready(1)
    assert batcher.take() == [TileGroup(1, 0, 2)]
    assert batcher.queued_tiles == 5
    assert batcher.num_waiting == 1


def test_what_does_not_fit_is_refused_and_changes_nothing():
    batcher = batcher_with(6, max_queued_tiles=8)
    with pytest.raises(Overloaded):
        batcher.admit(1, 3)
    batcher.admit(2)
    with pytest.raises(Overloaded):
        batcher.resize(2, 3)
    batcher.resize(2, 2)
    assert batcher.held_tiles == 8


def test_tiles_in_a_batch_keep_their_place_until_released():
    """Features a slow peer has not taken yet must keep new images out."""
    batcher = batcher_with(8, max_queued_tiles=8)
    assert len(batcher.take()) == 1
    assert batcher.queued_tiles == 0
    with pytest.raises(Overloaded):
        batcher.admit(1)
    batcher.release(0)
    batcher.admit(1, 8)


def test_release_drops_what_is_still_queued():
    batcher = batcher_with(13, 2, max_batch_tiles=4)
    batcher.take()
    assert batcher.release(0) == 9
    assert batcher.take() == [TileGroup(1, 0, 2)]
    assert batcher.release(0) == 0
    assert batcher.release(1) == 0
    assert batcher.held_tiles == len(batcher) == 0


def test_bounds_must_make_sense():
    with pytest.raises(ValueError, match="batch"):
        Batcher(0, 10)
    with pytest.raises(ValueError, match="batch"):
        Batcher(11, 10)


def test_every_tile_is_taken_exactly_once_whatever_happens():
    """Random admissions, resizes, batches and releases against a plain account of what must come out."""
    rng = random.Random(7)
    for _ in range(50):
        batcher = Batcher(rng.randint(1, 9), 60)
        ready: dict[int, int] = {}
        taken: dict[int, int] = {}
        for image in range(60):
            size = rng.randint(1, 13)
            try:
                batcher.admit(image)
                batcher.resize(image, size)
            except Overloaded:
                batcher.release(image)
                continue
            batcher.make_ready(image)
            ready[image], taken[image] = size, 0
            if rng.random() < 0.3:
                batcher.release(victim := rng.choice(list(ready)))
                ready.pop(victim)
            for group in batcher.take() if rng.random() < 0.7 else []:
                assert group.first_tile == taken[group.image]
                taken[group.image] += group.num_tiles
                if taken[group.image] == ready[group.image] and rng.random() < 0.5:
                    batcher.release(group.image)
            assert batcher.held_tiles <= 60
        while groups := batcher.take():
            assert sum(group.num_tiles for group in groups) <= batcher.max_batch_tiles
            for group in groups:
                taken[group.image] += group.num_tiles
        assert all(taken[image] == size for image, size in ready.items())
        assert batcher.queued_tiles == 0
