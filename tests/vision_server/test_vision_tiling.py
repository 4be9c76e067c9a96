"""Tiles are pixel-equal to the reference rule of INTERNVL.md 6, transcribed independently in tests/reference.py."""

import numpy as np
import pytest

from common.model.geometry import Tiling, count_tiles
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
