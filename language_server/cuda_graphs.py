"""Decode steps as CUDA graphs: one launch replays a whole step that was captured at the start.

A graph has a fixed number of rows, so there is one for each of a few batch sizes, and a step takes the smallest that
holds it. Rows left over compute a token of their own in a block that belongs to nobody. What a step reads lies in one
buffer, a row for each sequence: token, position and block table. Everything else follows from these on the device.

Knows nothing of prompts, images or sampling.
"""

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from common.model.graphs import Capture, Graph
from language_server.attention.base import AttentionBackend, DecodeLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.backbone import LanguageBackbone
from language_server.in_flight import UnknownTokens
from language_server.scheduler import ScheduledChunk
from language_server.sequence import Sequence
from language_server.transfer import record_event

_STEP: Final = 8  # rows between one graph and the next
_TOKEN, _POSITION, _TABLE = 0, 1, 2  # columns; the block table goes on to the end


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and the largest there can be."""
    sizes = {1, 2, 4, *range(_STEP, max_num_seqs, _STEP), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def is_decode_only(chunks: Items[ScheduledChunk]) -> bool:
    """Whether every chunk is the one token that its sequence generated last."""
    return all(chunk.sequence.is_decoding for chunk in chunks)


@dataclass(frozen=True, slots=True)
class _Written:
    """What a row holds. A block table only grows until its sequence is preempted."""

    sequence: Sequence
    num_preemptions: int
    num_blocks: int


class DecodeRows:
    """The buffer that steps read, on the host and on the device.

    Args:
        max_blocks: of the longest sequence.
        scratch_block: that rows without a sequence write to.
    """

    def __init__(self, num_rows: int, max_blocks: int, scratch_block: int, device: torch.device) -> None:
        shape = (num_rows, _TABLE + max_blocks)
        # Two, because one is written while the device may still read the other.
        self._hosts = [_HostRows(shape, scratch_block, device) for _ in range(2)]
        self._device = self._hosts[0].values.to(device, copy=True)

    def layout(self, num_rows: int, block_size: int) -> DecodeLayout:
        """The first rows, for whatever is captured."""
        rows = self._device[:num_rows]
        return DecodeLayout(rows[:, _POSITION].to(torch.int64), rows[:, _TABLE:], block_size)

    def token_ids(self, num_rows: int) -> torch.Tensor:
        """[num_rows] int64"""
        return self._device[:num_rows, _TOKEN].to(torch.int64)

    def fill(self, chunks: Items[ScheduledChunk], num_rows: int, unknown: UnknownTokens | None = None) -> None:
        """One chunk a row, the rest of ``num_rows`` without."""
        self._hosts.reverse()
        host = self._hosts[0]
        host.write(chunks, num_rows)
        host.copy_to(self._device[:num_rows])
        if unknown is not None:
            unknown.put(self._device[:num_rows, _TOKEN], chunks)


class _HostRows:
    """What the device copies; not to be written again before it has."""

    def __init__(self, shape: tuple[int, int], scratch_block: int, device: torch.device) -> None:
        self.values = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers = self.values.numpy()
        self._numbers[:, _TABLE] = scratch_block
        self._scratch_block = scratch_block
        self._written: list[_Written | None] = [None] * shape[0]
        self._copied: torch.cuda.Event | None = None

    def copy_to(self, rows: torch.Tensor) -> None:
        """The first of them."""
        rows.copy_(self.values[: len(rows)], non_blocking=True)
        if rows.is_cuda:
            self._copied = record_event()

    def write(self, chunks: Items[ScheduledChunk], num_rows: int) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        numbers = self._numbers
        numbers[: len(chunks), _TOKEN] = [chunk.sequence.token_ids[chunk.start] for chunk in chunks]
        numbers[: len(chunks), _POSITION] = [chunk.start for chunk in chunks]
        for row, chunk in enumerate(chunks):
            self._write_table(row, chunk.sequence)
        for row in range(len(chunks), num_rows):
            if self._written[row] is not None:
                numbers[row, : _TABLE + 1] = (0, 0, self._scratch_block)
                self._written[row] = None

    def _write_table(self, row: int, sequence: Sequence) -> None:
        """Only what is new: tables are long, and a step is short."""
        table, written = sequence.block_table, self._written[row]
        is_same = (
            written is not None and written.sequence is sequence and written.num_preemptions == sequence.num_preemptions
        )
        first = written.num_blocks if written is not None and is_same else 0
        if first < len(table):
            self._numbers[row, _TABLE + first : _TABLE + len(table)] = np.array(table[first:], np.int32)
            self._written[row] = _Written(sequence, sequence.num_preemptions, len(table))


class DecodeGraphs:
    """Captures a graph of each size when it is made. The last block of ``cache`` must be nobody's.

    Args:
        max_blocks: of the longest sequence.
        capture: ``CudaCapture``, or something that computes the same without a GPU.
    """

    def __init__(
        self,
        backbone: LanguageBackbone,
        cache: KVCache,
        attention: AttentionBackend,
        *,
        max_num_seqs: int,
        max_blocks: int,
        capture: Capture,
    ) -> None:
        self._backbone = backbone
        self._cache = cache
        self._attention = attention
        self._rows = DecodeRows(max_num_seqs, max_blocks, len(cache.keys[0]) - 1, backbone.device)
        self._logits = torch.empty(max_num_seqs, backbone.vocab_size, dtype=torch.float32, device=backbone.device)
        self._sizes = batch_sizes(max_num_seqs)
        # The largest first: the others find room in its memory.
        self._graphs = {size: self._capture(size, capture) for size in reversed(self._sizes)}

    def run(self, chunks: Items[ScheduledChunk], unknown: UnknownTokens | None = None) -> torch.Tensor:
        """Compute a step that ``is_decode_only``. Returns logits [len(chunks), vocab_size] float32, valid until the
        next step."""
        size = self._sizes[bisect_left(self._sizes, len(chunks))]
        self._rows.fill(chunks, size, unknown)
        self._graphs[size].replay()
        return self._logits[: len(chunks)]

    @torch.inference_mode()
    def _capture(self, size: int, capture: Capture) -> Graph:
        return capture(lambda: self._compute(size))

    def _compute(self, size: int) -> None:
        layout = self._rows.layout(size, self._cache.block_size)
        context = ForwardContext.of(layout, self._cache, self._attention)
        hidden = self._backbone.forward(self._backbone.embed(self._rows.token_ids(size)), context)
        self._logits[:size].copy_(self._backbone.logits(hidden))
