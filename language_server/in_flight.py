"""What the device has been asked to do, and the host has not yet heard of.

While a step runs, its tokens have been chosen for as far as the device is concerned; the host knows only that there
will be some. It can already ask for the next step, whose input they are.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch

from common.service.errors import DvdError
from language_server.sampler import Choice, Sample
from language_server.scheduler import ScheduledChunk
from language_server.sequence import UNKNOWN_TOKEN, Sequence, SequenceStatus
from language_server.transfer import to_device


@dataclass(frozen=True, slots=True)
class UnknownTokens:
    """The last tokens of some ``sequences``: ``token_ids`` [len(sequences)] int64, on the device."""

    token_ids: torch.Tensor
    sequences: Items[Sequence]

    def put(self, target: torch.Tensor, chunks: Items[ScheduledChunk]) -> None:
        """Into ``target`` [num_tokens, or more], the ids of what ``chunks`` compute, one chunk behind another."""
        row_of = {sequence: row for row, sequence in enumerate(self.sequences)}
        ends = accumulate(chunk.num_tokens for chunk in chunks)
        places_and_rows = [
            (end - 1, row_of[chunk.sequence])
            for end, chunk in zip(ends, chunks, strict=True)
            if chunk.is_sampled and chunk.sequence.has_unknown_token
        ]
        if places_and_rows:
            places, rows = to_device(list(zip(*places_and_rows, strict=True)), target.device)
            target.index_copy_(0, places, self.token_ids.index_select(0, rows).to(target.dtype))


@dataclass(frozen=True, slots=True)
class StepSizes:
    num_tokens: int = 0
    num_sequences: int = 0
    num_decodes: int = 0  # of them, those that generate

    @classmethod
    def of(cls, chunks: Items[ScheduledChunk]) -> Self:
        """Of a step that is about to be launched."""
        num_decodes = sum(chunk.sequence.is_decoding for chunk in chunks)
        return cls(sum(chunk.num_tokens for chunk in chunks), len(chunks), num_decodes)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was launched. Sequences may have been aborted or preempted since."""

    chunks: Items[ScheduledChunk]
    num_preemptions: Items[int]  # of each chunk's sequence, when the step was launched
    choice: Choice | None  # of the chunks that are sampled; None: there is no such chunk
    sizes: StepSizes

    @property
    def must_be_known(self) -> bool:
        """Whether the next step cannot be launched before the tokens of this one are known."""
        return self.choice is not None and any(sequence.needs_known_tokens for sequence in self.choice.sequences)

    @property
    def written(self) -> list[ScheduledChunk]:
        """Chunks whose KV lies in blocks that their sequences still own."""
        return [
            chunk
            for chunk, num_preemptions in zip(self.chunks, self.num_preemptions, strict=True)
            if chunk.sequence.num_preemptions == num_preemptions
            and chunk.sequence.status is not SequenceStatus.FINISHED
        ]

    def add_unknown_tokens(self) -> UnknownTokens | None:
        """Give every sequence the token it will have; None: no sequence gets any."""
        if self.choice is None:
            return None
        for sequence in self.choice.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                sequence.append(UNKNOWN_TOKEN)
        return UnknownTokens(self.choice.token_ids, self.choice.sequences)

    def fetch(self) -> list[tuple[Sequence, Sample | DvdError]]:
        """Wait for the tokens. Those of sequences that have ended meanwhile are nobody's."""
        if self.choice is None:
            return []
        return [
            (sequence, sample)
            for sequence, sample in zip(self.choice.sequences, self.choice.fetch(), strict=True)
            if sequence.status is not SequenceStatus.FINISHED
        ]
