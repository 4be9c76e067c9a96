"""The tile grid is that of the published code, and of transformers' image processor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from common.model.geometry import Tiling, choose_grid, count_tiles

PUBLISHED_VECTORS = [
    # width, height, grids for at most 6, 12, 24 and 40 tiles
    (1920, 1080, (2, 1), (4, 2), (5, 3), (7, 4)),
    (3840, 2160, (2, 1), (4, 2), (5, 3), (7, 4)),
    (1080, 1920, (1, 2), (2, 4), (3, 5), (4, 7)),
    (800, 600, (3, 2), (4, 3), (4, 3), (4, 3)),
    (1000, 300, (3, 1), (3, 1), (7, 2), (10, 3)),
    (4096, 256, (6, 1), (12, 1), (16, 1), (16, 1)),
    (3, 1000, (1, 6), (1, 12), (1, 24), (1, 40)),
]


@pytest.mark.parametrize(("width", "height", "six", "twelve", "twenty_four", "forty"), PUBLISHED_VECTORS)
def test_grids_of_the_published_tiler(width, height, six, twelve, twenty_four, forty):
    grids = [choose_grid(width, height, 1, limit) for limit in (6, 12, 24, 40)]
    assert grids == [six, twelve, twenty_four, forty]


@pytest.mark.parametrize(("side", "grid"), [(1, 1), (633, 1), (634, 2), (950, 2), (951, 3), (5000, 3)])
def test_a_square_gets_more_tiles_only_with_more_than_half_of_their_pixels(side, grid):
    assert choose_grid(side, side, 1, 12) == (grid, grid)


@pytest.mark.parametrize(
    ("width", "height", "tiles"),
    [(448, 448, 1), (600, 600, 1), (896, 896, 5), (1344, 1344, 10), (1920, 1080, 9), (3840, 2160, 9)],
)
def test_the_thumbnail_counts_unless_the_image_is_one_tile(width, height, tiles):
    assert count_tiles(width, height, Tiling(1, 12, use_thumbnail=True)) == tiles
    assert count_tiles(width, height, Tiling(1, 12, use_thumbnail=False)) == max(1, tiles - 1)


def test_without_dynamic_tiling_every_image_is_one_tile():
    assert count_tiles(4000, 300, Tiling(1, 12, use_thumbnail=True, dynamic=False)) == 1


def test_a_4k_image_at_forty_tiles_stays_within_forty_and_its_thumbnail():
    assert max(count_tiles(width, 2160, Tiling(1, 40, use_thumbnail=True)) for width in range(100, 8000, 50)) == 41


def published_grid(width: int, height: int, limit: int) -> tuple[int, int]:
    """A transcription of ``dynamic_preprocess`` that keeps its form: all pairs in a set, then one pass by area."""
    ratios = {
        (i, j) for n in range(1, limit + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= limit
    }
    best_difference, best = float("inf"), (1, 1)
    for ratio in sorted(ratios, key=lambda pair: pair[0] * pair[1]):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < best_difference:
            best_difference, best = difference, ratio
        elif difference == best_difference and width * height > 0.5 * 448 * 448 * ratio[0] * ratio[1]:
            best = ratio
    return best


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 9000), height=st.integers(1, 9000), limit=st.integers(1, 40))
def test_equal_to_the_published_code_for_any_size(width, height, limit):
    assert choose_grid(width, height, 1, limit) == published_grid(width, height, limit)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), width=st.integers(1, 9000), height=st.integers(1, 9000), limit=st.integers(1, 40))
def test_equal_to_transformers_also_with_a_lower_limit(data, width, height, limit):
    lowest = data.draw(st.integers(1, limit))
    expected = get_optimal_tiled_canvas((height, width), (448, 448), lowest, limit)
    assert choose_grid(width, height, lowest, limit) == expected


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_has_no_grid(width, height):
    with pytest.raises(ValueError, match="has no grid"):
        choose_grid(width, height, 1, 12)


@pytest.mark.parametrize(("lowest", "limit"), [(0, 4), (5, 4), (1, 0)])
def test_empty_limits_are_refused(lowest, limit):
    with pytest.raises(ValueError, match="min_tiles <= max_tiles"):
        choose_grid(10, 10, lowest, limit)
    with pytest.raises(ValueError, match="min_tiles <= max_tiles"):
        Tiling(lowest, limit, use_thumbnail=True)
