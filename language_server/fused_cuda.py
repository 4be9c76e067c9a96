"""Decoder layers of the Qwen2, Qwen3 and InternLM3 families in ten launches, for GPUs.

Between small batches and the memory that holds the weights stand dozens of launches that transformers' layers make for
each token. These make one product for query, key and value and one for gate and up, let two products add to the hidden
states themselves, and leave the rest to kernels of our own. fused.py is the same thought for CPUs. Parity with
transformers is a test, in Triton's interpreter.
"""

import importlib
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language_server.attention.base import LayerCall
from language_server.attention.paged import ForwardContext

_TILE: Final = 1024  # columns that one program of an elementwise kernel computes


def fuse_layers_for_cuda(model: Any) -> None:
    """Replace the decoder layers of a loaded ``*ForCausalLM`` that ``fused.can_fuse``. Needs Triton.

    One at a time, and the original is dropped: beyond the weights, memory holds one layer's.
    """
    kernels = importlib.import_module("language_server.kernels.triton_layers")
    decoder = model.model
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = _FusedDecoderLayer(layer, kernels)
    decoder.norm = _FusedRMSNorm(decoder.norm, kernels)


class _FusedRMSNorm(nn.Module):
    def __init__(self, norm: Any, kernels: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._eps: float = norm.variance_epsilon
        self._kernels = kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        rows = hidden.flatten(0, -2).contiguous()
        out, width = torch.empty_like(rows), rows.shape[1]
        num_warps = 8 if width > _TILE else 4
        self._kernels.rms_norm[len(rows),](
            rows, self.weight, out, self._eps, WIDTH=width, WIDTH_PAD=_padded(width), num_warps=num_warps
        )
        return out.view(hidden.shape)


class _Product(nn.Module):
    """Several projections of the same input as one. The originals give up their weights."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), requires_grad=False)
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        for linear in linears:
            del linear.weight

    def forward(self, rows: Tensor) -> Tensor:
        """[num_rows, in_features] -> [num_rows, out_features]."""
        return F.linear(rows, self.weight, self.bias)

    def add_to(self, hidden: Tensor, rows: Tensor) -> None:
        """Adds the product to ``hidden`` [num_rows, out_features], within the product's own launch."""
        hidden.addmm_(rows, self.weight.t())
        if self.bias is not None:
            hidden.add_(self.bias)


class _FusedDecoderLayer(nn.Module):
    """One layer. Takes and returns packed hidden states, [1, num_tokens, hidden_size], as the original does."""

    def __init__(self, layer: Any, kernels: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.call = LayerCall(attention.scaling, getattr(attention, "sliding_window", None), None)
        self.input_norm = _FusedRMSNorm(layer.input_layernorm, kernels)
        self.mlp_norm = _FusedRMSNorm(layer.post_attention_layernorm, kernels)
        self.qkv = _Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _Product(attention.o_proj)
        self.gate_up = _Product(mlp.gate_proj, mlp.up_proj)
        self.down = _Product(mlp.down_proj)
        self.head_norms, self._head_eps = _head_norms(attention)
        self._kernels = kernels

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: ForwardContext, **_: Any
    ) -> Tensor:
        hidden = hidden_states[0]
        hidden = hidden.clone() if self.index == 0 else hidden  # the first layer's input belongs to the caller
        self.out.add_to(hidden, self._attend(self.input_norm(hidden), position_embeddings, paged))
        self.down.add_to(hidden, self._gate(self.gate_up(self.mlp_norm(hidden))))
        return hidden.unsqueeze(0)

    def _attend(self, normed: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: ForwardContext) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, num_heads * head_dim]."""
        qkv = self.qkv(normed).view(len(normed), -1, self.head_dim)
        cos, sin = (each[0].contiguous() for each in position_embeddings)
        keys, values = paged.cache.keys[self.index], paged.cache.values[self.index]
        half = self.head_dim // 2
        self._kernels.rotate_and_cache[len(qkv), qkv.shape[1]](
            qkv,
            qkv if self.head_norms is None else self.head_norms,
            cos,
            sin,
            paged.layout.slot_mapping,
            keys,
            values,
            self._head_eps,
            HAS_NORMS=self.head_norms is not None,
            NUM_HEADS=self.num_heads,
            NUM_KV_HEADS=self.num_kv_heads,
            HALF=half,
            HALF_PAD=_padded(half),
            num_warps=1,
        )
        return paged.backend.attend(qkv[:, : self.num_heads], keys, values, paged.plan, self.call).flatten(1)

    def _gate(self, gate_up: Tensor) -> Tensor:
        """[num_tokens, 2 * intermediate_size] -> [num_tokens, intermediate_size]."""
        num_tokens, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(num_tokens, width)
        self._kernels.silu_and_multiply[num_tokens, -(-width // _TILE)](gate_up, out, WIDTH=width, TILE=_TILE)
        return out


def _head_norms(attention: Any) -> tuple[nn.Parameter | None, float]:
    """Weights of the norms of query and key heads, [2, head_dim]; only Qwen3 has some."""
    if not hasattr(attention, "q_norm"):
        return None, 0.0
    query, key = attention.q_norm, attention.k_norm
    return nn.Parameter(torch.stack([query.weight.data, key.weight.data]), requires_grad=False), query.variance_epsilon


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()
