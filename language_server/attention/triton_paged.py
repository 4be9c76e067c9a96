"""Paged attention through our own Triton kernels, for GPUs without flash-attn. Triton comes with torch for CUDA.

Reads the blocks where they lie. A sequence with one token has its keys split among many programs, so that a small batch
fills the GPU; prompts go in tiles of queries. With ``TRITON_INTERPRET=1``, set before Triton is imported, it runs on a
CPU, slowly: so it is tested.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from language_server.attention.base import AttentionBackend, BatchLayout, DecodeLayout, LayerCall
from language_server.transfer import to_device

_QUERY_TILE: Final = 128
_MAX_SPLITS: Final = 32
_MIN_SPLITS: Final = 2  # lengths differ, and a long sequence should not keep a whole batch waiting
_PROGRAMS_PER_PROCESSOR: Final = 3
_UNLIMITED: Final = 1 << 30  # tokens a window may have


def is_available() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True, slots=True)
class TritonPlan:
    block_size: int
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    seq_lens: torch.Tensor  # [num_single] int32
    tiles: torch.Tensor  # [num_tiles, 4] int32, those of the longest histories first


class TritonBackend(AttentionBackend):
    """``num_processors``: multiprocessors of the GPU."""

    can_capture = True

    def __init__(self, num_processors: int) -> None:
        self._kernels: Any = importlib.import_module("language_server.kernels.triton_attention")
        self._num_processors = num_processors

    @classmethod
    def on(cls, device: torch.device) -> "TritonBackend":
        return cls(torch.cuda.get_device_properties(device).multi_processor_count)

    def plan(self, layout: BatchLayout) -> TritonPlan:
        num_single = layout.num_single
        tiles = list(_tiles(layout))[::-1]
        numbers = [*layout.seq_lens[:num_single], *(number for tile in tiles for number in tile)]
        packed = to_device(numbers, layout.device, torch.int32)
        tables = layout.block_tables.to(torch.int32)  # of one kind, so that kernels are compiled once, at the start
        return TritonPlan(layout.block_size, tables, packed[:num_single], packed[num_single:].view(-1, 4))

    def plan_decode(self, layout: DecodeLayout) -> TritonPlan:
        return TritonPlan(layout.block_size, layout.block_tables, layout.seq_lens, layout.seq_lens.new_empty(0, 4))

    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, plan: TritonPlan, call: LayerCall
    ) -> torch.Tensor:
        query = query if query.stride(-1) == 1 else query.contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if len(plan.seq_lens):
            self._decode(query, key_cache, value_cache, plan, call, out)
        if len(plan.tiles):
            self._prefill(query, key_cache, value_cache, plan, call, out)
        return out

    def _decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: TritonPlan,
        call: LayerCall,
        out: torch.Tensor,
    ) -> None:
        num_seqs, (_, num_heads, head_dim), num_kv_heads = len(plan.seq_lens), query.shape, keys.shape[2]
        num_splits = self._num_splits(num_seqs * num_kv_heads)
        partials = query.new_empty(num_seqs, num_heads, num_splits, head_dim, dtype=torch.float32)
        logs = query.new_empty(num_seqs, num_heads, num_splits, dtype=torch.float32)
        group = num_heads // num_kv_heads
        self._kernels.decode_splits[num_seqs, num_kv_heads, num_splits](
            query,
            keys,
            values,
            plan.block_tables,
            plan.seq_lens,
            partials,
            logs,
            *_numbers(query, keys, plan, call),
            GROUP=group,
            GROUP_PAD=_padded(group),
            HEAD_DIM=head_dim,
            DIM_PAD=_padded(head_dim),
            BLOCK_SIZE=plan.block_size,
            NUM_SPLITS=num_splits,
            **_launch(query, decode=True),
        )
        self._kernels.join_splits[num_seqs, num_heads](
            partials,
            logs,
            logs if call.sinks is None else call.sinks,
            out,
            HAS_SINKS=call.sinks is not None,
            HEAD_DIM=head_dim,
            DIM_PAD=_padded(head_dim),
            NUM_SPLITS=num_splits,
        )

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: TritonPlan,
        call: LayerCall,
        out: torch.Tensor,
    ) -> None:
        _, num_heads, head_dim = query.shape
        self._kernels.prefill_tiles[num_heads, len(plan.tiles)](
            query,
            keys,
            values,
            plan.block_tables,
            plan.tiles,
            query if call.sinks is None else call.sinks,
            out,
            *_numbers(query, keys, plan, call),
            HAS_SINKS=call.sinks is not None,
            GROUP=num_heads // keys.shape[2],
            HEAD_DIM=head_dim,
            DIM_PAD=_padded(head_dim),
            BLOCK_SIZE=plan.block_size,
            QUERY_TILE=_QUERY_TILE,
            **_launch(query, decode=False),
        )

    def _num_splits(self, num_programs: int) -> int:
        """Into how many pieces the keys of each sequence and KV head go, a power of two. Lengths play no part: a
        captured graph keeps the number."""
        wanted = _PROGRAMS_PER_PROCESSOR * self._num_processors // num_programs
        return min(_MAX_SPLITS, max(_MIN_SPLITS, 1 << max(wanted, 1).bit_length() - 1))


def _tiles(layout: BatchLayout) -> Iterator[tuple[int, int, int, int]]:
    """Row, first packed token, its position, and number of queries, of each tile of the longer sequences."""
    token = layout.num_single
    for row in range(layout.num_single, len(layout.query_lens)):
        num_queries = layout.query_lens[row]
        first_position = layout.seq_lens[row] - num_queries
        for offset in range(0, num_queries, _QUERY_TILE):
            yield row, token + offset, first_position + offset, min(_QUERY_TILE, num_queries - offset)
        token += num_queries


def _numbers(
    query: torch.Tensor, keys: torch.Tensor, plan: TritonPlan, call: LayerCall
) -> tuple[float, int, int, int, int, int]:
    """Scaling in powers of two, window, and the strides of query tokens, heads, block tables and cache slots."""
    return (
        call.scaling * math.log2(math.e),
        call.sliding_window or _UNLIMITED,
        query.stride(0),
        query.stride(1),
        plan.block_tables.stride(0),
        keys.stride(1),
    )


def _launch(query: torch.Tensor, *, decode: bool) -> dict[str, int]:
    """Keys per tile, warps, and stages of the pipeline that fetches block numbers, then keys: what fits the shared
    memory of any GPU since Ampere (99 KB), with heads of up to 128 in bfloat16 at full speed."""
    is_narrow = _padded(query.shape[2]) * query.element_size() <= 256
    return {
        "TILE": 64 if is_narrow else 32,
        "num_warps": 4 if decode else 8,
        "num_stages": 3 if is_narrow else 1,
    }


def _padded(size: int) -> int:
    """The matrix units take powers of two from 16."""
    return max(16, 1 << (size - 1).bit_length())
