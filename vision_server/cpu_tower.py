"""The tower's forward on a CPU: packed products, and between them one pass over memory where torch takes several.

Computes what the modules of internvit.py compute, from their weights; parity of the two is a test. Each result is
rounded once, where the modules round after every operation. Knows nothing of batches and threads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.kernels.compiler import as_array, share_threads
from common.kernels.packed import PackedProduct
from vision_server import kernels
from vision_server.attention import attend


class CpuLayer:
    """One layer.

    Args:
        layer: of internvit.py; its matrices are packed, so that it cannot run by itself any more.
    """

    def __init__(self, layer: Any, activation: str) -> None:
        attention, mlp = layer.attn, layer.mlp
        self.norm1, self.norm2 = Norm(layer.norm1), Norm(layer.norm2)
        self.scale1, self.scale2 = as_array(layer.ls1.data), as_array(layer.ls2.data)
        self._num_heads: int = attention.num_heads
        self._head_norms = [
            Norm(norm) for norm in (attention.q_norm, attention.k_norm) if not isinstance(norm, nn.Identity)
        ]
        self._qkv, self._proj = pack_in_place(attention.qkv), pack_in_place(attention.proj)
        self._fc1, self._fc2 = pack_in_place(mlp.fc1, activation), pack_in_place(mlp.fc2)

    def attend(self, normed: Tensor, num_tiles: int) -> Tensor:
        """[num_tiles * num_tokens, hidden] -> the same."""
        qkv = self._qkv(normed)
        for index, norm in enumerate(self._head_norms):
            norm.in_place(qkv, index * normed.shape[1])
        heads = qkv.view(num_tiles, -1, 3, self._num_heads, normed.shape[1] // self._num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        return self._proj(attend(query, key, value).flatten(0, 1))

    def think(self, normed: Tensor) -> Tensor:
        """[num_rows, hidden] -> the same."""
        return self._fc2(self._fc1(normed))


class Norm:
    """A LayerNorm or RMSNorm of torch, alone or behind the residual that it follows."""

    def __init__(self, norm: Any) -> None:
        weight = norm.weight.data
        self._is_centred = isinstance(norm, nn.LayerNorm)
        self._weight = as_array(weight)
        self._bias = as_array(norm.bias.data if self._is_centred else torch.zeros_like(weight))
        self._eps = np.float32(norm.eps)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[num_rows, size] -> the same."""
        out = torch.empty_like(hidden)
        self._norm(hidden, 0, out)
        return out

    def in_place(self, rows: Tensor, first: int) -> None:
        """Of the columns from ``first`` on, as many as the norm has weights."""
        self._norm(rows, first, rows)

    def after_adding(self, hidden: Tensor, delta: Tensor, scale: np.ndarray[Any, Any]) -> Tensor:
        """Adds ``delta * scale`` to ``hidden`` in place and returns the norm of the sum; all [num_rows, size]."""
        out = torch.empty_like(hidden)
        share_threads(hidden.numel())
        arrays = (as_array(hidden), as_array(delta), scale, self._weight, self._bias)
        kernels.add_scaled_and_norm(*arrays, self._is_centred, self._eps, as_array(out))
        return out

    def _norm(self, rows: Tensor, first: int, out: Tensor) -> None:
        share_threads(rows.numel())
        arrays = (as_array(rows), first, self._weight, self._bias)
        kernels.norm(*arrays, self._is_centred, self._eps, as_array(out))


class PatchProduct:
    """The patch embedding: a convolution whose windows do not overlap is one product."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        self._side = convolution.kernel_size[0]
        self._product = pack_in_place(convolution)

    def __call__(self, pixels: Tensor) -> Tensor:
        """[num_tiles, num_channels, S, S] -> [num_tiles, patches, hidden]."""
        num_tiles, num_channels, height, width = pixels.shape
        num_patches = (height // self._side) * (width // self._side)
        patches = pixels.new_empty(num_tiles * num_patches, num_channels * self._side**2)
        share_threads(patches.numel())
        kernels.cut_patches(as_array(pixels.contiguous()), self._side, as_array(patches))
        return self._product(patches).view(num_tiles, num_patches, -1)


def pack_in_place(module: Any, activation: str = "") -> PackedProduct:
    """A Linear or Conv2d as a product. The module has the packed weight afterwards, which only the product can use, so
    that memory holds it once."""
    product = PackedProduct(module.weight.data.flatten(1), module.bias, activation)
    module.weight = nn.Parameter(product.weight, requires_grad=False)
    return product


def run_layers(layers: Sequence[CpuLayer], hidden: Tensor, on_layer: Callable[[], None]) -> Tensor:
    """Hidden states [num_tiles, num_tokens, hidden], which are overwritten, through all layers."""
    rows = hidden.flatten(0, 1)
    normed = layers[0].norm1(rows) if layers else rows
    for index, layer in enumerate(layers):
        normed = layer.norm2.after_adding(rows, layer.attend(normed, len(hidden)), layer.scale1)
        thought = layer.think(normed)
        if index + 1 < len(layers):
            normed = layers[index + 1].norm1.after_adding(rows, thought, layer.scale2)
        else:
            share_threads(rows.numel())
            kernels.add_scaled(as_array(rows), as_array(thought), layer.scale2)
        on_layer()
    return hidden
