"""The one thread in which the engine runs: requests go in through a bounded queue, tokens come out on the event loop.

The engine is synchronous and knows no threads; asyncio stays on the other side of ``EngineThread``. Without work the
thread sleeps. If it dies, every request is told and ``ended`` says why. Knows nothing of gRPC or text.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol, TypeVar

from common.service import failpoints, metrics
from common.service.errors import DvdError, Overloaded, Unavailable
from language_server.decode_threads import DecodeThreads
from language_server.engine import EngineStats, LanguageEngine, StepOutput
from language_server.pace import PrefillPace
from language_server.sequence import Sequence, SequenceStatus

_IDLE_SECONDS: Final = 0.5
"""An idle thread shows a sign of life this often, well inside the router's patience of 3 s."""
_MAX_STEPS_AHEAD: Final = 64
"""Steps whose tokens the event loop has not yet taken; beyond it the engine waits."""
_COUNTERS: Final = (
    metrics.LANGUAGE_PREEMPTIONS,
    metrics.LANGUAGE_PREFIX_CACHE_QUERIES,
    metrics.LANGUAGE_PREFIX_CACHE_HITS,
)
_T = TypeVar("_T")


class SequenceSink(Protocol):
    """Who hears of a sequence. Called on the event loop, never after ``abort``."""

    def on_start(self, seq_id: int, when: float) -> None:
        """The sequence was scheduled for the first time, at ``time.monotonic`` seconds ``when``."""
        ...

    def on_output(self, output: StepOutput) -> None:
        """A token, the end, or both; ``error`` is never set."""
        ...

    def on_failure(self, error: DvdError) -> None: ...


class EngineThread:
    """Owns the engine. Public methods belong to the event loop.

    Args:
        max_num_live: sequences inside at once, waiting or running; this bounds every queue here.
        on_progress: called from the thread after every step, and twice a second while it has nothing to do.
        turn: entered for each step, before its sequences are chosen: whoever shares the device may be using it.
        pace: how long prompts may make a step beside sequences that generate.
        is_awaiting_features: whether a vision server works for us, on cores that may be ours.
    """

    def __init__(
        self,
        max_num_live: int,
        *,
        on_progress: Callable[[], None] = lambda: None,
        turn: AbstractContextManager[None] | None = None,
        pace: PrefillPace | None = None,
        is_awaiting_features: Callable[[], bool] = lambda: False,
    ) -> None:
        self._max_num_live = max_num_live
        self._on_progress = on_progress
        self._turn = turn or nullcontext()
        self._pace = pace or PrefillPace()
        self._is_awaiting_features = is_awaiting_features
        self._decode_threads: DecodeThreads | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._sinks: dict[int, SequenceSink] = {}
        self._asked: set[asyncio.Future[int]] = set()  # not answered
        self._wake = threading.Condition()  # guards the six fields below
        self._added: deque[Sequence] = deque()
        self._aborted: deque[tuple[Items[int], Callable[[], None]]] = deque()
        self._to_hold: deque[tuple[Sequence, asyncio.Future[int]]] = deque()
        self._may_have_work = False
        self._is_stopping = False
        self._num_steps_ahead = 0
        self.num_tokens = 0  # generated since the start
        self._unstarted: dict[int, Sequence] = {}  # of the thread, as the next
        self._num_counted = (0, 0, 0)  # preemptions, prefix queries and hits that the metrics know of
        self._engine: LanguageEngine
        self._loop: asyncio.AbstractEventLoop
        self.stats: EngineStats | None = None  # of the last step
        self.ended: asyncio.Future[None] | None = None

    async def call(self, function: Callable[[], _T]) -> _T:
        """Run something in the thread before ``start``: loading, warm-up."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def start(self, engine: LanguageEngine, decode_threads: DecodeThreads | None = None) -> None:
        """Begin to step. ``ended`` finishes with the thread: with an exception unless ``stop`` was called."""
        self._engine = engine
        self._decode_threads = decode_threads
        self.stats = engine.stats()
        self._loop = asyncio.get_running_loop()
        self.ended = self._loop.run_in_executor(self._executor, self._run)
        self.ended.add_done_callback(self._on_ended)

    async def stop(self, timeout: float) -> bool:
        """End the thread after the step it is in; False if that takes longer than ``timeout`` seconds."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._executor.shutdown(wait=False)
        if self.ended is None:
            return True
        done, _ = await asyncio.wait([self.ended], timeout=timeout)
        return bool(done)

    @property
    def num_live(self) -> int:
        return len(self._sinks)

    def check_room(self, num_sequences: int) -> None:
        """Raises Overloaded when so many more sequences may not enter."""
        if len(self._sinks) + num_sequences > self._max_num_live:
            raise Overloaded("too many requests are waiting")

    def add(self, sequences: Iterable[Sequence], sink: SequenceSink) -> None:
        """Hand sequences to the engine.

        Raises:
            Overloaded: too many are inside.
            Unavailable: the engine has died.
        """
        sequences = list(sequences)
        self.check_room(len(sequences))
        if self.ended is None or self.ended.done():
            raise _died()
        self._sinks.update(dict.fromkeys((sequence.seq_id for sequence in sequences), sink))
        with self._wake:
            self._added.extend(sequences)
            self._wake.notify()

    @property
    def block_size(self) -> int:
        """Tokens of KV that are found again together."""
        return self._engine.block_size

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Of its prompt, at this moment; a look from outside, which waits for no step."""
        return self._engine.num_cached_tokens(sequence)

    async def hold(self, holder: Sequence) -> int:
        """See ``LanguageEngine.hold``; waits for the step that runs. ``abort`` ends it, also if this was cancelled.

        Raises:
            Unavailable: the engine has died.
        """
        if self.ended is None or self.ended.done():
            raise _died()
        num_tokens: asyncio.Future[int] = self._loop.create_future()
        self._asked.add(num_tokens)
        num_tokens.add_done_callback(self._asked.discard)
        with self._wake:
            self._to_hold.append((holder, num_tokens))
            self._wake.notify()
        return await num_tokens

    def abort(self, seq_ids: Items[int], on_done: Callable[[], None] = lambda: None) -> None:
        """Take sequences out, finished or not. ``on_done`` is called once the engine has let go of them."""
        for seq_id in seq_ids:
            self._sinks.pop(seq_id, None)
        if self.ended is None or self.ended.done():
            on_done()
            return
        with self._wake:
            self._aborted.append((seq_ids, on_done))
            self._wake.notify()

    def wake(self) -> None:
        """Something that sequences waited for is there, such as image features."""
        with self._wake:
            self._may_have_work = True
            self._wake.notify()

    # --- on the event loop

    def _deliver(self, started: Items[tuple[int, float]], outputs: Items[StepOutput]) -> None:
        with self._wake:
            self._num_steps_ahead -= 1
            self._wake.notify()
        for seq_id, when in started:
            if (sink := self._sinks.get(seq_id)) is not None:
                sink.on_start(seq_id, when)
        for output in outputs:
            if output.error is not None:
                self._refuse(output.seq_id, output.error)
                continue
            sink = self._sinks.pop(output.seq_id, None) if output.finish_reason else self._sinks.get(output.seq_id)
            if sink is not None:
                sink.on_output(output)

    def _refuse(self, seq_id: int, error: DvdError) -> None:
        if (sink := self._sinks.pop(seq_id, None)) is not None:
            sink.on_failure(error)

    def _on_ended(self, _: asyncio.Future[None]) -> None:
        for seq_id in list(self._sinks):
            self._refuse(seq_id, _died())
        with self._wake:
            aborted = list(self._aborted)
        for _seq_ids, on_done in aborted:
            on_done()
        for asked in list(self._asked):
            if not asked.done():
                asked.set_exception(_died())

    # --- in the thread

    def _run(self) -> None:
        while self._wait_for_work():
            with self._turn:
                self._take_commands()
                self._choose_threads()
                started = time.monotonic()
                if failpoints.ARE_ON:
                    failpoints.hit("language.step")
                outputs = self._engine.step(self._pace.limits)
                ended = time.monotonic()
            self._publish(started, ended, outputs)
            self._on_progress()

    def _choose_threads(self) -> None:
        if self._decode_threads is not None and self.stats is not None:
            is_shared = self._is_awaiting_features()
            self._engine.decode_threads = self._decode_threads.of_step(self.stats.num_step_decodes, is_shared)
            self._engine.prompt_threads = self._decode_threads.of_prompts(is_shared)

    def _wait_for_work(self) -> bool:
        """False when the thread is to stop."""
        with self._wake:
            while not self._is_stopping and not self._can_step():
                self._wake.wait(_IDLE_SECONDS)
                self._on_progress()
            return not self._is_stopping

    def _take_commands(self) -> None:
        """Bring the engine up to date."""
        with self._wake:
            added, self._added = self._added, deque()
            aborted, self._aborted = self._aborted, deque()
            to_hold, self._to_hold = self._to_hold, deque()
            self._may_have_work = False
        for holder, num_tokens in to_hold:
            self._loop.call_soon_threadsafe(_answer, num_tokens, self._engine.hold(holder))
        for sequence in added:
            self._enter(sequence)
        for seq_ids, on_done in aborted:
            for seq_id in seq_ids:
                self._engine.abort(seq_id)
                self._unstarted.pop(seq_id, None)
            self._loop.call_soon_threadsafe(on_done)

    def _can_step(self) -> bool:
        if self._added or self._aborted or self._to_hold:
            return True
        return self._num_steps_ahead < _MAX_STEPS_AHEAD and self._may_have_work

    def _enter(self, sequence: Sequence) -> None:
        try:
            self._engine.add(sequence)
        except DvdError as error:
            self._loop.call_soon_threadsafe(self._refuse, sequence.seq_id, error)
        else:
            self._unstarted[sequence.seq_id] = sequence

    def _publish(self, when: float, ended: float, outputs: list[StepOutput]) -> None:
        """Send what a step brought to the event loop. It ran from ``when`` to ``ended``, monotonic seconds."""
        self.stats = stats = self._engine.stats()
        self._learn(stats, ended - when)
        self._count(stats)
        self.num_tokens += sum(output.token_id is not None for output in outputs)
        has_moved = bool(outputs) or stats.num_step_tokens > 0
        with self._wake:
            # Without a token run or a word said, only an event from outside can change anything.
            self._may_have_work |= has_moved and self._engine.has_work()
            if not has_moved:
                return
            self._num_steps_ahead += 1
        started = [
            (seq_id, when)
            for seq_id, sequence in self._unstarted.items()
            if sequence.status is not SequenceStatus.WAITING
        ]
        for seq_id, _ in started:
            del self._unstarted[seq_id]
        self._loop.call_soon_threadsafe(self._deliver, started, outputs)

    def _learn(self, stats: EngineStats, seconds: float) -> None:
        num_prefill_tokens = stats.num_step_tokens - stats.num_step_decodes
        self._pace.observe(stats.num_step_decodes, num_prefill_tokens, seconds)
        num_threads = self._engine.decode_threads
        if self._decode_threads is None or num_threads is None or self._is_awaiting_features():
            return
        if stats.num_step_decodes and not num_prefill_tokens:
            self._decode_threads.observe(stats.num_step_decodes, num_threads, seconds)

    def _count(self, stats: EngineStats) -> None:
        if stats.num_step_tokens:
            metrics.LANGUAGE_STEP_TOKENS.observe(stats.num_step_tokens)
            metrics.LANGUAGE_STEP_REQUESTS.observe(stats.num_step_sequences)
        now = (stats.num_preemptions, stats.num_prefix_queries, stats.num_prefix_hits)
        for counter, value, before in zip(_COUNTERS, now, self._num_counted, strict=True):
            counter.inc(value - before)
        self._num_counted = now


def _answer(asked: asyncio.Future[int], number: int) -> None:
    if not asked.done():
        asked.set_result(number)


def _died() -> Unavailable:
    return Unavailable("the engine of this server has stopped")
