"""Many prompts at once on a bounded number of threads. One that fails costs the others nothing."""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from common.service.errors import DvdError, InternalError
from deploy.offline.prompt import Prompt
from deploy.offline.reply import Pieces, Reply, Stream

Outcome = Reply | DvdError
Ask = Callable[[Prompt], Stream]


class BatchError(DvdError):
    """Some prompts of a batch failed; raised when all have ended.

    Attributes:
        replies: in the order of the prompts, None for those that failed.
        errors: of those that failed, by index.
    """

    def __init__(self, outcomes: Sequence[Outcome | None]) -> None:
        self.replies = [each if isinstance(each, Reply) else None for each in outcomes]
        self.errors = {index: each for index, each in enumerate(outcomes) if isinstance(each, DvdError)}
        index, first = next(iter(self.errors.items()))
        super().__init__(
            f"{len(self.errors)} of {len(outcomes)} prompts failed; the first, number {index}: {first.message}",
            code=first.code,
            param=first.param,
        )


class BatchStream(Pieces[tuple[int, str]]):
    """(index of the prompt, piece of its answer) as they come; afterwards ``replies`` holds the whole.

    Asks when the first piece is wanted. Closed early, also by leaving a ``with`` block, it cancels all that has not
    ended, at its next token.

    Raises:
        BatchError: from the iteration, when all have ended and some have failed.
    """

    def __init__(self, ask: Ask, prompts: Sequence[Prompt], max_concurrency: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * len(prompts)
        """Of each prompt so far: reply, error, or None while it runs."""
        self._pieces = self._run(_Workers(ask, prompts, max_concurrency))

    @property
    def replies(self) -> list[Reply]:
        """Those there are, in the order of the prompts."""
        return [each for each in self.outcomes if isinstance(each, Reply)]

    def finish(self) -> list[Reply]:
        """Wait for the end."""
        for _ in self:
            pass
        return self.replies

    def _run(self, workers: "_Workers") -> Generator[tuple[int, str]]:
        workers.start()
        num_open = len(self.outcomes)
        try:
            while num_open > 0:
                event = workers.events.get()
                if isinstance(event.what, str):
                    yield event.index, event.what
                else:
                    self.outcomes[event.index] = event.what
                    num_open -= 1
        finally:
            workers.cancel()
        if any(isinstance(each, DvdError) for each in self.outcomes):
            raise BatchError(self.outcomes)


@dataclass(frozen=True, slots=True)
class _Event:
    """A piece of an answer, or how it ended."""

    index: int
    what: str | Outcome


class _Workers:
    """Threads that take prompts and tell what comes of them. Daemons: an interpreter that ends does not wait for them.

    ``events`` has no bound of its own: it holds no more than the answers, which the caller keeps as well.
    """

    def __init__(self, ask: Ask, prompts: Sequence[Prompt], max_concurrency: int) -> None:
        self.events: SimpleQueue[_Event] = SimpleQueue()
        self._ask = ask
        self._waiting: SimpleQueue[tuple[int, Prompt]] = SimpleQueue()
        for numbered in enumerate(prompts):
            self._waiting.put(numbered)
        self._num_threads = min(max_concurrency, len(prompts))
        self._cancelled = threading.Event()

    def start(self) -> None:
        for number in range(self._num_threads):
            threading.Thread(target=self._work, name=f"dvd prompts {number}", daemon=True).start()

    def cancel(self) -> None:
        self._cancelled.set()

    def _work(self) -> None:
        while not self._cancelled.is_set():
            try:
                index, prompt = self._waiting.get_nowait()
            except Empty:
                return
            self._answer(index, prompt)

    def _answer(self, index: int, prompt: Prompt) -> None:
        # A bug ends this thread with its traceback; whoever waits for the prompt is told all the same.
        outcome: Outcome = InternalError("asking failed")
        try:
            with closing(self._ask(prompt)) as pieces:
                for piece in pieces:
                    if self._cancelled.is_set():
                        return
                    self.events.put(_Event(index, piece))
                outcome = pieces.finish()
        except DvdError as error:
            outcome = error
        finally:
            self.events.put(_Event(index, outcome))
