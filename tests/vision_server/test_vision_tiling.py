"""Tiles are pixel-equal to the reference rule of INTERNVL.md 6, transcribed independently in tests/reference.py."""

import random

import numpy as np
import pytest
from PIL import Image

from common.model.geometry import Tiling, choose_grid, count_tiles
from tests import reference
from tests.vision_server.neighbours import picture
from vision_server.tiling import make_tiles

SIZES = [(448, 448), (1, 1), (3, 1000), (1000, 3), (800, 600), (600, 800), (1000, 300), (1920, 1080)]
SIZES += [(633, 633), (634, 634)]  # on both sides of the area rule


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 6), (1, 12), (4, 12)])
def test_tiles_equal_the_reference(size, low, high):
    image = picture(*size)
    tiles = make_tiles(image, Tiling(low, high, use_thumbnail=True))
    expected = np.stack([np.asarray(tile) for tile in reference.tiles(image, low, high)])
    assert tiles.dtype == np.uint8
    assert np.array_equal(tiles, expected)
    assert len(tiles) == count_tiles(image.width, image.height, Tiling(low, high, use_thumbnail=True))


@pytest.mark.parametrize("size", [(900, 900), (1000, 300), (300, 1000), (7, 1900), (2000, 1300)])
def test_a_part_of_the_tiles_is_that_part(size):
    """Whole rows of the grid, parts of rows, and the thumbnail with or without others."""
    image, tiling = picture(*size), Tiling(1, 12, use_thumbnail=True)
    tiles = make_tiles(image, tiling)
    for first in range(len(tiles)):
        for stop in range(first + 1, len(tiles) + 1):
            assert np.array_equal(make_tiles(image, tiling, wanted=range(first, stop)), tiles[first:stop])


def test_forty_tiles_and_a_thumbnail():
    tiles = make_tiles(picture(3840, 2160), Tiling(1, 40, use_thumbnail=True))
    assert tiles.shape == (29, 448, 448, 3)  # 7 x 4 and the thumbnail


def test_the_thumbnail_can_be_switched_off():
    image = picture(896, 896)
    with_thumbnail = make_tiles(image, Tiling(1, 12, use_thumbnail=True))
    without = make_tiles(image, Tiling(1, 12, use_thumbnail=False))
    assert len(without) == 4
    assert np.array_equal(with_thumbnail[:4], without)


def test_a_model_without_dynamic_tiling_sees_one_tile():
    image = picture(1000, 300)
    tiles = make_tiles(image, Tiling(1, 12, use_thumbnail=True, dynamic=False))
    assert np.array_equal(tiles, np.asarray(image.resize((448, 448)))[None])


def test_another_tile_size():
    assert make_tiles(picture(896, 448), Tiling(1, 12, use_thumbnail=True, tile_size=224)).shape[1:] == (224, 224, 3)


def expected_tiles(image: Image.Image, tiling: Tiling) -> np.ndarray:
    """The reference rule for any size of tile, with Pillow's own resizing."""
    side = tiling.tile_size
    cols, rows = choose_grid(image.width, image.height, tiling.min_tiles, tiling.max_tiles, side)
    sheet = image.resize((side * cols, side * rows))
    cells = [sheet.crop((side * c, side * r, side * (c + 1), side * (r + 1))) for r in range(rows) for c in range(cols)]
    return np.stack(
        [np.asarray(cell) for cell in [*cells, image.resize((side, side))][: count_tiles(*image.size, tiling)]]
    )


def noise(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Every value next to every other, and runs of the extremes, where sums leave the range of a byte."""
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[rng.random((height, width)) < 0.3] = 255
    pixels[rng.random((height, width)) < 0.3] = 0
    return Image.fromarray(pixels)


def test_five_hundred_sizes_and_budgets_are_bit_equal():
    """Up and down, wide and tall, 1 to 40 tiles: a hundred images of 448-pixel tiles, the others of few pixels a tile,
    which is as good a test of the arithmetic."""
    choose, rng = random.Random(0), np.random.default_rng(0)
    for number in range(500):
        side = 448 if number % 5 == 0 else choose.choice([1, 2, 3, 7, 16, 32, 33, 64])
        longest = choose.choice([8, 60, 400, 1000])
        image = noise(choose.randint(1, longest), choose.randint(1, longest), rng)
        low = choose.randint(1, 6)
        tiling = Tiling(low, choose.randint(low, 40), use_thumbnail=True, tile_size=side)
        assert np.array_equal(make_tiles(image, tiling), expected_tiles(image, tiling)), (image.size, tiling)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (3, 3), (65535, 1), (1, 65535), (5, 3000), (3000, 5)])
def test_extreme_sizes_are_bit_equal(size):
    image, tiling = noise(size[0], size[1], np.random.default_rng(1)), Tiling(1, 40, use_thumbnail=True, tile_size=32)
    assert np.array_equal(make_tiles(image, tiling), expected_tiles(image, tiling))


def test_an_image_that_pillow_holds_in_pieces_is_copied():
    image, tiling = picture(3000, 2000), Tiling(1, 4, use_thumbnail=True, tile_size=64)
    with pytest.raises(ValueError, match=r"contiguous|multiple"):
        image.__arrow_c_array__()
    assert np.array_equal(make_tiles(image, tiling), expected_tiles(image, tiling))


def test_the_image_is_left_as_it_was():
    image = picture(300, 200)
    before = image.tobytes()
    make_tiles(image, Tiling(1, 12, use_thumbnail=True))
    assert image.tobytes() == before


def test_tiles_can_be_written_where_they_are_needed():
    image, tiling = picture(896, 448), Tiling(1, 12, use_thumbnail=True)
    there = np.empty((3, 448, 448, 3), np.uint8)
    assert make_tiles(image, tiling, there) is there
    assert np.array_equal(there, make_tiles(image, tiling))
