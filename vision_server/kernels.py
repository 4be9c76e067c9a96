"""What a layer of the tower does around its matrix products, one pass over the rows each."""

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import njit, prange

from common.kernels.compiler import kernel
from common.kernels.numbers import narrow, widen


@kernel
def cut_patches(pixels, side, out):
    """Squares of ``side`` pixels, row-major, as rows that a patch embedding multiplies.

    Args:
        pixels: [num_tiles, num_channels, S, S].
        out: [num_tiles * (S // side)**2, num_channels * side**2].
    """
    num_channels, num_across = pixels.shape[1], pixels.shape[3] // side
    num_patches = (pixels.shape[2] // side) * num_across
    for place in prange(len(out)):
        tile, patch = place // num_patches, place % num_patches
        top, left = patch // num_across * side, patch % num_across * side
        for channel in range(num_channels):
            for row in range(side):
                first = (channel * side + row) * side
                out[place, first : first + side] = pixels[tile, channel, top + row, left : left + side]


@kernel
def norm(hidden, first, weight, bias, is_centred, eps, out):
    """Layer norm, or root-mean-square norm where not ``is_centred``, of some columns; rounded once.

    Args:
        hidden: [num_rows, >= first + size], of which columns from ``first`` on are read.
        weight, bias: [size]; the bias may be zeros.
        eps: float32.
        out: like ``hidden``, and may be it: the same columns are written.
    """
    size = len(weight)
    for row in prange(len(hidden)):
        _norm_row(hidden[row, first : first + size], weight, bias, is_centred, eps, out[row, first : first + size])


@kernel
def add_scaled(hidden, delta, scale):
    """``hidden += delta * scale`` in place: a residual behind layer scale. [num_rows, size] twice, and [size]."""
    for row in prange(len(hidden)):
        _add_row(hidden[row], delta[row], scale)


@kernel
def add_scaled_and_norm(hidden, delta, scale, weight, bias, is_centred, eps, out):
    """``add_scaled``, then ``norm`` of the sum, as it was rounded, into ``out``: all columns of all rows."""
    for row in prange(len(hidden)):
        _add_row(hidden[row], delta[row], scale)
        _norm_row(hidden[row], weight, bias, is_centred, eps, out[row])


@kernel
def put_scaled(rows, scale, first, out):
    """``rows * scale`` into columns of ``out`` from ``first`` on: [num_rows, size], [num_rows, 1] float32."""
    size = rows.shape[1]
    for row in prange(len(rows)):
        source, target = rows[row], out[row, first : first + size]  # indices that begin at 0 make loops that vectorise
        for i in range(size):
            target[i] = narrow(widen(source[i]) * scale[row, 0], rows[0, 0])


@njit(inline="always")
def _add_row(hidden, delta, scale):
    for i in range(len(hidden)):
        hidden[i] = narrow(widen(hidden[i]) + widen(delta[i]) * widen(scale[i]), hidden[0])


@njit(inline="always")
def _norm_row(hidden, weight, bias, is_centred, eps, out):
    """Deviations are summed after the mean is known: no difference of two large sums."""
    size = len(weight)
    mean = squares = np.float32(0.0)
    if is_centred:
        for i in range(size):
            mean += widen(hidden[i])
        mean /= np.float32(size)
    for i in range(size):
        deviation = widen(hidden[i]) - mean
        squares += deviation * deviation
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
    for i in range(size):
        out[i] = narrow((widen(hidden[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]), weight[0])
