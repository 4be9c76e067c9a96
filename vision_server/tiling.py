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


def make_tiles(image: Image.Image, tiling: Tiling, out: Tiles | None = None, wanted: range | None = None) -> Tiles:
    """Stretch ``image`` over its grid and cut it. As many tiles as ``geometry.count_tiles`` says.

    Args:
        image: mode RGB.
        out: where to write them; default: new memory.
        wanted: neighbouring ones of these tiles; default: all.
    """
    return tiles_of_pixels(rgbx(image), tiling, out, wanted)


def tiles_of_pixels(pixels: Tiles, tiling: Tiling, out: Tiles | None = None, wanted: range | None = None) -> Tiles:
    """The same for pixels ``[H, W, 4]`` whose fourth byte means nothing; contiguous and writable, but only read."""
    height, width, _ = pixels.shape
    side = tiling.tile_size
    cols, rows = 1, 1
    if tiling.dynamic:
        cols, rows = choose_grid(width, height, tiling.min_tiles, tiling.max_tiles, side)
    num_cells = cols * rows
    with_thumbnail = tiling.dynamic and tiling.use_thumbnail and num_cells > 1
    wanted = range(num_cells + with_thumbnail) if wanted is None else wanted
    shape = (len(wanted), side, side, 3)
    tiles = np.empty(shape, np.uint8) if out is None else out
    assert tiles.shape == shape
    cells = range(wanted.start, min(wanted.stop, num_cells))
    if cells:
        _cut(pixels, tiles[: len(cells)], cells, cols, rows)
    if wanted.stop > num_cells:
        stretch(pixels, tiles[-1:], 1)
    return tiles


def _cut(pixels: Tiles, tiles: Tiles, cells: range, cols: int, rows: int) -> None:
    """Neighbouring ``cells`` of the grid, computed in whole rows of it."""
    first_row, end_row = cells.start // cols, -(-cells.stop // cols)
    skipped, computed = cells.start - first_row * cols, (end_row - first_row) * cols
    if computed == len(cells):
        stretch(pixels, tiles, cols, rows, first_row)
        return
    band = np.empty((computed, *tiles.shape[1:]), np.uint8)
    stretch(pixels, band, cols, rows, first_row)
    tiles[:] = band[skipped : skipped + len(cells)]
