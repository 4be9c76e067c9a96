"""Pillow's bicubic for 8-bit RGB, bit for bit, several times as fast, and straight into tiles.

Pillow weighs pixels in 22-bit fixed point, along the rows, rounds to 8 bits, then down the columns, or the other way
round (libImaging/Resample.c). Integer sums have no order, so they may be vectorised as one likes: four neighbouring
pixels of four bytes at a time along a row. Only the weights are floating-point, and computed in Pillow's own order of
operations. No intermediate image is kept, only the rows that one output row needs.

Loads no torch: decode workers are small.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from collections.abc import Callable
from math import ceil
from typing import Any, Final, NamedTuple

import numba
import numpy as np
import PIL
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

_BITS: Final = 22
_HALF: Final = 1 << (_BITS - 1)
_SUPPORT: Final = 2.0
_LANES: Final = 16
_PIXELS_AT_ONCE: Final = 4
_PILLOW: Final = int(PIL.__version__.partition(".")[0])

Bytes = NDArray[np.uint8]


def stretch(pixels: Bytes, cells: Bytes, columns: int, rows: int | None = None, first_row: int = 0) -> None:
    """Stretch an image over a sheet of ``columns`` cells a row, and write the cells one behind the other.

    Args:
        pixels: [H, W, 4] contiguous and writable, though not written; the fourth byte of a pixel means nothing.
        cells: [num_cells, S, S, 3] contiguous, top row of the sheet first.
        rows: of the sheet; default: as many as ``cells`` fill.
        first_row: ``cells`` are those from this row of the sheet on; the others are not computed.
    """
    assert pixels.flags.c_contiguous and cells.flags.c_contiguous
    height, width, _ = pixels.shape
    num_cells, side = cells.shape[:2]
    wanted = slice(first_row * side, (first_row + num_cells // columns) * side)
    out_width, out_height = side * columns, wanted.stop if rows is None else rows * side
    across, down = _weigh_axis(width, out_width), _weigh_axis(height, out_height).part(wanted)
    edge = np.zeros((width + _PIXELS_AT_ONCE) * 4, np.uint8)
    row_bytes = 3 * out_width + 1  # the last pixel is stored as four
    flat, lines = pixels.reshape(-1), cells.reshape(num_cells, side, -1)
    if _is_down_first(width, height, out_width, out_height):
        stretched, sums = np.empty(row_bytes, np.uint8), np.empty(4 * width, np.int32)
        _stretch_down_first(flat, width, *across, *down, stretched, edge, sums, lines)
    else:
        ring, sums = np.empty((down.counts.max(), row_bytes), np.uint8), np.empty(3 * side, np.int32)
        _stretch_across_first(flat, width, *across, *down, ring, edge, sums, lines)


def _is_down_first(width: int, height: int, out_width: int, out_height: int) -> bool:
    """Whether Pillow begins with the columns. The order moves some pixels by one, so we follow the Pillow that is
    installed: from 13 on where the height shrinks by more than twice what the width does, before for towers only."""
    if _PILLOW >= 13:
        return height - out_height > max(0, 2 * (width - out_width))
    return out_height < height and height > 100 * width


class _Axis(NamedTuple):
    """For each place of the output: the first pixel it sees, how many it sees, and what they weigh."""

    firsts: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.int32]  # [places, most pixels seen, rounded up to four], zero behind the last

    def part(self, places: slice) -> "_Axis":
        """Of neighbouring places."""
        return _Axis(self.firsts[places], self.counts[places], self.weights[places])


def _weigh_axis(size: int, out_size: int) -> _Axis:
    most = 2 * ceil(_SUPPORT * max(size / out_size, 1.0)) + 1
    padded = -(-most // _PIXELS_AT_ONCE) * _PIXELS_AT_ONCE
    axis = _Axis(np.empty(out_size, np.int64), np.empty(out_size, np.int64), np.zeros((out_size, padded), np.int32))
    _weigh(size, *axis, np.empty(most))
    return axis


def _compiled(function: Callable[..., Any]) -> Any:
    """Exact arithmetic: no fast-math of any kind, so no fused multiplications either."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no directory to keep it in
        return numba.njit(nogil=True)(function)


@_compiled
def _weigh(size, firsts, counts, weights, exact):
    """Fill an axis. ``exact``: room for the weights of one place in double precision."""
    scale = np.float64(np.float32(size)) / len(firsts)  # Pillow keeps the box in single precision
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    inverse = 1.0 / filter_scale
    for place in range(len(firsts)):
        center = (place + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), size) - first
        total = 0.0
        for k in range(count):
            exact[k] = _bicubic((k + first - center + 0.5) * inverse)
            total += exact[k]
        for k in range(count):
            weight = (exact[k] / total if total != 0.0 else exact[k]) * (1 << _BITS)
            weights[place, k] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
        firsts[place], counts[place] = first, count


@_compiled
def _bicubic(x):
    """With a = -0.5 (Keys 1981), in the form Pillow computes it."""
    x = abs(x)
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


@intrinsic
def _blend(_, pixels, first, weights, weight, num_quads, row, place):
    """Store the weighted sum of ``4 * num_quads`` pixels from byte ``first`` on as four bytes at ``row[place]``.

    All arrays flat and contiguous. Written for vectors: Numba's own loops over pixels of four bytes stay scalar.
    """

    def codegen(context, builder, signature, args):
        byte, word, index = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        lanes = ir.VectorType(word, _LANES)

        def address(array, offset, of):
            data = make_array(signature.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [offset]), of.as_pointer())

        entry, loop, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        step, sums = builder.phi(index), builder.phi(lanes)
        at = builder.add(args[1], builder.mul(step, index(_LANES)))
        some = builder.load(address(0, at, ir.VectorType(byte, _LANES)), align=1)
        at = builder.add(args[3], builder.mul(step, index(_PIXELS_AT_ONCE)))
        four = builder.load(address(2, at, ir.VectorType(word, _PIXELS_AT_ONCE)), align=4)
        spread = ir.Constant(lanes, [lane // 4 for lane in range(_LANES)])  # a weight for each byte of its pixel
        product = builder.mul(builder.zext(some, lanes), builder.shuffle_vector(four, four, spread))
        total, following = builder.add(sums, product), builder.add(step, index(1))
        step.add_incoming(index(0), entry)
        step.add_incoming(following, loop)
        sums.add_incoming(ir.Constant(lanes, [0] * _LANES), entry)
        sums.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[4]), loop, end)
        builder.position_at_end(end)

        for half in (_LANES // 2, _LANES // 4):  # the four pixels' sums become one
            low = ir.Constant(ir.VectorType(word, half), list(range(half)))
            high = ir.Constant(ir.VectorType(word, half), list(range(half, 2 * half)))
            total = builder.add(*(builder.shuffle_vector(total, total, part) for part in (low, high)))

        def same(number):
            return ir.Constant(total.type, [number] * 4)

        rounded = builder.ashr(builder.add(total, same(_HALF)), same(_BITS))
        rounded = builder.select(builder.icmp_signed("<", rounded, same(0)), same(0), rounded)
        rounded = builder.select(builder.icmp_signed(">", rounded, same(255)), same(255), rounded)
        pixel = builder.trunc(rounded, ir.VectorType(byte, 4))
        builder.store(pixel, address(5, args[6], pixel.type), align=1)
        return context.get_dummy_value()

    return types.void(pixels, first, weights, weight, num_quads, row, place), codegen


@_compiled
def _stretch_row(pixels, start, firsts, counts, weights, row):
    """One source row from byte ``start`` on into ``row``: three bytes a pixel, the next overwrites the fourth."""
    flat = weights.reshape(-1)
    for place in range(len(firsts)):
        num_quads = (counts[place] + 3) // 4
        _blend(pixels, start + 4 * firsts[place], flat, place * weights.shape[1], num_quads, row, 3 * place)


@_compiled
def _add_row(sums, row, share):
    for j in range(len(sums)):
        sums[j] += np.int32(row[j]) * share


@_compiled
def _round(sums, row):
    for j in range(len(sums)):
        row[j] = min(max(sums[j] >> _BITS, 0), 255)


@_compiled
def _stretch_across_first(pixels, width, firsts, counts, weights, tops, heights, shares, ring, edge, sums, cells):
    """``firsts``, ``counts``, ``weights``: along a row. ``tops``, ``heights``, ``shares``: the same down a column.

    ``ring``: stretched source rows, as many as an output row needs. ``edge``: room for a source row and three pixels.
    """
    side, num_bytes = cells.shape[1], cells.shape[2]
    row = tops[0]
    for line in range(len(tops)):
        while row < tops[line] + heights[line]:
            start = 4 * width * row
            if start + 4 * (width + 3) > len(pixels):  # reading four pixels at once would leave the image
                edge[: 4 * width] = pixels[start : start + 4 * width]
                _stretch_row(edge, 0, firsts, counts, weights, ring[row % len(ring)])
            else:
                _stretch_row(pixels, start, firsts, counts, weights, ring[row % len(ring)])
            row += 1
        columns = len(firsts) // side
        for column in range(columns):
            sums[:] = _HALF
            for k in range(heights[line]):
                part = ring[(tops[line] + k) % len(ring), column * num_bytes : (column + 1) * num_bytes]
                _add_row(sums, part, shares[line, k])
            _round(sums, cells[line // side * columns + column, line % side])


@_compiled
def _stretch_down_first(pixels, width, firsts, counts, weights, tops, heights, shares, stretched, edge, sums, cells):
    """The same in the other order. ``edge`` holds the blended source row, ``stretched`` what becomes of it."""
    side, num_bytes = cells.shape[1], cells.shape[2]
    for line in range(len(tops)):
        sums[:] = _HALF
        for k in range(heights[line]):
            start = 4 * width * (tops[line] + k)
            _add_row(sums, pixels[start : start + 4 * width], shares[line, k])
        _round(sums, edge)
        _stretch_row(edge, 0, firsts, counts, weights, stretched)
        columns = len(firsts) // side
        for column in range(columns):
            part = stretched[column * num_bytes : (column + 1) * num_bytes]
            cells[line // side * columns + column, line % side] = part
