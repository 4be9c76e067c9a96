"""One RGB image -> the tiles the tower sees, pixel-equal to the reference (INTERNVL.md 6).

Tiles stay 8-bit: a quarter of the memory to hold and to upload. ``encoder.py`` scales them on its device.
Knows nothing of files, batches or devices.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.model.geometry import Tiling, choose_grid
from vision_server.pillow_memory import rgbx
from vision_server.resample import stretch

Tiles = NDArray[np.uint8]
"""``[num_tiles, S, S, 3]``, RGB, row-major tiles, thumbnail last."""


def make_tiles(image: Image.Image, tiling: Tiling, out: Tiles | None = None) -> Tiles:
    """Stretch ``image`` over its grid and cut it. As many tiles as ``geometry.count_tiles`` says.

    Args:
        image: mode RGB.
        out: where to write them; default: new memory.
    """
    return tiles_of_pixels(rgbx(image), tiling, out)


def tiles_of_pixels(pixels: Tiles, tiling: Tiling, out: Tiles | None = None) -> Tiles:
    """The same for pixels ``[H, W, 4]`` whose fourth byte means nothing; contiguous and writable, but only read."""
    height, width, _ = pixels.shape
    side = tiling.tile_size
    cols, rows = 1, 1
    if tiling.dynamic:
        cols, rows = choose_grid(width, height, tiling.min_tiles, tiling.max_tiles, side)
    num_cells = cols * rows
    with_thumbnail = tiling.dynamic and tiling.use_thumbnail and num_cells > 1
    shape = (num_cells + with_thumbnail, side, side, 3)
    tiles = np.empty(shape, np.uint8) if out is None else out
    assert tiles.shape == shape
    stretch(pixels, tiles[:num_cells], cols)
    if with_thumbnail:
        stretch(pixels, tiles[num_cells:], 1)
    return tiles
