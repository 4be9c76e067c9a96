"""Which tokens of which sequences run in the next step.

Continuous batching under one token budget. Sequences that generate go first; what is left of the budget, or less where
they would wait too long for the step's end, goes to prompts in chunks. Text-only sequences and sequences with images
take turns at being first, so neither can starve the other. A prompt is prefilled only up to its first image row that
has not arrived.

When blocks run out, a generating sequence takes them from sequences that wait for features, then from those admitted
after it; the victim forgets its KV and is prefilled again later. The oldest sequence that can run always proceeds.

Pure Python: no tensors, no clock, no I/O. Deterministic.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from language_server.block_manager import BlockManager
from language_server.sequence import Sequence, SequenceStatus


class ImageReadiness(Protocol):
    """How many rows of an image, counted from its first without a gap, have arrived."""

    def num_ready_tokens(self, request_id: bytes, image_index: int) -> int: ...


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens ``[start, end)`` of one sequence; its blocks are allocated."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def is_sampled(self) -> bool:
        """Whether the chunk ends the known tokens, so that the next one can be chosen."""
        return self.end == self.sequence.num_tokens


@dataclass(slots=True)
class _Plan:
    """One step while it is being put together."""

    budget: int  # tokens
    chunks: list[ScheduledChunk] = field(default_factory=list)
    seq_ids: set[int] = field(default_factory=set)

    def add(self, sequence: Sequence, end: int) -> None:
        chunk = ScheduledChunk(sequence, sequence.num_computed_tokens, end)
        self.chunks.append(chunk)
        self.seq_ids.add(sequence.seq_id)
        self.budget -= chunk.num_tokens

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self.seq_ids


class Scheduler:
    """Sequences enter by ``add`` and leave by ``remove``; between them ``schedule`` moves them.

    ``running`` is in order of admission. ``max_num_batched_tokens >= max_num_seqs``, so every sequence that generates
    fits into every step.
    """

    def __init__(
        self, blocks: BlockManager, readiness: ImageReadiness, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs >= 1
        self.blocks = blocks
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens looked up in the prefix cache
        self.num_prefix_hits = 0  # tokens found there
        self._readiness = readiness
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: dict[bool, deque[Sequence]] = {False: deque(), True: deque()}  # by has_images
        self._images_first = False

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def num_waiting_for_features(self) -> int:
        """Sequences, admitted or not, of which nothing can run until rows arrive."""
        return sum(self._is_stalled(sequence) for sequence in (*self._waiting[True], *self.running))

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.has_images].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or given up, and free its blocks."""
        holder = self.running if sequence.status is SequenceStatus.RUNNING else self._waiting[sequence.has_images]
        holder.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.blocks.free(sequence)

    def schedule(self, max_prefill_tokens: int | None = None) -> list[ScheduledChunk]:
        """The next step; empty when every sequence waits for features, or there is none.

        ``max_prefill_tokens`` bounds the prompt tokens of a step in which sequences generate, who wait for its end.
        """
        plan = self._make_plan(max_prefill_tokens, admit=True)
        while not plan.chunks and self._break_deadlock():
            # The freed blocks are for those that run already.
            plan = self._make_plan(max_prefill_tokens, admit=False)
        return plan.chunks

    def _make_plan(self, max_prefill_tokens: int | None, *, admit: bool) -> _Plan:
        plan = _Plan(self._max_num_batched_tokens)
        self._images_first = not self._images_first
        self._schedule_decodes(plan)
        if plan.chunks and max_prefill_tokens is not None:
            plan.budget = min(plan.budget, max_prefill_tokens)
        for has_images in (self._images_first, not self._images_first):
            self._schedule_prefills(plan, has_images)
            if admit:
                self._admit(plan, has_images)
        return plan

    def ready_end(self, sequence: Sequence, num_computed_tokens: int) -> int:
        """Position of the first token at or after ``num_computed_tokens`` that cannot run yet."""
        for span in sequence.image_spans:
            if span.end > num_computed_tokens:
                num_ready = self._readiness.num_ready_tokens(sequence.request_id, span.image_index)
                if num_ready < span.num_tokens:
                    return max(span.start + num_ready, num_computed_tokens)
        return sequence.num_tokens

    def _schedule_decodes(self, plan: _Plan) -> None:
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if sequence.status is SequenceStatus.RUNNING and self._secure_block(sequence, plan):
                plan.add(sequence, sequence.num_tokens)

    def _schedule_prefills(self, plan: _Plan, has_images: bool) -> None:
        for sequence in self.running:
            if sequence.has_images is has_images and not sequence.is_decoding and sequence not in plan:
                self._prefill(sequence, plan)

    def _prefill(self, sequence: Sequence, plan: _Plan) -> bool:
        """Schedule as much of the prompt as is ready, within the budget and the free blocks."""
        start = sequence.num_computed_tokens
        room = (len(sequence.block_table) + self.blocks.num_free_blocks) * self.blocks.block_size
        end = min(self.ready_end(sequence, start), start + plan.budget, room)
        if end <= start:
            return False
        self.blocks.allocate(sequence, end)
        plan.add(sequence, end)
        return True

    def _admit(self, plan: _Plan, has_images: bool) -> None:
        """Start waiting sequences in order of arrival; one that has nothing to run yet lets others pass."""
        queue = self._waiting[has_images]
        for sequence in list(queue):
            if plan.budget == 0 or len(self.running) >= self._max_num_seqs:
                return
            prefix = self.blocks.find_prefix(sequence)
            if not self._may_start(sequence, len(prefix) * self.blocks.block_size):
                continue
            self.blocks.attach(sequence, prefix)
            while self.blocks.num_free_blocks == 0 and self._preempt_stalled(plan):
                pass
            if not self._prefill(sequence, plan):
                self.blocks.free(sequence)
                return
            queue.remove(sequence)
            self._start(sequence, len(prefix) * self.blocks.block_size)

    def _start(self, sequence: Sequence, num_cached_tokens: int) -> None:
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = num_cached_tokens
            self.num_prefix_queries += sequence.num_tokens
            self.num_prefix_hits += num_cached_tokens

    def _may_start(self, sequence: Sequence, num_cached_tokens: int) -> bool:
        ready_end = self.ready_end(sequence, num_cached_tokens)
        if ready_end <= num_cached_tokens or self._will_share(sequence, num_cached_tokens):
            return False
        # Sequences that will soon wait for features may take half of the places: the rest stays for those that can run.
        return ready_end == sequence.num_tokens or self._num_incomplete() < self._max_num_seqs // 2

    def _num_incomplete(self) -> int:
        return sum(
            self.ready_end(sequence, sequence.num_computed_tokens) < sequence.num_tokens for sequence in self.running
        )

    def _will_share(self, sequence: Sequence, num_cached_tokens: int) -> bool:
        """Whether another choice of the same request is computing the very blocks this one lacks."""
        num_shareable = (sequence.num_prompt_tokens - 1) // self.blocks.block_size * self.blocks.block_size
        return (
            self.blocks.enable_prefix_caching
            and num_cached_tokens < num_shareable
            and any(
                other.request_id == sequence.request_id and other.num_computed_tokens < num_shareable
                for other in self.running
            )
        )

    def _secure_block(self, sequence: Sequence, plan: _Plan) -> bool:
        """Get the block for one more token, by preemption if need be; False when the sequence itself had to yield."""
        while not self.blocks.allocate(sequence, sequence.num_tokens):
            if self._preempt_stalled(plan):
                continue
            victim = next(other for other in reversed(self.running) if other not in plan)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _break_deadlock(self) -> bool:
        """Nothing runs although something could, had it blocks: the youngest gives up its own."""
        can_run = [sequence for sequence in self.running if not self._is_stalled(sequence)]
        if not can_run:
            return False
        if self._preempt_stalled(_Plan(0)):
            return True
        if len(can_run) == 1:
            return False
        self._preempt(can_run[-1])
        return True

    def _preempt_stalled(self, plan: _Plan) -> bool:
        """Preempt the youngest sequence that holds blocks while it waits for features, if there is one."""
        for sequence in reversed(self.running):
            if sequence.has_images and sequence not in plan and self._is_stalled(sequence):
                self._preempt(sequence)
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting[sequence.has_images].appendleft(sequence)

    def _is_stalled(self, sequence: Sequence) -> bool:
        start = sequence.num_computed_tokens
        return start < sequence.num_tokens and self.ready_end(sequence, start) <= start
