"""The bridge into transformers: every attention layer of a text model calls ``paged_attention`` instead of its own.

Registered once under ``NAME``. No mask function is registered for it, which transformers takes to mean that the backend
needs no mask (``masking_utils``, "TGI/vLLM backends"): positions and lengths come with ``ForwardContext``.
"""

# mypy: disable-error-code="no-untyped-call"
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from language_server.attention.base import AttentionBackend, BatchLayout, DecodeLayout, KVCache, LayerCall

NAME = "dvd_paged"


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What the attention layers of one step share. Travels to them as the keyword ``paged``."""

    layout: BatchLayout | DecodeLayout
    cache: KVCache
    backend: AttentionBackend
    plan: Any

    @classmethod
    def of(cls, layout: BatchLayout | DecodeLayout, cache: KVCache, backend: AttentionBackend) -> "ForwardContext":
        plan = backend.plan(layout) if isinstance(layout, BatchLayout) else backend.plan_decode(layout)
        return cls(layout, cache, backend, plan)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim], positions already rotated in
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: ForwardContext,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values, attend, return [1, num_tokens, num_heads, head_dim]."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    cache = paged.cache
    cache.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), paged.layout.slot_mapping)
    out = paged.backend.attend(
        query[0].transpose(0, 1),
        cache.keys[layer],
        cache.values[layer],
        paged.plan,
        LayerCall(scaling, sliding_window, s_aux),
    )
    return out.unsqueeze(0), None


def register() -> None:
    AttentionInterface.register(NAME, paged_attention)
