"""Runs a plan against a server: sends every request when it is due, and waits for all answers. Computes no statistics.

    result = run(plan, Target("http://127.0.0.1:8000"))

One process, one event loop. Bodies are built ahead of time in threads, since a picture takes longer to encode than a
small model takes to answer. Whatever the client itself costs is written down: how late a request left
(``Sample.lag``), how long the cap on concurrency held it back (``Sample.queue``), and the CPU time of the process.
"""

import asyncio
import contextlib
import itertools
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import numpy as np
import uvloop

from benchmarks.ahead import Ahead, body_builders
from benchmarks.arrivals import Arrivals, ClosedLoop, OpenLoop, Ramp, Replay, send_times
from benchmarks.client import Client
from benchmarks.plan import Phase, Plan, Source, Target
from benchmarks.samples import PhaseResult, Result, Sample
from benchmarks.workload import Recipe, recipes, render
from common.service.errors import Unavailable

_FAILURE_PAUSE_SECONDS: Final = 0.1
"""A closed loop that fails waits this long, so that a server that refuses is not flooded."""
_PROBE_SEED: Final = 2**40


@dataclass(slots=True)
class Progress:
    """Where a run is; kept up to date for whoever looks."""

    phase: str = ""
    opened_at: float = 0.0
    duration: float | None = None
    num_requests: int | None = None
    is_draining: bool = False
    """The window has closed; what is on its way is waited for."""
    num_done: int = 0
    num_failed: int = 0
    num_in_flight: int = 0


class Observer(Protocol):
    """Shows ``progress`` while the block runs."""

    def watching(self, progress: Progress) -> contextlib.AbstractAsyncContextManager[None]: ...


class _Nobody:
    @contextlib.asynccontextmanager
    async def watching(self, progress: Progress) -> AsyncIterator[None]:
        del progress
        yield


def run(plan: Plan, target: Target, observer: Observer | None = None) -> Result:
    """Run all phases, one after the other.

    Raises:
        ConfigError: ``target`` is not a URL.
        Unavailable: the server does not answer, or fails the one request of each source that is tried first.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_plan(plan, target, observer))


async def run_plan(plan: Plan, target: Target, observer: Observer | None = None) -> Result:
    """``run``, for a program that has an event loop."""
    _allow_many_sockets()
    started, wall, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    async with Client(target) as client:
        model = target.model or (await client.model_names())[0]
        with body_builders() as builders:
            await _probe(plan, client, model, target.base_url)
            progress = Progress()
            async with (observer or _Nobody()).watching(progress):
                phases = []
                for index, phase in enumerate(plan.phases):
                    running = _RunningPhase(
                        phase, _Parts(client, model, builders, progress, plan.salt), plan.seed, index
                    )
                    phases.append(await running.run())
    load = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return Result(plan, target.base_url, model, started.isoformat(timespec="seconds"), load, phases)


async def _probe(plan: Plan, client: Client, model: str, base_url: str) -> None:
    """Ask one request of every source, alone: what is wrong with all of them is better said before than after."""
    sources = {source.name: source for phase in plan.phases for source in phase.sources}
    for source in sources.values():
        recipe = next(recipes(source.workload, _PROBE_SEED + plan.seed, salt=plan.salt))
        if isinstance(source.arrivals, Replay):
            first = source.arrivals.requests[0]
            recipe = replace(recipe, input_tokens=first.input_tokens, output_tokens=first.output_tokens)
        sample = _sample(source.name, recipe, time.perf_counter())
        await client.ask(await asyncio.to_thread(render, recipe, source.workload, model), sample)
        if sample.failure is not None:
            reason = f"{sample.failure}: {sample.failure.message}".removesuffix(": ")
            raise Unavailable(f"{base_url}: the first request ({source.name}) failed: {reason}")


@dataclass(frozen=True, slots=True)
class _Parts:
    """What all sources of a run share."""

    client: Client
    model: str
    builders: ThreadPoolExecutor
    progress: Progress
    salt: int


class _RunningPhase:
    """One phase while it runs."""

    def __init__(self, phase: Phase, parts: _Parts, seed: int, index: int) -> None:
        self._phase = phase
        self._progress = parts.progress
        seeds = np.random.SeedSequence([seed, index]).spawn(len(phase.sources))
        # One source alone stops at its count; beside others it is their background until all have theirs.
        is_alone = len(phase.sources) == 1
        self._sources = [
            _RunningSource(source, parts, own, phase.warmup, is_alone)
            for source, own in zip(phase.sources, seeds, strict=True)
        ]

    async def run(self) -> PhaseResult:
        try:
            await asyncio.gather(*(source.ahead.until_ready() for source in self._sources))
            return await self._run()
        finally:
            for source in self._sources:
                source.ahead.close()

    async def _run(self) -> PhaseResult:
        started_at = time.perf_counter()
        opens_at = started_at + self._phase.warmup
        self._show(opens_at)
        try:
            async with asyncio.TaskGroup() as group:
                for source in self._sources:
                    source.start(group, started_at, opens_at)
                await self._until_closed(opens_at)
                closed_at = time.perf_counter()
                self._progress.is_draining = True
                for source in self._sources:
                    source.stop()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # ours: what requests can suffer is in their samples
        samples = sorted((s for source in self._sources for s in source.samples), key=lambda sample: sample.sent_at)
        unsent = Counter({source.name: source.num_unsent for source in self._sources})
        return PhaseResult(self._phase, opens_at, closed_at, samples, unsent)

    async def _until_closed(self, opens_at: float) -> None:
        """Until the duration is over or every bounded source has its answers, whichever comes first."""
        bounded = [source.answered.wait() for source in self._sources if source.is_bounded]
        end = None if self._phase.duration is None else opens_at + self._phase.duration - time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(end):
                await (asyncio.gather(*bounded) if bounded else asyncio.Event().wait())

    def _show(self, opens_at: float) -> None:
        counts = [source.num_requests for source in self._sources]
        self._progress.phase, self._progress.opened_at = self._phase.name, opens_at
        self._progress.duration, self._progress.is_draining = self._phase.duration, False
        self._progress.num_requests = sum(count or 0 for count in counts) if any(counts) else None
        self._progress.num_done = self._progress.num_failed = 0


class _RunningSource:
    """One source while its phase runs: sends, and keeps the samples."""

    def __init__(
        self, source: Source, parts: _Parts, seed: np.random.SeedSequence, warmup: float, is_alone: bool
    ) -> None:
        self.name, self.is_bounded = source.name, source.is_bounded
        self.samples: list[Sample] = []
        self.num_unsent = 0
        self.answered = asyncio.Event()
        """A bounded source: as many requests as it asked for, due inside the window, have ended."""
        self.num_requests = _bound(source)
        self._arrivals = source.arrivals
        self._parts = parts
        self._warmup = warmup
        self._is_alone = is_alone
        self._rng = np.random.default_rng(seed.spawn(1)[0])
        recorded = source.arrivals.requests if isinstance(source.arrivals, Replay) else None
        order = recipes(source.workload, int(seed.generate_state(1, np.uint64)[0]), recorded, parts.salt)
        if is_alone and not warmup:  # exactly as many as will be sent: pictures are dear
            order = itertools.islice(order, self.num_requests)
        self.ahead = Ahead(order, source, parts.model, parts.builders)
        self._slots = _slots(source.arrivals)
        self._opens_at = 0.0
        self._num_counted = self._num_answered = 0
        self._is_stopped = False
        self._sending: asyncio.Task[None] | None = None

    def start(self, group: asyncio.TaskGroup, started_at: float, opens_at: float) -> None:
        """Every request belongs to ``group``."""
        self._opens_at = opens_at
        if isinstance(self._arrivals, ClosedLoop):
            for _ in range(self._arrivals.concurrency):
                group.create_task(self._loop())
        else:
            self._sending = group.create_task(self._send(group, self._arrivals, started_at))

    def stop(self) -> None:
        """Send nothing more."""
        self._is_stopped = True
        self.ahead.close()
        if self._sending is not None:
            self._sending.cancel()

    async def _loop(self) -> None:
        """One client of a closed loop."""
        while self._may_send(due_at := time.perf_counter()):
            sample = await self._ask(due_at)
            if sample is not None and not sample.is_ok:
                await asyncio.sleep(_FAILURE_PAUSE_SECONDS)

    async def _send(self, group: asyncio.TaskGroup, arrivals: OpenLoop | Ramp | Replay, started_at: float) -> None:
        for at in send_times(arrivals, self._rng, self._warmup):
            due_at = started_at + at
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            if not self._may_send(due_at):
                return
            group.create_task(self._ask(due_at))

    def _may_send(self, due_at: float) -> bool:
        """Whether one more request may follow; if it belongs to the window, it is counted."""
        if self._is_stopped:
            return False
        if due_at < self._opens_at:
            return True
        if self._is_alone and self.num_requests is not None and self._num_counted >= self.num_requests:
            return False
        self._num_counted += 1
        return True

    async def _ask(self, scheduled_at: float) -> Sample | None:
        """One request from its due time to the end of its answer; None if it was never sent."""
        async with self._slots:
            queue = max(0.0, time.perf_counter() - scheduled_at) if self._is_capped else 0.0
            if self._is_stopped:
                self.num_unsent += 1
                return None
            recipe, body = await self.ahead.take()
            sample = _sample(self.name, recipe, scheduled_at)
            sample.queue = queue
            self._parts.progress.num_in_flight += 1
            try:
                await self._parts.client.ask(body, sample)
            finally:
                self._parts.progress.num_in_flight -= 1
        self._keep(sample)
        return sample

    @property
    def _is_capped(self) -> bool:
        return isinstance(self._slots, asyncio.Semaphore)

    def _keep(self, sample: Sample) -> None:
        self.samples.append(sample)
        if sample.scheduled_at < self._opens_at:
            return
        self._num_answered += 1
        self._parts.progress.num_done += 1
        self._parts.progress.num_failed += not sample.is_ok
        if self.num_requests is not None and self._num_answered >= self.num_requests:
            self.answered.set()


def _sample(source: str, recipe: Recipe, scheduled_at: float) -> Sample:
    return Sample(source, len(recipe.pictures), recipe.output_tokens, scheduled_at)


def _bound(source: Source) -> int | None:
    if isinstance(source.arrivals, Replay):
        return min(len(source.arrivals.requests), source.num_requests or len(source.arrivals.requests))
    return source.num_requests


def _slots(arrivals: Arrivals) -> contextlib.AbstractAsyncContextManager[Any]:
    """What a request needs to be sent; fair, first come, first served."""
    cap = None if isinstance(arrivals, ClosedLoop) else arrivals.max_concurrency
    return contextlib.nullcontext() if cap is None else asyncio.Semaphore(cap)


def _allow_many_sockets() -> None:
    """One for each stream: the usual soft limit of 1024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65536, hard))
