"""Which tokens of which sequences run in the next step.

Continuous batching under one token budget. Sequences that generate go first; what is left of the budget, or less where
they would wait too long for the step's end, goes to prompts in chunks. Text-only sequences and sequences with images
take turns at being first, so neither can starve the other. A prompt is prefilled only up to its first image row that
has not arrived. Among sequences of a kind those of a smaller ``priority`` are served first, then those that came first.

When blocks run out, a generating sequence takes them from sequences that wait for features, then from those behind it
in line; the victim forgets its KV and is prefilled again later. The first in line that can run always proceeds.
Blocks that are held are nobody's to take (prefix_holds.py).

Pure Python: no tensors, no clock, no I/O. Deterministic.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from language_server.block_manager import BlockManager
from language_server.pace import NO_LIMITS, PrefillLimits
from language_server.prefix_holds import PrefixHolds
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
    image_budget: int | None = None  # of prompts with images; None: all of it
    chunks: list[ScheduledChunk] = field(default_factory=list)
    seq_ids: set[int] = field(default_factory=set)

    def limit_prompts(self, limits: PrefillLimits) -> None:
        if limits.text_tokens is not None:
            self.budget = min(self.budget, limits.text_tokens)
        self.image_budget = limits.image_tokens

    def room(self, sequence: Sequence) -> int:
        """For tokens of a prompt."""
        if not sequence.has_images or self.image_budget is None:
            return self.budget
        return max(0, min(self.budget, self.image_budget))

    def add(self, sequence: Sequence, end: int) -> None:
        chunk = ScheduledChunk(sequence, sequence.num_computed_tokens, end)
        self.chunks.append(chunk)
        self.seq_ids.add(sequence.seq_id)
        self.budget -= chunk.num_tokens
        if self.image_budget is not None:
            self.image_budget -= chunk.num_tokens

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self.seq_ids


class Scheduler:
    """Sequences enter by ``add`` and leave by ``remove``; between them ``schedule`` moves them.

    ``running`` is in order of priority, then of admission. ``max_num_batched_tokens >= max_num_seqs``, so every
    sequence that generates fits into every step.
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
        self._holds = PrefixHolds(blocks)
        self._readiness = readiness
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: dict[bool, list[Sequence]] = {False: [], True: []}  # by has_images; in order of service
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
        _insert_last(self._waiting[sequence.has_images], sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or given up, and free its blocks."""
        holder = self.running if sequence.status is SequenceStatus.RUNNING else self._waiting[sequence.has_images]
        holder.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.blocks.free(sequence)

    def hold(self, holder: Sequence) -> int:
        """Keep the images of a prompt that lie in the prefix cache; see ``PrefixHolds.add``."""
        return self._holds.add(holder, (*self.running, *self._waiting[False], *self._waiting[True]))

    def drop_hold(self, seq_id: int) -> bool:
        """See ``PrefixHolds.drop``."""
        return self._holds.drop(seq_id)

    def schedule(self, limits: PrefillLimits = NO_LIMITS) -> list[ScheduledChunk]:
        """The next step; empty when every sequence waits for features, or there is none.

        ``limits`` bound the prompt tokens of a step in which sequences generate, who wait for its end.
        """
        plan = self._make_plan(limits, admit=True)
        while not plan.chunks and self._break_deadlock():
            # The freed blocks are for those that run already.
            plan = self._make_plan(limits, admit=False)
        return plan.chunks

    def _make_plan(self, limits: PrefillLimits, *, admit: bool) -> _Plan:
        plan = _Plan(self._max_num_batched_tokens)
        self._images_first = not self._images_first
        self._schedule_decodes(plan)
        if plan.chunks:
            plan.limit_prompts(limits)
        for has_images in (self._images_first, not self._images_first):
            self._schedule_prompts(plan, has_images, admit)
        return plan

    def ready_end(self, sequence: Sequence, num_computed_tokens: int) -> int:
        """Position of the first token at or after ``num_computed_tokens`` that cannot run yet, or never will."""
        if sequence.is_full:
            return num_computed_tokens
        if not sequence.has_images:
            return sequence.num_tokens
        num_ready = partial(self._readiness.num_ready_tokens, sequence.request_id)
        missing = sequence.image_spans.first_missing(num_computed_tokens, num_ready)
        return sequence.num_tokens if missing is None else missing

    def _schedule_decodes(self, plan: _Plan) -> None:
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if sequence.status is SequenceStatus.RUNNING and self._secure_block(sequence, plan):
                plan.add(sequence, sequence.num_tokens)

    def _schedule_prompts(self, plan: _Plan, has_images: bool, admit: bool) -> None:
        """Those that have begun first, unless what waits is more urgent."""
        waiting = self._waiting[has_images]
        prompts = [s for s in self.running if s.has_images is has_images and not s.is_decoding and s not in plan]
        num_first = bisect_right(prompts, waiting[0].priority, key=_priority) if admit and waiting else len(prompts)
        for sequence in prompts[:num_first]:
            self._prefill(sequence, plan)
        if admit:
            self._admit(plan, has_images)
        for sequence in prompts[num_first:]:
            if sequence.status is SequenceStatus.RUNNING:  # not preempted by what was admitted
                self._prefill(sequence, plan)

    def _prefill(self, sequence: Sequence, plan: _Plan) -> bool:
        """Schedule as much of the prompt as is ready, within the budget and the free blocks."""
        start = sequence.num_computed_tokens
        room = (len(sequence.block_table) + self.blocks.num_free_blocks) * self.blocks.block_size
        end = min(self.ready_end(sequence, start), start + plan.room(sequence), room)
        if end <= start:
            return False
        self.blocks.allocate(sequence, end)
        plan.add(sequence, end)
        return True

    def _admit(self, plan: _Plan, has_images: bool) -> None:
        """Start waiting sequences in order; one that has nothing to run yet lets others pass."""
        queue = self._waiting[has_images]
        for sequence in list(queue):
            if plan.room(sequence) == 0 or len(self.running) >= self._max_num_seqs:
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
        _insert_last(self.running, sequence)
        if sequence.num_preemptions == 0:
            num_prepared_tokens = min(num_cached_tokens, sequence.num_prepared_tokens)
            sequence.num_cached_tokens = num_cached_tokens - num_prepared_tokens
            self.num_prefix_queries += sequence.num_tokens - num_prepared_tokens
            self.num_prefix_hits += sequence.num_cached_tokens

    def _may_start(self, sequence: Sequence, num_cached_tokens: int) -> bool:
        ready_end = self.ready_end(sequence, num_cached_tokens)
        if ready_end <= num_cached_tokens or self._will_share(sequence, num_cached_tokens):
            return False
        if not self._holds.lets_finish(sequence):
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
                other.request_id == sequence.request_id and other.num_committed_tokens < num_shareable
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
        _insert_first(self._waiting[sequence.has_images], sequence)

    def _is_stalled(self, sequence: Sequence) -> bool:
        start = sequence.num_computed_tokens
        return start < sequence.num_tokens and self.ready_end(sequence, start) <= start


def _priority(sequence: Sequence) -> int:
    return sequence.priority


def _insert_last(line: list[Sequence], sequence: Sequence) -> None:
    """Behind those of the same priority."""
    line.insert(bisect_right(line, sequence.priority, key=_priority), sequence)


def _insert_first(line: list[Sequence], sequence: Sequence) -> None:
    """Before those of the same priority."""
    line.insert(bisect_left(line, sequence.priority, key=_priority), sequence)
