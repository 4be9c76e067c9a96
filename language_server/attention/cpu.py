"""Paged attention on CPUs: tokens that are generated read their history from its blocks, without a copy.

Prompts go through scaled_dot_product_attention (sdpa.py), whose copy of the history is small beside its products.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from language_server.attention.base import AttentionBackend, BatchLayout, LayerCall
from language_server.attention.sdpa import SdpaBackend, SdpaPlan
from language_server.kernels.attention import paged_attention
from language_server.kernels.compiler import as_array, share_threads

_NO_WINDOW = 1 << 62
_NO_SINKS = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """Tables and lengths of the sequences with one token, and what the others need."""

    block_tables: np.ndarray[Any, Any]  # [num_single, max_blocks] int64
    seq_lens: np.ndarray[Any, Any]  # [num_single] int64
    prompts: SdpaPlan


class CpuBackend(AttentionBackend):
    def __init__(self) -> None:
        self._prompts = SdpaBackend(only_prompts=True)

    def plan(self, layout: BatchLayout) -> CpuPlan:
        num_single = layout.num_single
        seq_lens = np.array(layout.seq_lens[:num_single], np.int64)
        return CpuPlan(layout.block_tables.numpy()[:num_single], seq_lens, self._prompts.plan(layout))

    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, plan: CpuPlan, call: LayerCall
    ) -> torch.Tensor:
        num_single, out = len(plan.seq_lens), torch.empty_like(query, memory_format=torch.contiguous_format)
        if num_single:
            share_threads(int(plan.seq_lens.sum()) * key_cache.shape[2] * key_cache.shape[3])
            paged_attention(
                as_array(_rows(query)),
                as_array(key_cache),
                as_array(value_cache),
                plan.block_tables,
                plan.seq_lens,
                call.sliding_window or _NO_WINDOW,
                np.float32(call.scaling),
                _NO_SINKS if call.sinks is None else call.sinks.float().numpy(),
                as_array(out.flatten(1)),
            )
        if num_single < len(query):
            self._prompts.attend_into(out, query, key_cache, value_cache, plan.prompts, call)
        return out


def _rows(query: torch.Tensor) -> torch.Tensor:
    """Query heads [num_tokens, num_heads, head_dim] as rows of contiguous memory, [num_tokens, >= num_heads *
    head_dim]. Heads that lie at the beginning of wider rows stay where they are."""
    width = query.stride(0)
    is_row = query.stride()[1:] == (query.shape[2], 1) and width >= query.shape[1] * query.shape[2]
    if not is_row or query.storage_offset() % max(width, 1):
        return query.reshape(len(query), -1).contiguous()
    return query.as_strided((len(query), width), (width, 1))
