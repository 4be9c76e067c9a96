"""Decoder layers of the Qwen2, Qwen3 and InternLM3 families in fewer operations, for CPUs, where each operation costs.

transformers' layers are written for reading; on a CPU with a small batch, launching their hundred small operations
takes as long as the arithmetic. These compute the same in nine: four matrix products, one of them for query, key and
value and one for gate and up, and kernels between them. Parity with transformers is a test.
"""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from common.kernels.compiler import as_array, share_threads
from language_server.attention.base import LayerCall
from language_server.attention.paged import ForwardContext
from language_server.kernels import layers
from language_server.packed_linear import PackedLinear

FUSED_MODEL_TYPES: Final = frozenset({"internlm3", "qwen2", "qwen3"})


def can_fuse(config: Any) -> bool:
    """Whether every layer of this text config is one that ``fuse_layers`` knows."""
    return config.model_type in FUSED_MODEL_TYPES and config.hidden_act == "silu"


def fuse_layers(model: Any) -> None:
    """Replace the decoder layers of a loaded ``*ForCausalLM`` of these families on a CPU.

    One at a time, and the original is dropped: beyond the weights, memory holds one layer's.
    """
    decoder = model.model
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = _FusedDecoderLayer(layer)
    decoder.rotary_emb = _SignedRotary(decoder.rotary_emb)
    decoder.norm = _FusedRMSNorm(decoder.norm)


class _FusedRMSNorm(nn.Module):
    """Root-mean-square norm that rounds once, where transformers rounds before it multiplies by the weight."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._weight = as_array(norm.weight.data)
        self._eps = np.float32(norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        rows = hidden.flatten(0, -2).contiguous()
        out = torch.empty_like(rows)
        share_threads(rows.numel())
        layers.rms_norm(as_array(rows), self._weight, self._eps, as_array(out))
        return out.view(hidden.shape)

    def after_adding(self, delta: Tensor, hidden: Tensor) -> Tensor:
        """Adds ``delta`` to ``hidden`` in place and returns the norm of the sum; all [num_tokens, hidden_size]."""
        out = torch.empty_like(hidden)
        layers.add_rms_norm(as_array(hidden), as_array(delta), self._weight, self._eps, as_array(out))
        return out


class _SignedRotary(nn.Module):
    """The model's rotary embedding, with the sign of ``rotate_half`` moved into the sine."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Cosine and signed sine, [num_tokens, head_dim] each."""
        cos, sin = self.rotary(hidden, position_ids)
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        return as_array(cos[0].contiguous()), as_array(signed[0])


class _FusedDecoderLayer(nn.Module):
    """One layer. Takes and returns packed hidden states, [1, num_tokens, hidden_size], as the original does."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.num_heads: int = config.num_attention_heads
        self.call = LayerCall(attention.scaling, getattr(attention, "sliding_window", None), None)
        self.input_norm = _FusedRMSNorm(layer.input_layernorm)
        self.mlp_norm = _FusedRMSNorm(layer.post_attention_layernorm)
        self.qkv = _merge(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _merge(attention.o_proj)
        self.gate_up = _merge(mlp.gate_proj, mlp.up_proj)
        self.down = _merge(mlp.down_proj)
        self._head_norms, self._head_eps = _head_norms(attention, layer.input_layernorm.weight)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
        paged: ForwardContext,
        **_: Any,
    ) -> Tensor:
        hidden = hidden_states[0]
        attended = self.out(self._attend(self.input_norm(hidden), position_embeddings, paged))
        hidden = hidden.clone() if self.index == 0 else hidden  # the first layer's input belongs to the caller
        thought = self.down(self._gate(self.gate_up(self.mlp_norm.after_adding(attended, hidden))))
        return hidden.add_(thought).unsqueeze(0)

    def _attend(
        self,
        normed: Tensor,
        position_embeddings: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
        paged: ForwardContext,
    ) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, num_heads * head_dim]."""
        qkv = self.qkv(normed)
        keys, values = paged.cache.keys[self.index], paged.cache.values[self.index]
        layers.rotate_and_cache(
            as_array(qkv),
            self._head_norms,
            self._head_eps,
            *position_embeddings,
            paged.layout.slot_mapping.numpy(),
            as_array(keys.flatten(0, 1)),
            as_array(values.flatten(0, 1)),
        )
        query = qkv.view(len(qkv), -1, self.head_dim)[:, : self.num_heads]
        return paged.backend.attend(query, keys, values, paged.plan, self.call).flatten(1)

    def _gate(self, gate_up: Tensor) -> Tensor:
        """[num_tokens, 2 * intermediate_size] -> [num_tokens, intermediate_size]."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        layers.silu_and_multiply(as_array(gate_up), as_array(out))
        return out


def _head_norms(attention: Any, like: Tensor) -> tuple[np.ndarray[Any, Any], np.float32]:
    """Weights of the query and key heads' norms, [num_heads + num_kv_heads, head_dim]; only Qwen3 has some."""
    if not hasattr(attention, "q_norm"):
        return as_array(like.data.new_empty(0, attention.head_dim)), np.float32(0.0)
    query, key, config = attention.q_norm, attention.k_norm, attention.config
    rows = [query.weight.expand(config.num_attention_heads, -1), key.weight.expand(config.num_key_value_heads, -1)]
    return as_array(torch.cat(rows).detach()), np.float32(query.variance_epsilon)


def _merge(*linears: nn.Linear) -> PackedLinear:
    """Several projections of the same input as one. The originals give up their weights."""
    weight = torch.cat([linear.weight.data for linear in linears])
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    for linear in linears:
        del linear.weight
    return PackedLinear(weight, torch.cat(biases) if biases else None)
