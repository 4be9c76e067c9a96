"""One RGB image -> the tiles the tower sees, pixel-equal to the reference (INTERNVL.md 6).

Tiles stay 8-bit: a quarter of the memory to hold and to upload. ``encoder.py`` scales them on its device.
Knows nothing of files, batches or devices.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.model.geometry import Tiling, choose_grid

Tiles = NDArray[np.uint8]
"""``[num_tiles, S, S, 3]``, RGB, row-major tiles, thumbnail last."""


def make_tiles(image: Image.Image, tiling: Tiling) -> Tiles:
    """Stretch ``image`` over its grid and cut it. As many tiles as ``geometry.count_tiles`` says."""
    cols, rows = _grid(image, tiling)
    side = tiling.tile_size
    with_thumbnail = tiling.dynamic and tiling.use_thumbnail and cols * rows > 1
    tiles = np.empty((cols * rows + with_thumbnail, side, side, 3), dtype=np.uint8)
    sheet = _pixels(image, cols * side, rows * side)
    cells = tiles[: cols * rows].reshape(rows, cols, side, side, 3)
    cells[...] = sheet.reshape(rows, side, cols, side, 3).swapaxes(1, 2)
    if with_thumbnail:
        tiles[-1] = _pixels(image, side, side)
    return tiles


def _grid(image: Image.Image, tiling: Tiling) -> tuple[int, int]:
    if not tiling.dynamic:
        return 1, 1
    return choose_grid(image.width, image.height, tiling.min_tiles, tiling.max_tiles, tiling.tile_size)


def _pixels(image: Image.Image, width: int, height: int) -> Tiles:
    """Bicubic is Pillow's default for RGB; the reference relies on that default."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
