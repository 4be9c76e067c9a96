"""From scheduled chunks to logits: packs tokens and image rows, runs the backbone, returns the rows to sample from.

``prepare`` looks at one sequence at a time, so that what is wrong with one cannot hurt the batch; ``run`` is one pass
through the model. Knows nothing of scheduling policy or sampling.
"""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from common.model.graphs import Capture
from common.service import metrics
from common.service.errors import InternalError
from language_server.attention.base import AttentionBackend, BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.backbone import LanguageBackbone
from language_server.cuda_graphs import DecodeGraphs, is_decode_only
from language_server.in_flight import UnknownTokens
from language_server.scheduler import ImageReadiness, ScheduledChunk
from language_server.transfer import to_device

_logger = logging.getLogger(__name__)


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
        self._graphs: DecodeGraphs | None = None
        self.decode_threads: int | None = None  # CPU threads of a step in which no prompt runs; None: all
        self.prompt_threads: int | None = None  # ... in which one does

    @property
    def device(self) -> torch.device:
        return self._backbone.device

    @property
    def has_graphs(self) -> bool:
        return self._graphs is not None

    def capture_graphs(self, max_num_seqs: int, max_model_len: int, capture: Capture) -> None:
        """From now on, replay steps in which sequences only generate. The cache's last block must be nobody's.

        A model that cannot be captured, because it asks the device what to do next, runs as before.
        """
        max_blocks = -(-max_model_len // self._cache.block_size)
        try:
            self._graphs = DecodeGraphs(
                self._backbone,
                self._cache,
                self._attention,
                max_num_seqs=max_num_seqs,
                max_blocks=max_blocks,
                capture=capture,
            )
        except RuntimeError as error:
            _logger.warning("decode runs without CUDA graphs: %s", error)

    def prepare(self, chunk: ScheduledChunk) -> PreparedChunk:
        """Collect the image rows a chunk needs. Raises DvdError if they do not fit its placeholders."""
        if not chunk.sequence.has_images:
            return PreparedChunk(chunk, ())
        rows, request_id = [], chunk.sequence.request_id
        for span in chunk.sequence.image_spans.overlapping(chunk.start, chunk.end):
            start, end = max(span.start, chunk.start), min(span.end, chunk.end)
            first_row = span.row_at(start)
            values = self._embeds.rows(request_id, span.image_index, first_row, first_row + end - start)
            self._check_rows(values, end - start)
            rows.append((start - chunk.start, values))
        return PreparedChunk(chunk, rows)

    @torch.inference_mode()
    def run(self, batch: Items[PreparedChunk], unknown: UnknownTokens | None = None) -> torch.Tensor:
        """Compute one step. Chunks of one token come first. Returns logits [num_sampled, vocab_size] float32: a row
        for each chunk that is sampled, in order.

        ``unknown``: where the ids are of tokens that the host does not know, if there may be any.
        """
        with self._threads_for(batch):
            chunks = [prepared.chunk for prepared in batch]
            if self._graphs is not None and is_decode_only(chunks):
                return self._graphs.run(chunks, unknown)
            layout = self._layout(chunks)
            context = ForwardContext.of(layout, self._cache, self._attention)
            hidden = self._backbone.forward(self._inputs_embeds(batch, unknown), context)
            return self._backbone.logits(hidden.index_select(0, self._sampled_rows(batch)))

    @contextmanager
    def _threads_for(self, batch: Items[PreparedChunk]) -> Iterator[None]:
        """Put back at once: other threads of this process take them over."""
        usual = torch.get_num_threads()
        has_prompt = any(prepared.chunk.num_tokens > 1 for prepared in batch)
        wanted = self.prompt_threads if has_prompt else self.decode_threads
        if wanted is None or wanted == usual:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(usual)

    def _layout(self, chunks: Items[ScheduledChunk]) -> BatchLayout:
        tables = [chunk.sequence.block_table for chunk in chunks]
        width, device = max(map(len, tables)), self.device
        return BatchLayout(
            query_lens=[chunk.num_tokens for chunk in chunks],
            seq_lens=[chunk.end for chunk in chunks],
            position_ids=to_device(
                [position for chunk in chunks for position in range(chunk.start, chunk.end)], device
            ),
            block_tables=to_device([table + [0] * (width - len(table)) for table in tables], device),
            block_size=self._cache.block_size,
        )

    def _inputs_embeds(self, batch: Items[PreparedChunk], unknown: UnknownTokens | None) -> torch.Tensor:
        """[num_tokens, hidden_size]: embeddings of the tokens, image rows in place of the placeholders'."""
        token_ids: list[int] = []
        places: list[tuple[int, torch.Tensor]] = []
        for prepared in batch:
            places += [(len(token_ids) + offset, rows) for offset, rows in prepared.image_rows]
            chunk = prepared.chunk
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        ids = to_device(token_ids, self.device)
        if unknown is not None:
            unknown.put(ids, [prepared.chunk for prepared in batch])
        embeds = self._backbone.embed(ids)
        for start, rows in places:
            embeds[start : start + len(rows)].copy_(rows, non_blocking=True)
        return embeds

    def _sampled_rows(self, batch: Items[PreparedChunk]) -> torch.Tensor:
        ends = accumulate(prepared.chunk.num_tokens for prepared in batch)
        last = [end - 1 for end, prepared in zip(ends, batch, strict=True) if prepared.chunk.is_sampled]
        return to_device(last, self.device)

    def _check_rows(self, rows: torch.Tensor, num_placeholders: int) -> None:
        """The one place where embedding rows and placeholder tokens meet: there are as many of one as of the other."""
        expected = (num_placeholders, self._backbone.hidden_size)
        if tuple(rows.shape) != expected or not rows.is_floating_point():
            metrics.LANGUAGE_PLACEHOLDER_MISMATCH.inc()
            raise InternalError(f"image features are {list(rows.shape)} {rows.dtype}, expected {list(expected)}")
