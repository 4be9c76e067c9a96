"""Decoder layers through ``torch.compile``, which fuses what lies between the matrix products.

Layers that look alike share one compiled function; paged attention is one operation in it that the compiler does not
look into. Compiling takes tens of seconds, so it is an option, and what it makes is kept between runs. A whole model
would be compiled layer after layer.
"""

# mypy: disable-error-code="no-untyped-call"
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface

from common.model.compiled import keep_compiled
from common.service.errors import ConfigError
from language_server.attention.base import KVCache, LayerCall, write
from language_server.attention.paged import ForwardContext

_NAME: Final = "dvd_paged_compiled"
_steps: list[ForwardContext] = []
"""At most one: what the layers that run now share. The compiler sees tensors only."""


def compile_layers(model: Any, cache: KVCache, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the decoder layers of a ``*ForCausalLM`` compiled when they first run, with ``cache`` as their KV memory.

    ``backend``: of ``torch.compile``. Raises ConfigError for layers that are fused already.
    """
    if not all(hasattr(layer, "self_attn") for layer in model.model.layers):
        raise ConfigError("compile: the layers of this family are fused already; allowed: false")
    keep_compiled()
    torch._dynamo.config.specialize_float = True  # an epsilon is a constant, not an input that comes from the host
    AttentionInterface.register(_NAME, _paged_attention)
    model.config._attn_implementation = _NAME
    for index, layer in enumerate(model.model.layers):
        # As attributes they are inputs of the compiled function. The layer's number would be a constant of it.
        layer.self_attn.key_cache, layer.self_attn.value_cache = cache.keys[index], cache.values[index]
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
    model.model.register_forward_pre_hook(_remember_step, with_kwargs=True)


def _remember_step(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    _steps[:] = [kwargs["paged"]]


def _paged_attention(
    module: Any,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim], positions already rotated in
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As ``paged.paged_attention``."""
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = _attend(*packed, module.key_cache, module.value_cache, s_aux, scaling, sliding_window)
    return out.unsqueeze(0), None


@torch.library.custom_op("dvd::paged_attention", mutates_args=("key_cache", "value_cache"))
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Write the new keys and values [num_tokens, num_kv_heads, head_dim], attend, return the shape of ``query``."""
    (step,) = _steps
    write(key_cache, key, step.layout.slot_mapping)
    write(value_cache, value, step.layout.slot_mapping)
    call = LayerCall(scaling, sliding_window, sinks)
    return step.backend.attend(query, key_cache, value_cache, step.plan, call)


@_attend.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
