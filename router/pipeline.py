"""The story of a chat request, from a language server's ``Admitted`` to its last token (docs/life-of-a-request.md).

Knows nothing of HTTP and nothing of pixels. Everything a request starts lives inside ``Pipeline.run`` and ends with
it: when the client leaves, the caller cancels ``run``, and ``Generate`` and every ``Score`` and ``Encode`` are
cancelled at once.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Protocol

from common.service import metrics
from common.service.errors import DeadlineExceeded, DvdError, InternalError, Unavailable
from protos.language_pb2 import Admitted, Finished, GenerateEvent, Token
from router.causes import cause_of
from router.encoding import encode_missing
from router.fleet import Fleet
from router.record import RequestRecord
from router.request import ChatRequest
from router.workers import LanguageWorker

MAX_GENERATE_ATTEMPTS: Final = 2
ENCODE_GRACE_SECONDS: Final = 1.0
"""Once all tokens are there, the features were delivered; the replies that say so get this long to arrive."""


class Answer(Protocol):
    """Where tokens go: an event stream or a collected body."""

    async def on_token(self, token: Token) -> None:
        """One generated token. The first one makes the answer's status final."""
        ...

    async def on_finished(self, finished: Finished) -> None:
        """One choice has ended."""
        ...


class Pipeline:
    """Runs requests on the fleet. Holds no state of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def run(self, request: ChatRequest, answer: Answer, record: RequestRecord) -> None:
        """Answer one request.

        Raises:
            InvalidRequest: an image or the prompt turned out to be unusable; nothing was answered.
            Overloaded, Unavailable: the servers cannot take it, or were lost and retries are used up.
            DeadlineExceeded: its time is used up.
            InternalError: a server broke the protocol.
        """
        try:
            async with asyncio.timeout(request.deadline.remaining()):
                await self._run_with_retry(request, answer, record)
        except TimeoutError:
            raise DeadlineExceeded("the request's time is used up") from None

    async def _run_with_retry(self, request: ChatRequest, answer: Answer, record: RequestRecord) -> None:
        """Before the first token, losing a server is nobody's business but ours."""
        tried: set[str] = set()
        failure: DvdError = Unavailable("no language server is available")
        while len(tried) < MAX_GENERATE_ATTEMPTS:
            language = self._fleet.pick_language(request.generate.request_id, exclude=tried)
            if language is None:
                break
            if tried:
                metrics.DISPATCH_RETRIES.labels("language", failure.code).inc()
            tried.add(language.address)
            try:
                return await self._generate(language, request, answer, record)
            except Unavailable as error:
                if record.has_first_token:
                    raise
                failure = error
        raise failure

    async def _generate(
        self, language: LanguageWorker, request: ChatRequest, answer: Answer, record: RequestRecord
    ) -> None:
        """One attempt on one language server: its tokens are relayed while the images are encoded."""
        with language.generate(request.generate, request.deadline.remaining()) as events:
            admitted = await _wait_admitted(events)
            record.admitted(admitted)
            try:
                async with asyncio.TaskGroup() as group:
                    encoding = None
                    if admitted.missing:
                        encoding = group.create_task(encode_missing(self._fleet, request, admitted, record))
                    await _relay(events, request.num_choices, encoding, answer, record)
            except BaseExceptionGroup as errors:
                raise cause_of(errors) from None


async def _wait_admitted(events: AsyncIterator[GenerateEvent]) -> Admitted:
    """The first event of every call."""
    async for event in events:
        if event.WhichOneof("event") != "admitted":
            raise InternalError("a server answered before it admitted")
        return event.admitted
    raise Unavailable("a language server ended a call early")


async def _relay(
    events: AsyncIterator[GenerateEvent],
    num_choices: int,
    encoding: asyncio.Task[None] | None,
    answer: Answer,
    record: RequestRecord,
) -> None:
    """Pass tokens on until every choice has ended and the server has ended the call."""
    num_open = num_choices
    async for event in events:
        kind = event.WhichOneof("event")
        if kind == "token":
            record.token(event.token)
            await answer.on_token(event.token)
        elif kind == "finished":
            num_open -= 1
            record.choice_finished(event.finished)
            if num_open == 0:
                await _settle(encoding)
                record.stage = "done"
            await answer.on_finished(event.finished)
        else:
            raise InternalError("a server admitted twice")
    if num_open > 0:
        raise Unavailable("a language server ended a call early")


async def _settle(encoding: asyncio.Task[None] | None) -> None:
    """Take in the last replies of vision servers; whoever is later than that is not waited for."""
    if encoding is not None:
        await asyncio.wait([encoding], timeout=ENCODE_GRACE_SECONDS)
        encoding.cancel()
