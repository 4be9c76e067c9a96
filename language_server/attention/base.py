"""What every attention backend gets and gives: a packed batch over a paged KV cache.

Tokens of all scheduled sequences lie behind one another, [num_tokens, heads, head_dim]; sequences that contribute one
token come first. Knows nothing of models, sampling or scheduling.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from language_server.transfer import to_device


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token costs in the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def bytes_per_block(self, block_size: int) -> int:
        return 2 * self.num_layers * block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of every layer, each [num_blocks, block_size, num_kv_heads, head_dim]. Never initialised:
    backends read only slots that were written, so on a CPU memory is used only as blocks are."""

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        size = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        self.block_size = block_size
        self.keys = [torch.empty(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.empty(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Put ``key`` and ``value`` [num_tokens, num_kv_heads, head_dim] where ``slot_mapping`` [num_tokens] says."""
        write(self.keys[layer], key, slot_mapping)
        write(self.values[layer], value, slot_mapping)


def write(cache: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Put ``rows`` [num_tokens, num_kv_heads, head_dim] into their slots of one layer's keys or values."""
    cache.flatten(0, 1).index_copy_(0, slot_mapping, rows)


@dataclass(frozen=True)
class BatchLayout:
    """Where the tokens of a step lie, in the packed batch and in the cache.

    ``query_lens`` and ``seq_lens`` (history and query together) have one entry per sequence, single tokens first.
    """

    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    position_ids: torch.Tensor  # [num_tokens] int64
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int64, padded with zeros
    block_size: int

    @property
    def device(self) -> torch.device:
        return self.position_ids.device

    @cached_property
    def num_single(self) -> int:
        """Sequences with one token in this batch: in general those that generate."""
        return sum(length == 1 for length in self.query_lens)

    @cached_property
    def slot_mapping(self) -> torch.Tensor:
        """Cache slot of each token, [num_tokens] int64."""
        lens = to_device(self.query_lens, self.device)
        rows = torch.repeat_interleave(
            torch.arange(len(self.query_lens), device=self.device), lens, output_size=len(self.position_ids)
        )
        blocks = self.block_tables[rows, self.position_ids // self.block_size]
        return blocks * self.block_size + self.position_ids % self.block_size

    def slots(self, row: int, first: int = 0) -> torch.Tensor:
        """Cache slots of a sequence's tokens from position ``first`` on, [seq_len - first] int64."""
        positions = torch.arange(first, self.seq_lens[row], device=self.device)
        blocks = self.block_tables[row].index_select(0, positions // self.block_size)
        return blocks * self.block_size + positions % self.block_size


@dataclass(frozen=True)
class DecodeLayout:
    """A batch of one token per sequence, told by tensors alone: what is captured with them in a CUDA graph runs again
    on whatever they hold then. The block tables are as wide as the longest sequence may ever need."""

    position_ids: torch.Tensor  # [num_seqs] int64
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    block_size: int

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        """[num_seqs] int32, the new token included."""
        return (self.position_ids + 1).to(torch.int32)

    @cached_property
    def slot_mapping(self) -> torch.Tensor:
        """Cache slot of each token, [num_seqs] int64."""
        places = (self.position_ids // self.block_size).unsqueeze(1)
        blocks = self.block_tables.gather(1, places).squeeze(1)
        return blocks * self.block_size + self.position_ids % self.block_size


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer wants of attention."""

    scaling: float
    sliding_window: int | None  # a query sees this many tokens, itself included
    sinks: torch.Tensor | None  # [num_heads]: logits of a virtual key without value, GPT-OSS


class AttentionBackend(ABC):
    """Attention of a packed batch. ``plan`` runs once a step, ``attend`` once a layer."""

    block_size: int = 16  # tokens per block this backend works best with
    can_capture: bool = False  # whether ``plan_decode`` and what follows asks nothing of the host

    @abstractmethod
    def plan(self, layout: BatchLayout) -> Any:
        """Whatever all layers of the step share."""

    def plan_decode(self, layout: DecodeLayout) -> Any:
        """The same for a step that only tensors describe."""
        num_seqs = len(layout.position_ids)
        tables = layout.block_tables.to(torch.int64)
        seq_lens = layout.seq_lens.tolist()
        return self.plan(BatchLayout([1] * num_seqs, seq_lens, layout.position_ids, tables, layout.block_size))

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, plan: Any, call: LayerCall
    ) -> torch.Tensor:
        """Causal attention of ``query`` [num_tokens, num_heads, head_dim] over the cache, which holds the new tokens
        already; returns the shape of ``query``."""
