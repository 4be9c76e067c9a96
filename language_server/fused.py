"""Decoder layers of the Qwen2 and Qwen3 families in fewer operations, for devices where each operation costs.

transformers' layers are written for reading; on a CPU with a small batch, launching their hundred small operations
takes as long as the arithmetic. These compute the same with a third of them: one product for query, key and
value, one for gate and up, one pass of norm and rotation over query and key heads together. Parity with transformers
is a test.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from language_server.attention.base import LayerCall
from language_server.attention.paged import ForwardContext
from language_server.packed_linear import PackedLinear

FUSED_MODEL_TYPES: Final = frozenset({"qwen2", "qwen3"})


def can_fuse(config: Any) -> bool:
    """Whether every layer of this text config is one that ``fuse_layers`` knows."""
    return config.model_type in FUSED_MODEL_TYPES and config.hidden_act == "silu"


def fuse_layers(model: Any) -> None:
    """Replace the decoder layers of a loaded ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM``.

    One at a time, and the original is dropped: beyond the weights, memory holds one layer's.
    """
    decoder = model.model
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = _FusedDecoderLayer(layer)
    decoder.rotary_emb = _SignedRotary(decoder.rotary_emb)
    decoder.norm = _FusedRMSNorm(decoder.norm)


class _FusedRMSNorm(nn.Module):
    """Root-mean-square norm by one call of the layer norm kernel: ``[x, -x]`` has mean 0 and variance ``mean(x ** 2)``.

    Rounds once, from float32, where transformers rounds before it multiplies by the weight.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps: float = norm.variance_epsilon
        self.twice = torch.cat([norm.weight.data, norm.weight.data])

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] -> the same, a view with the rows twice as far apart."""
        return _rms_norm(hidden, self.twice, self.eps)


class _SignedRotary(nn.Module):
    """The model's rotary embedding, with the sign of ``rotate_half`` moved into the sine."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine, [num_tokens, 1, head_dim] each."""
        cos, sin = self.rotary(hidden, position_ids)
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        return cos[0].unsqueeze(1), signed[0].unsqueeze(1)


class _FusedDecoderLayer(nn.Module):
    """One layer. Takes and returns packed hidden states, [1, num_tokens, hidden_size], as the original does."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.call = LayerCall(attention.scaling, attention.sliding_window, None)
        self.input_norm = _FusedRMSNorm(layer.input_layernorm)
        self.mlp_norm = _FusedRMSNorm(layer.post_attention_layernorm)
        self.qkv = _merge(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _merge(attention.o_proj)
        self.gate_up = _merge(mlp.gate_proj, mlp.up_proj)
        self.down = _merge(mlp.down_proj)
        self.qk_norm, self.qk_eps = self._merge_head_norms(attention)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        paged: ForwardContext,
        **_: Any,
    ) -> Tensor:
        hidden = hidden_states[0]
        hidden = self._attend(hidden, position_embeddings, paged)
        return self._think(hidden).unsqueeze(0)

    def _attend(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: ForwardContext) -> Tensor:
        num_rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv(self.input_norm(hidden)).view(len(hidden), num_rotated + self.num_kv_heads, self.head_dim)
        rotated = self._rotate(heads[:, :num_rotated], *position_embeddings)
        key, value = rotated[:, self.num_heads :], heads[:, num_rotated:]
        paged.cache.write(self.index, key, value, paged.layout.slot_mapping)
        keys, values = paged.cache.keys[self.index], paged.cache.values[self.index]
        out = paged.backend.attend(rotated[:, : self.num_heads], keys, values, paged.plan, self.call)
        attended: Tensor = self.out(out.flatten(1))
        return hidden + attended

    def _rotate(self, heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        """Norm, where the family has one, and rotation of query and key heads, [num_tokens, num_heads, head_dim]."""
        if self.qk_norm is not None:
            heads = _rms_norm(heads, None, self.qk_eps) * self.qk_norm
        halves_swapped = heads.roll(self.head_dim // 2, dims=-1)
        return torch.addcmul(heads * cos, halves_swapped, signed_sin)

    def _think(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        thought: Tensor = self.down(F.silu(gate).mul_(up))
        return hidden + thought

    def _merge_head_norms(self, attention: Any) -> tuple[Tensor | None, float]:
        """Weights of the query and key heads' norms, [num_heads + num_kv_heads, head_dim]; Qwen2 has none."""
        if not hasattr(attention, "q_norm"):
            return None, 0.0
        query, key = attention.q_norm.weight, attention.k_norm.weight
        rows = [query.expand(self.num_heads, -1), key.expand(self.num_kv_heads, -1)]
        return torch.cat(rows), attention.q_norm.variance_epsilon


def _rms_norm(values: Tensor, weight_twice: Tensor | None, eps: float) -> Tensor:
    size = values.shape[-1]
    both = torch.cat([values, -values], dim=-1)
    return F.layer_norm(both, (2 * size,), weight_twice, None, eps)[..., :size]


def _merge(*linears: nn.Linear) -> PackedLinear:
    """Several projections of the same input as one. The originals give up their weights."""
    weight = torch.cat([linear.weight.data for linear in linears])
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    for linear in linears:
        del linear.weight
    return PackedLinear(weight, torch.cat(biases) if biases else None)
