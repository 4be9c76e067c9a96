"""Paged attention on CPUs: tokens that are generated read their history from its blocks, without a copy.

Prompts copy it, which is little beside their products. Those of bfloat16 prompts go to the matrix kernels, with a
softmax of our own between them; float32 and very short ones to scaled_dot_product_attention (sdpa.py).
"""

from dataclasses import dataclass
from operator import mul
from typing import Any

import numpy as np
import torch

from common.kernels.compiler import as_array, share_threads
from common.kernels.softmax import NO_SINKS, NO_WINDOW, softmax_without_division
from language_server.attention.base import AttentionBackend, BatchLayout, LayerCall
from language_server.attention.sdpa import SdpaBackend, SdpaPlan
from language_server.kernels.attention import paged_attention

_QUERIES_AT_ONCE = 256  # of a prompt: their scores stay in the processor's cache, and few lie above the diagonal
_TASKS_PER_THREAD = 2  # of sequences that generate: their histories differ in length
_MIN_SCORES = 1 << 16  # of a prompt, from which the matrix kernels win (measured with 8 heads of 64)


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """Tables and lengths of the sequences with one token, and what the others need."""

    block_tables: np.ndarray[Any, Any]  # [num_single, max_blocks] int64
    seq_lens: np.ndarray[Any, Any]  # [num_single] int64
    prompts: SdpaPlan
    slots: dict[int, torch.Tensor]  # cache slots of each longer sequence's tokens, by its place in the batch


class CpuBackend(AttentionBackend):
    def __init__(self) -> None:
        self._prompts = SdpaBackend(only_prompts=True)

    def plan(self, layout: BatchLayout) -> CpuPlan:
        num_single = layout.num_single
        seq_lens = np.array(layout.seq_lens[:num_single], np.int64)
        return CpuPlan(layout.block_tables.numpy()[:num_single], seq_lens, self._prompts.plan(layout), {})

    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, plan: CpuPlan, call: LayerCall
    ) -> torch.Tensor:
        num_single, out = len(plan.seq_lens), torch.empty_like(query, memory_format=torch.contiguous_format)
        if num_single:
            num_kv_heads, head_dim = key_cache.shape[2:]
            num_threads = share_threads(int(plan.seq_lens.sum()) * num_kv_heads * head_dim)
            paged_attention(
                as_array(_rows(query)),
                as_array(key_cache.flatten(2)),
                as_array(value_cache.flatten(2)),
                plan.block_tables,
                plan.seq_lens,
                head_dim,
                _num_parts(num_single, num_kv_heads, num_threads),
                call.sliding_window or NO_WINDOW,
                np.float32(call.scaling),
                _sinks(call),
                as_array(out.flatten(1)),
            )
        if num_single < len(query):
            self._attend_prompts(out, query, key_cache, value_cache, plan, call)
        return out

    def _attend_prompts(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: CpuPlan,
        call: LayerCall,
    ) -> None:
        layout = plan.prompts.layout
        num_scores = max(map(mul, layout.query_lens, layout.seq_lens)) * query.shape[1]
        if query.dtype != torch.bfloat16 or num_scores < _MIN_SCORES:
            self._prompts.attend_into(out, query, key_cache, value_cache, plan.prompts, call)
            return
        start = layout.num_single
        for row in range(layout.num_single, len(layout.query_lens)):
            tokens = slice(start, start + layout.query_lens[row])
            if row not in plan.slots:
                plan.slots[row] = layout.slots(row)
            keys, values = (c.flatten(0, 1).index_select(0, plan.slots[row]) for c in (key_cache, value_cache))
            _attend_prompt(out[tokens], query[tokens], keys.transpose(0, 1), values.transpose(0, 1), call)
            start = tokens.stop


def _attend_prompt(
    out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> None:
    """One sequence: ``query`` and ``out`` [num_queries, num_heads, head_dim], the others [num_kv_heads, num_keys,
    head_dim]. The heads that share a KV head are its queries, so nothing is repeated."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, num_keys, _ = keys.shape
    for start in range(0, num_queries, _QUERIES_AT_ONCE):
        rows = query[start : start + _QUERIES_AT_ONCE]
        end = num_keys - num_queries + start + len(rows)
        grouped = (
            rows.view(len(rows), num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
        )
        scores = torch.bmm(grouped, keys[:, :end].transpose(1, 2))
        inverse_sums = torch.empty(num_heads * len(rows), 1)
        share_threads(scores.numel())
        softmax_without_division(
            as_array(scores.flatten(0, 1)),
            np.float32(call.scaling),
            len(rows),
            end - len(rows),
            call.sliding_window or NO_WINDOW,
            _sinks(call),
            inverse_sums.numpy(),
        )
        mixed = torch.bmm(scores, values[:, :end]).view(num_heads, len(rows), head_dim)
        torch.mul(mixed, inverse_sums.view(num_heads, -1, 1), out=out[start : start + len(rows)].transpose(0, 1))


def _num_parts(num_seqs: int, num_kv_heads: int, num_threads: int) -> int:
    """Into how many parts to divide each sequence's KV heads: as few as give every thread some tasks to choose from."""
    wanted = 1 if num_threads == 1 else num_threads * _TASKS_PER_THREAD
    divisors = (parts for parts in range(1, num_kv_heads + 1) if num_kv_heads % parts == 0)
    return next((parts for parts in divisors if num_seqs * parts >= wanted), num_kv_heads)


def _sinks(call: LayerCall) -> np.ndarray[Any, Any]:
    """[num_heads] float32; empty: none."""
    return NO_SINKS if call.sinks is None else call.sinks.float().numpy()  # type: ignore[no-any-return]


def _rows(query: torch.Tensor) -> torch.Tensor:
    """Query heads [num_tokens, num_heads, head_dim] as rows of contiguous memory, [num_tokens, >= num_heads *
    head_dim]. Heads that lie at the beginning of wider rows stay where they are."""
    width = query.stride(0)
    is_row = query.stride()[1:] == (query.shape[2], 1) and width >= query.shape[1] * query.shape[2]
    if not is_row or query.storage_offset() % max(width, 1):
        return query.reshape(len(query), -1).contiguous()
    return query.as_strided((len(query), width), (width, 1))
