"""How many tiles an image becomes, and in which grid: pure arithmetic on width and height.

Knows nothing of pixels, files or tokens. Source: ``dynamic_preprocess`` of the published InternVL code; its test
vectors are in tests/common/model/test_geometry.py.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import inf


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a checkpoint cuts images: ``min_tiles`` to ``max_tiles`` square tiles of ``tile_size`` pixels.

    The thumbnail is not counted in ``max_tiles``. ``dynamic`` false: every image is one tile.
    """

    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    tile_size: int = 448
    dynamic: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"need 1 <= min_tiles <= max_tiles, got {self.min_tiles} and {self.max_tiles}")
        if self.tile_size < 1:
            raise ValueError(f"tile_size must be positive, got {self.tile_size}")


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (cols, rows) with ``min_tiles`` to ``max_tiles`` cells, by area.

    Among grids of one area the published code iterates a Python set. That order can only matter for min_tiles > 1;
    fewer columns first, as transformers' image processor has it, makes it definite.
    """
    cells = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    return tuple(sorted((grid for grid in cells if grid[0] * grid[1] >= min_tiles), key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int = 448) -> tuple[int, int]:
    """The (cols, rows) whose aspect ratio is closest to the image's; thumbnail not counted.

    Of grids with equal ratios the larger wins only if the image has more than half of its pixels. One ordered pass,
    not a global optimum, as in the published code.

    Raises:
        ValueError: if a side is not positive or the tile limits are empty.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no grid")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"need 1 <= min_tiles <= max_tiles, got {min_tiles} and {max_tiles}")
    target = width / height
    best, best_gap = (1, 1), inf
    for cols, rows in _grids(min_tiles, max_tiles):
        gap = abs(target - cols / rows)
        is_tie_for_large_image = gap == best_gap and width * height > 0.5 * tile_size * tile_size * cols * rows
        if gap < best_gap or is_tie_for_large_image:
            best, best_gap = (cols, rows), gap
    return best


def count_tiles(width: int, height: int, tiling: Tiling) -> int:
    """Tiles of one image, thumbnail included. Raises ValueError as ``choose_grid`` does."""
    if not tiling.dynamic:
        return 1
    cols, rows = choose_grid(width, height, tiling.min_tiles, tiling.max_tiles, tiling.tile_size)
    num_tiles = cols * rows
    return num_tiles + 1 if tiling.use_thumbnail and num_tiles > 1 else num_tiles
