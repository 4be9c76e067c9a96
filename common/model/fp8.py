"""Matrices of float8_e4m3fn with one scale for each block: the fine-grained FP8 of DeepSeek-V3, Qwen3-FP8 and others.

value = eight-bit value x scale of its block. Blocks at the right and lower edge may be smaller. On disk the scales of
``X.weight`` are called ``X.weight_scale_inv``. Knows nothing of files or layers.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPE: Final = torch.float8_e4m3fn
MAX: Final = torch.finfo(DTYPE).max
_FLOAT16_TOP_EXPONENT: Final = 1 << 14
SCALE_SUFFIX: Final = "_scale_inv"

Block = tuple[int, int]
"""Rows and columns that share a scale."""


def scale_shape(rows: int, columns: int, block: Block) -> tuple[int, int]:
    """Shape of the scales of a matrix."""
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(values: Tensor, scales: Tensor, block: Block, *, first_row: int = 0) -> Tensor:
    """``values`` [num_rows, columns] as float32.

    Args:
        scales: float32, of the whole matrix, on the device of ``values``.
        first_row: of the matrix that ``values`` begin with.
    """
    result = _to_float(values)
    rows = torch.arange(first_row, first_row + len(values), device=values.device)
    of_rows = scales.index_select(0, rows.div(block[0], rounding_mode="floor"))  # [num_rows, blocks]
    num_whole = values.shape[1] // block[1]
    edge = num_whole * block[1]
    result[:, :edge].view(len(values), num_whole, block[1]).mul_(of_rows[:, :num_whole, None])
    if edge < values.shape[1]:
        result[:, edge:].mul_(of_rows[:, num_whole:])
    return result


def _to_float(values: Tensor) -> Tensor:
    """As ``values.float()``, which on a CPU converts one by one: 11 ms for 4096 x 1024 on one core, this takes 1.2.

    With its exponent moved into place an FP8 number is a float16 one, only 2 ** 8 times too small. No weight is NaN.
    """
    if values.device.type != "cpu":
        return values.float()
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return bits.bitwise_and_(~_FLOAT16_TOP_EXPONENT).view(torch.float16).float().mul_(256.0)


def quantize(matrix: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """FP8 values like ``matrix`` [rows, columns] and float32 scales, so that each block's largest value is exact."""
    rows, columns = matrix.shape
    num_rows, num_columns = scale_shape(rows, columns, block)
    padded = F.pad(matrix.float(), (0, num_columns * block[1] - columns, 0, num_rows * block[0] - rows))
    blocks = padded.view(num_rows, block[0], num_columns, block[1])
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scales = torch.where(largest > 0, largest / MAX, 1.0)
    values = (blocks / scales).clamp_(-MAX, MAX).to(DTYPE).view_as(padded)
    return values[:rows, :columns].contiguous(), scales[:, 0, :, 0].contiguous()
