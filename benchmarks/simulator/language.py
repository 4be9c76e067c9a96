"""One language server: continuous batching; what is ready of the prompts is read in chunks beside the decode steps.

A step has one token of every running sequence, and as much of the prompts as the token budget leaves. KV memory for
the whole of a request is reserved when it is admitted, in order of arrival: nothing is ever preempted. While only
decoding goes on and nothing new can begin, many steps are one event.

With a ``tower`` it is the undivided baseline: the same devices encode the tiles of admitted requests, one batch
between two steps, and nothing else happens meanwhile.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable

from benchmarks.simulator.hardware import LanguageRates, VisionRates
from benchmarks.simulator.jobs import Image, Job
from benchmarks.simulator.lanes import Busy, Clock

Gaps = list[tuple[float, int]]
"""Seconds between two tokens of an answer, and how many tokens came so."""


class LanguageServer:
    """``load``: tokens that its requests still have to read or write."""

    def __init__(
        self,
        clock: Clock,
        rates: LanguageRates,
        busy: Busy,
        gaps: Gaps,
        on_end: Callable[[Job], None],
        tower: VisionRates | None = None,
    ) -> None:
        self._clock, self._rates, self._busy, self._gaps, self._on_end = clock, rates, busy, gaps, on_end
        self._tower = tower
        self._waiting: deque[Job] = deque()
        self._readable: deque[Job] = deque()
        self._unencoded: deque[tuple[Job, Image]] = deque()
        self._admitted: dict[Job, None] = {}
        self._running: list[tuple[int, int, Job]] = []  # a heap by the step in which they end
        self._kv_tokens = 0
        self._context = 0  # tokens of all running sequences
        self._step = 0
        self._stepped_at = 0.0
        self._is_busy = False
        self._began_at = 0.0
        self._jump: tuple[float, float, int] | None = None  # begin, seconds, steps of what only decodes
        self._generation = 0  # of the event that is waited for: others are stale
        self._is_after_batch = False
        self._chunks: list[tuple[Job, int]] = []
        self.load = 0
        self.num_tokens_out = 0
        self.is_lost = False

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        self.load += job.prompt_tokens - job.num_read + job.output_tokens
        self._wake()

    def receive(self, job: Job, image: Image, num_tiles: int) -> None:
        """Features of the next tiles of an image have come."""
        image.num_there += num_tiles
        job.count_ready()
        if job in self._admitted:
            self._note_readable(job)
            self._wake()

    def lose(self) -> list[Job]:
        """It is gone; returns what somebody else has to answer."""
        self.is_lost = True
        for ends, _, job in self._running:
            job.num_generated = job.output_tokens - (ends - self._step)
        return [*self._admitted, *self._waiting]

    # --- one step after the other

    def _wake(self) -> None:
        """Something may begin: now, or after the step that is under way."""
        if not self._is_busy:
            self._next()
        elif self._jump is not None and (self._readable or self._may_admit()):
            self._shorten()

    def _shorten(self) -> None:
        assert self._jump is not None  # asked before
        begin, seconds, steps = self._jump
        each = seconds / steps
        done = max(1, math.ceil((self._clock.now - begin) / each - 1e-9))
        if done < steps:
            ends = max(begin + done * each, self._clock.now)
            self._expect(ends - self._clock.now, done)
        self._jump = None

    def _next(self) -> None:
        self._jump = None
        while self._may_admit():
            self._admit(self._waiting.popleft())
        if self._unencoded and not self._is_after_batch:
            self._encode()
            return
        self._is_after_batch = False
        batch = len(self._running)
        self._chunks = self._take_chunks(self._rates.max_num_batched_tokens - batch)
        if self._chunks:
            self._expect(self._mixed_seconds(batch), 1)
        elif batch:
            steps = self._running[0][0] - self._step
            # Contexts grow by one a step: what the middle step takes, all of them take on average.
            seconds = steps * self._rates.decode_seconds(batch, self._context / batch + (steps - 1) / 2)
            self._jump = (self._clock.now, seconds, steps)
            self._expect(seconds, steps)
        elif self._unencoded:
            self._encode()

    def _expect(self, seconds: float, steps: int) -> None:
        if not self._is_busy:
            self._is_busy = True
            self._began_at = self._clock.now
        self._generation += 1
        generation = self._generation
        self._clock.after(seconds, lambda: self._finish(generation, steps))

    def _take_chunks(self, budget: int) -> list[tuple[Job, int]]:
        chunks = []
        while budget > 0 and self._readable:
            job = self._readable[0]
            taken = min(budget, job.num_ready - job.num_read)
            chunks.append((job, taken))
            budget -= taken
            if job.num_read + taken == job.num_ready:
                self._readable.popleft()
                job.is_queued = False
            # A chunk that does not take all has used up the budget.
        return chunks

    def _mixed_seconds(self, batch: int) -> float:
        """Chunks pay for the tokens together, and each for the context it looks back on. The weights are read once:
        of the running sequences only what they cost beyond that is added."""
        rates = self._rates
        seconds = rates.prefill_seconds(sum(taken for _, taken in self._chunks))
        for job, taken in self._chunks:
            if job.num_read:
                beyond = rates.prefill_seconds(job.num_read + taken) - rates.prefill_seconds(job.num_read)
                seconds += max(0.0, beyond - rates.prefill_seconds(taken))
        if not batch:
            return seconds
        alone = rates.decode_seconds(batch, self._context / batch)
        return max(alone, seconds + alone - rates.decode_seconds(1, 1))

    def _finish(self, generation: int, steps: int) -> None:
        if generation != self._generation or self.is_lost:
            return
        now, batch = self._clock.now, len(self._running)
        self._is_busy = False
        self._busy.add(self._began_at, now)
        if batch:
            self._gaps.append(((now - self._stepped_at) / steps, batch * steps))
        self._stepped_at = now
        self._step += steps
        self._context += batch * steps
        self.num_tokens_out += batch * steps
        self.load -= batch * steps
        while self._running and self._running[0][0] <= self._step:
            job = heapq.heappop(self._running)[2]
            self._context -= job.prompt_tokens + job.output_tokens
            self._end(job)
        for job, taken in self._chunks:
            self._read(job, taken)
        self._chunks = []
        self._next()

    def _read(self, job: Job, taken: int) -> None:
        job.num_read += taken
        self.load -= taken
        if job.num_read < job.prompt_tokens:
            return
        if job.first_at is None:
            job.first_at = self._clock.now
        elif job.lost_at is not None:
            self._gaps.append((self._clock.now - job.lost_at, 1))
        job.lost_at = None
        self.num_tokens_out += 1
        self.load -= 1
        job.num_generated = 1
        if job.output_tokens == 1:
            self._end(job)
            return
        heapq.heappush(self._running, (self._step + job.output_tokens - 1, job.number, job))
        self._context += job.prompt_tokens + 1

    def _end(self, job: Job) -> None:
        del self._admitted[job]
        self._kv_tokens -= job.prompt_tokens + job.output_tokens
        job.ended_at = self._clock.now
        self._on_end(job)

    # --- what comes in

    def _may_admit(self) -> bool:
        if not self._waiting or len(self._admitted) >= self._rates.max_num_seqs:
            return False
        job = self._waiting[0]
        return self._kv_tokens + job.prompt_tokens + job.output_tokens <= self._rates.kv_tokens

    def _admit(self, job: Job) -> None:
        self._admitted[job] = None
        self._kv_tokens += job.prompt_tokens + job.output_tokens
        self._note_readable(job)
        if self._tower is not None:
            self._unencoded.extend((job, image) for image in job.images if image.num_there < image.num_tiles)

    def _note_readable(self, job: Job) -> None:
        if job.num_ready > job.num_read and not job.is_queued:
            job.is_queued = True
            self._readable.append(job)

    # --- the undivided baseline

    def _encode(self) -> None:
        """Tiles are divided over as many towers as the devices are."""
        assert self._tower is not None  # else nothing is unencoded here
        towers = max(1, self._rates.devices // self._tower.devices)
        room = self._tower.max_batch * towers
        taken: list[tuple[Job, Image, int]] = []
        while room and self._unencoded:
            job, image = self._unencoded[0]
            num_tiles = min(room, image.num_tiles - image.num_sent)
            image.num_sent += num_tiles
            room -= num_tiles
            taken.append((job, image, num_tiles))
            if image.num_sent == image.num_tiles:
                self._unencoded.popleft()
        num_tiles = sum(each for _, _, each in taken)
        self._is_busy = True
        self._is_after_batch = True
        self._began_at = self._clock.now
        seconds = self._tower.batch_seconds(math.ceil(num_tiles / towers))
        self._clock.after(seconds, lambda: self._encoded(taken))

    def _encoded(self, taken: list[tuple[Job, Image, int]]) -> None:
        if self.is_lost:
            return
        self._busy.add(self._began_at, self._clock.now)
        self._is_busy = False
        for job, image, num_tiles in taken:
            image.num_there += num_tiles
            job.count_ready()
            self._note_readable(job)
        self._next()
