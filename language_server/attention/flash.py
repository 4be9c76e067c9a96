"""Paged attention through flash-attn's CUDA kernels, for servers that have it installed.

Reads the blocks where they lie. Source of the calls: Dao-AILab/flash-attention, ``flash_attn_interface.py``.
"""

import importlib.util
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from language_server.attention.base import AttentionBackend, BatchLayout, DecodeLayout, LayerCall
from language_server.transfer import to_device


def is_available() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True, slots=True)
class FlashPlan:
    is_decode: bool  # one query token per sequence
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    seq_lens: torch.Tensor  # [num_seqs] int32
    query_starts: torch.Tensor  # [num_seqs + 1] int32
    key_starts: torch.Tensor  # [num_seqs + 1] int32
    max_query_len: int
    max_seq_len: int


class FlashBackend(AttentionBackend):
    block_size = 256  # flash-attn 2 pages KV in multiples of 256 tokens only
    can_capture = True

    def __init__(self) -> None:
        interface = importlib.import_module("flash_attn")
        self._varlen: Any = interface.flash_attn_varlen_func
        self._with_kvcache: Any = interface.flash_attn_with_kvcache

    def plan(self, layout: BatchLayout) -> FlashPlan:
        seq_lens = to_device(layout.seq_lens, layout.device, torch.int32)
        return FlashPlan(
            is_decode=layout.num_single == len(layout.query_lens),
            block_tables=layout.block_tables.to(torch.int32),
            seq_lens=seq_lens,
            query_starts=_starts(layout.query_lens, layout.device),
            key_starts=_starts(layout.seq_lens, layout.device),
            max_query_len=max(layout.query_lens),
            max_seq_len=max(layout.seq_lens),
        )

    def plan_decode(self, layout: DecodeLayout) -> FlashPlan:
        seq_lens = layout.seq_lens
        nothing = seq_lens.new_empty(0)
        return FlashPlan(True, layout.block_tables, seq_lens, nothing, nothing, 1, 0)

    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, plan: FlashPlan, call: LayerCall
    ) -> torch.Tensor:
        window = (-1, -1) if call.sliding_window is None else (call.sliding_window - 1, 0)
        attend = self._attend_decode if plan.is_decode else self._attend_mixed
        out, lse = attend(query, key_cache, value_cache, plan, call.scaling, window)
        if call.sinks is None:
            return out
        # A sink adds exp(sink) to the softmax denominator and nothing to its numerator.
        return out * torch.sigmoid(lse - call.sinks.float()).unsqueeze(-1).to(out.dtype)

    def _attend_decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: FlashPlan, scale: float, window: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._with_kvcache(
            query.unsqueeze(1),
            keys,
            values,
            cache_seqlens=plan.seq_lens,
            block_table=plan.block_tables,
            softmax_scale=scale,
            causal=True,
            window_size=window,
            return_softmax_lse=True,
        )
        return out.squeeze(1), lse.squeeze(-1)  # lse [num_seqs, num_heads, 1]

    def _attend_mixed(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: FlashPlan, scale: float, window: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _ = self._varlen(
            query.contiguous(),
            keys,
            values,
            cu_seqlens_q=plan.query_starts,
            cu_seqlens_k=plan.key_starts,
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=window,
            return_attn_probs=True,
            block_table=plan.block_tables,
        )
        return out, lse.transpose(0, 1)  # lse [num_heads, num_tokens]


def _starts(lengths: Any, device: torch.device) -> torch.Tensor:
    return to_device([0, *accumulate(lengths)], device, torch.int32)
