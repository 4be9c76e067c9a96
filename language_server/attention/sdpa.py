"""Paged attention out of PyTorch's scaled_dot_product_attention: prompts on CPUs, and the fallback elsewhere.

Keys and values are gathered from their blocks first. Sequences with one query token are gathered together, in groups of
like length small enough that the copy stays in the processor's cache: measured on a CPU with 4 KV heads of 64, one
gather of everything is up to 4 times slower than this at 32 sequences of 1500 tokens, and one call per sequence is 2
times slower at 100 tokens. Slots that were never written are never read, so rubbish in the cache cannot spread.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from language_server.attention.base import AttentionBackend, BatchLayout, LayerCall
from language_server.transfer import to_device

_CPU_GROUP_TOKENS = 2048  # padded tokens gathered at once
_GPU_GROUP_TOKENS = 1 << 18
_MAX_SCORES = 1 << 24  # elements of a score matrix that is really built (attention sinks)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    rows: torch.Tensor  # [B] int64: places in the batch
    slots: torch.Tensor  # [B * width] int64
    bias: torch.Tensor | None  # [B, 1, 1, width]: -inf on padding; None without padding


@dataclass(frozen=True, slots=True)
class _Prefill:
    tokens: slice  # of the packed batch
    slots: torch.Tensor  # [num_keys] int64
    bias: torch.Tensor | None  # [num_queries, num_keys]: -inf where a query must not look; None: plainly causal


@dataclass(frozen=True, slots=True)
class _Gathers:
    decodes: list[_DecodeGroup]
    prefills: list[_Prefill]


@dataclass(frozen=True, slots=True)
class SdpaPlan:
    layout: BatchLayout
    by_window: dict[int | None, _Gathers] = field(default_factory=dict)


class SdpaBackend(AttentionBackend):
    """``only_prompts``: somebody else computes the sequences with one token."""

    def __init__(self, *, only_prompts: bool = False) -> None:
        self._only_prompts = only_prompts

    def plan(self, layout: BatchLayout) -> SdpaPlan:
        return SdpaPlan(layout)

    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, plan: SdpaPlan, call: LayerCall
    ) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.attend_into(out, query, key_cache, value_cache, plan, call)
        return out

    def attend_into(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: SdpaPlan,
        call: LayerCall,
    ) -> None:
        """``attend``, into the rows of ``out`` that are ours."""
        if call.sliding_window not in plan.by_window:
            plan.by_window[call.sliding_window] = self._gathers(plan.layout, call.sliding_window, query.dtype)
        gathers = plan.by_window[call.sliding_window]
        keys, values = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
        for group in gathers.decodes:
            out[group.rows] = _decode(query[group.rows], keys, values, group, call)
        for prefill in gathers.prefills:
            out[prefill.tokens] = _prefill(query[prefill.tokens], keys, values, prefill, call)

    def _gathers(self, layout: BatchLayout, window: int | None, dtype: torch.dtype) -> _Gathers:
        decodes = [] if self._only_prompts else _decode_groups(layout, window, dtype)
        prefills, start = [], layout.num_single
        for row in range(layout.num_single, len(layout.query_lens)):
            prefills.append(_plan_prefill(layout, row, start, window, dtype))
            start += layout.query_lens[row]
        return _Gathers(decodes, prefills)


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _DecodeGroup, call: LayerCall
) -> torch.Tensor:
    """``query`` [B, num_heads, head_dim]. The heads that share a KV head are its queries, so nothing is repeated."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    key, value = (  # [B, num_kv_heads, width, head_dim]
        cache.index_select(0, group.slots).view(batch, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (keys, values)
    )
    query = query.reshape(batch, num_kv_heads, -1, head_dim)
    sinks = None if call.sinks is None else call.sinks.view(1, num_kv_heads, -1, 1)
    out = _attend(query, key, value, group.bias, call.scaling, sinks, is_causal=False)
    return out.reshape(batch, num_heads, head_dim)


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prefill: _Prefill, call: LayerCall
) -> torch.Tensor:
    """``query`` [num_queries, num_heads, head_dim] of one sequence. KV heads play the batch, so nothing is repeated."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group_size = num_heads // num_kv_heads
    key, value = (  # [num_kv_heads, group_size, num_keys, head_dim], the group by stride 0
        cache.index_select(0, prefill.slots).transpose(0, 1).unsqueeze(1).expand(-1, group_size, -1, -1)
        for cache in (keys, values)
    )
    query = query.view(num_queries, num_kv_heads, group_size, head_dim).permute(1, 2, 0, 3)
    sinks = None if call.sinks is None else call.sinks.view(num_kv_heads, group_size, 1, 1)
    out = _attend(query, key, value, prefill.bias, call.scaling, sinks, is_causal=prefill.bias is None)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    if sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=is_causal, scale=scaling)
    if is_causal:
        bias = _bias(query.shape[-2], key.shape[-2], 0, None, query)
    return _attend_with_sinks(query, key, value, bias, scaling, sinks)


def _attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Softmax with one more logit per head that has no value. Built in slices of queries, because it is built."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_rows = max(1, _MAX_SCORES // (key.shape[-2] * query.shape[0] * query.shape[1]))
    for start in range(0, query.shape[-2], num_rows):
        rows = slice(start, start + num_rows)
        scores = torch.matmul(query[..., rows, :], key.transpose(-1, -2)) * scaling
        if bias is not None:
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., rows, :])
        # In decode the heads of a group are the rows, so the sinks are sliced like them.
        sink = sinks if sinks.shape[-2] == 1 else sinks[..., rows, :]
        scores = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1]
        out[..., rows, :] = torch.matmul(weights.to(value.dtype), value)
    return out


def _decode_groups(layout: BatchLayout, window: int | None, dtype: torch.dtype) -> list[_DecodeGroup]:
    group_tokens = _CPU_GROUP_TOKENS if layout.device.type == "cpu" else _GPU_GROUP_TOKENS
    return [_decode_group(layout, rows, window, dtype) for rows in _group_rows(layout, window, group_tokens)]


def _group_rows(layout: BatchLayout, window: int | None, group_tokens: int) -> list[list[int]]:
    """Cut the single-token rows, shortest first, into groups of at most ``group_tokens`` padded keys."""
    groups: list[list[int]] = []
    for row in sorted(range(layout.num_single), key=layout.seq_lens.__getitem__):
        width = _num_visible(layout.seq_lens[row], window)
        if groups and (len(groups[-1]) + 1) * width <= group_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _decode_group(layout: BatchLayout, rows: list[int], window: int | None, dtype: torch.dtype) -> _DecodeGroup:
    seq_lens = [layout.seq_lens[row] for row in rows]
    num_keys = [_num_visible(length, window) for length in seq_lens]
    width = num_keys[-1]
    ends = to_device(seq_lens, layout.device).unsqueeze(1)  # [B, 1]
    counts = to_device(num_keys, layout.device).unsqueeze(1)
    steps = torch.arange(width, device=layout.device)  # [width]
    positions = (ends - counts + steps).clamp_(max=ends - 1)  # padding repeats the last token
    rows_tensor = to_device(rows, layout.device)
    blocks = layout.block_tables[rows_tensor].gather(1, positions // layout.block_size)
    slots = (blocks * layout.block_size + positions % layout.block_size).flatten()
    if num_keys[0] == width:
        return _DecodeGroup(rows_tensor, slots, None)
    bias = torch.zeros(len(rows), width, dtype=dtype, device=layout.device)
    bias.masked_fill_(steps >= counts, float("-inf"))
    return _DecodeGroup(rows_tensor, slots, bias[:, None, None, :])


def _plan_prefill(layout: BatchLayout, row: int, start: int, window: int | None, dtype: torch.dtype) -> _Prefill:
    num_queries, seq_len = layout.query_lens[row], layout.seq_lens[row]
    num_computed = seq_len - num_queries
    first_key = 0 if window is None else max(0, num_computed - window + 1)
    slots = layout.slots(row, first_key)
    tokens = slice(start, start + num_queries)
    if num_computed == 0 and (window is None or seq_len <= window):
        return _Prefill(tokens, slots, None)
    like = torch.empty(0, dtype=dtype, device=layout.device)
    return _Prefill(tokens, slots, _bias(num_queries, len(slots), num_computed - first_key, window, like))


def _bias(num_queries: int, num_keys: int, offset: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[num_queries, num_keys] 0 / -inf: query ``i`` stands at key ``offset + i`` and sees ``window`` keys back."""
    query = offset + torch.arange(num_queries, device=like.device).unsqueeze(1)
    key = torch.arange(num_keys, device=like.device)
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    return torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _num_visible(seq_len: int, window: int | None) -> int:
    return seq_len if window is None else min(seq_len, window)
