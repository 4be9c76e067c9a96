"""From scheduled chunks to logits: packs tokens and image rows, runs the backbone, returns the rows to sample from.

``prepare`` looks at one sequence at a time, so that what is wrong with one cannot hurt the batch; ``run`` is one pass
through the model. Knows nothing of scheduling policy or sampling.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from common.service.errors import InternalError
from language_server.attention.base import AttentionBackend, BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.backbone import LanguageBackbone
from language_server.scheduler import ImageReadiness, ScheduledChunk


class ImageEmbedsSource(ImageReadiness, Protocol):
    """Where image rows come from. Rows stay readable until the sequence ends: a preempted one reads them again."""

    def rows(self, request_id: bytes, image_index: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of an image, [stop - start, hidden_size], of those reported ready. Raises DvdError."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedChunk:
    """A chunk with its image rows: ``image_rows[i]`` [n, hidden_size] belongs at token ``offset`` of the chunk."""

    chunk: ScheduledChunk
    image_rows: Items[tuple[int, torch.Tensor]]


class ModelRunner:
    def __init__(
        self, backbone: LanguageBackbone, cache: KVCache, attention: AttentionBackend, embeds: ImageEmbedsSource
    ) -> None:
        self._backbone = backbone
        self._cache = cache
        self._attention = attention
        self._embeds = embeds
        self.decode_threads: int | None = None  # CPU threads of a step in which no prompt runs; None: all

    @property
    def device(self) -> torch.device:
        return self._backbone.device

    def prepare(self, chunk: ScheduledChunk) -> PreparedChunk:
        """Collect the image rows a chunk needs. Raises DvdError if they do not fit its placeholders."""
        rows = []
        for span in chunk.sequence.image_spans:
            start, end = max(span.start, chunk.start), min(span.end, chunk.end)
            if start < end:
                values = self._embeds.rows(
                    chunk.sequence.request_id, span.image_index, start - span.start, end - span.start
                )
                self._check_rows(values, end - start)
                rows.append((start - chunk.start, values))
        return PreparedChunk(chunk, rows)

    @torch.inference_mode()
    def run(self, batch: Items[PreparedChunk]) -> torch.Tensor:
        """Compute one step. Chunks of one token come first. Returns logits [num_sampled, vocab_size] float32: a row
        for each chunk that is sampled, in order."""
        with self._threads_for(batch):
            layout = self._layout([prepared.chunk for prepared in batch])
            context = ForwardContext.of(layout, self._cache, self._attention)
            hidden = self._backbone.forward(self._inputs_embeds(batch), context)
            return self._backbone.logits(hidden.index_select(0, self._sampled_rows(batch)))

    @contextmanager
    def _threads_for(self, batch: Items[PreparedChunk]) -> Iterator[None]:
        """``decode_threads`` where no prompt runs. Put back at once: other threads of this process take it over."""
        usual = torch.get_num_threads()
        if self.decode_threads in (None, usual) or any(prepared.chunk.num_tokens > 1 for prepared in batch):
            yield
            return
        torch.set_num_threads(self.decode_threads)
        try:
            yield
        finally:
            torch.set_num_threads(usual)

    def _layout(self, chunks: Items[ScheduledChunk]) -> BatchLayout:
        tables = [chunk.sequence.block_table for chunk in chunks]
        width = max(map(len, tables))
        return BatchLayout(
            query_lens=[chunk.num_tokens for chunk in chunks],
            seq_lens=[chunk.end for chunk in chunks],
            position_ids=self._to_device([position for chunk in chunks for position in range(chunk.start, chunk.end)]),
            block_tables=self._to_device([table + [0] * (width - len(table)) for table in tables]),
            block_size=self._cache.block_size,
        )

    def _inputs_embeds(self, batch: Items[PreparedChunk]) -> torch.Tensor:
        """[num_tokens, hidden_size]: embeddings of the tokens, image rows in place of the placeholders'."""
        token_ids: list[int] = []
        places: list[tuple[int, torch.Tensor]] = []
        for prepared in batch:
            places += [(len(token_ids) + offset, rows) for offset, rows in prepared.image_rows]
            chunk = prepared.chunk
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        embeds = self._backbone.embed(self._to_device(token_ids))
        for start, rows in places:
            embeds[start : start + len(rows)].copy_(rows, non_blocking=True)
        return embeds

    def _sampled_rows(self, batch: Items[PreparedChunk]) -> torch.Tensor:
        ends = accumulate(prepared.chunk.num_tokens for prepared in batch)
        return self._to_device(
            [end - 1 for end, prepared in zip(ends, batch, strict=True) if prepared.chunk.is_sampled]
        )

    def _check_rows(self, rows: torch.Tensor, num_placeholders: int) -> None:
        """The one place where embedding rows and placeholder tokens meet: there are as many of one as of the other."""
        expected = (num_placeholders, self._backbone.hidden_size)
        if tuple(rows.shape) != expected or not rows.is_floating_point():
            raise InternalError(f"image features are {list(rows.shape)} {rows.dtype}, expected {list(expected)}")

    def _to_device(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        device = self._backbone.device
        host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)
