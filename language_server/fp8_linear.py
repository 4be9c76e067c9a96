"""A linear layer whose weight stays FP8, with a scale for each block: half the memory of bfloat16.

Where torch has a product for it (cuBLAS, compute capability 9.0), activations become FP8, too, with a scale for each
128 of a row, as fine-grained FP8 checkpoints expect. Elsewhere the weight is dequantised each time it is used, exactly
as it would have been once while loading. transformers has such a layer as well, but its kernels are downloaded by the
server when it first runs, and it has none for a CPU.
"""

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.model import fp8

BLOCK: Final[fp8.Block] = (128, 128)
"""What published checkpoints have, and the only block of a weight that cuBLAS multiplies."""
_ALIGNMENT: Final = 4
"""cuBLAS wants rows, and a row's blocks, in multiples of it."""
_TINY: Final = 1e-12


class Fp8Linear(nn.Module):
    """Takes the place of ``linear``: the same shape, bias and device."""

    def __init__(self, linear: nn.Linear, block: fp8.Block, can_multiply: bool) -> None:
        super().__init__()
        self.block = block
        rows, columns = linear.weight.shape
        self.can_multiply = can_multiply and block == BLOCK and rows % block[0] == columns % block[1] == 0
        values = torch.empty(rows, columns, dtype=fp8.DTYPE, device=linear.weight.device)
        shape = fp8.scale_shape(rows, columns, block)
        scales = torch.empty(shape, dtype=torch.float32, device=linear.weight.device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.can_multiply:
            product = _multiply(rows.flatten(0, -2), self.weight, self.weight_scale_inv)
            product = product if self.bias is None else product.add_(self.bias)
            return product.view(*rows.shape[:-1], -1)
        weight = fp8.dequantize(self.weight, self.weight_scale_inv, self.block).to(rows.dtype)
        return F.linear(rows, weight, self.bias)


class Fp8Sink:
    """Quantises a weight while it is read. See ``common.model.checkpoint.RowSink``."""

    def __init__(self, linear: Fp8Linear) -> None:
        self._linear = linear
        self.row_multiple = linear.block[0]

    def put(self, first_row: int, rows: Tensor) -> None:
        """Rows [num_rows, in_features] of the weight."""
        weight, scales, block = self._linear.weight, self._linear.weight_scale_inv, self._linear.block
        its_values, its_scales = fp8.quantize(rows.to(weight.device), block)
        first_block = first_row // block[0]
        weight[first_row : first_row + len(rows)] = its_values
        scales[first_block : first_block + len(its_scales)] = its_scales


@lru_cache(maxsize=8)
def can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FP8 weights are multiplied as they are, with activations of ``dtype``. Found out by trying."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    try:
        rows, weight = torch.ones(1, 128, dtype=dtype, device=device), torch.ones(128, 128, device=device)
        _multiply(rows, *fp8.quantize(weight, BLOCK))
        torch.cuda.synchronize(device)
    # A release, a card or a cuBLAS without it: torch says so in each of these.
    except (AttributeError, RuntimeError, ValueError):
        return False
    return True


def _multiply(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """[num_rows, in] bfloat16 x [out, in] FP8 -> [num_rows, out] bfloat16; in and out are multiples of 128."""
    missing, missing_scales = -len(rows) % _ALIGNMENT, -scales.shape[1] % _ALIGNMENT  # padding by none would copy
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    scales = F.pad(scales, (0, missing_scales)) if missing_scales else scales
    groups = padded.view(len(padded), -1, BLOCK[1]).float()
    its_scales = groups.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY).div_(fp8.MAX)
    values = (groups / its_scales).to(fp8.DTYPE).flatten(1)
    product = F.scaled_mm(
        values,
        weight.t(),
        its_scales.squeeze(-1).t().contiguous().t(),  # cuBLAS reads both scales column by column
        F.ScalingType.BlockWise1x128,
        scales.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=rows.dtype,
    )
    return product[: len(rows)]
