"""The story of a chat request, from a language server's ``Admitted`` to its last token (docs/life-of-a-request.md).

Knows nothing of HTTP and nothing of pixels. Everything a request starts lives inside ``Pipeline.run`` and ends with
it: when the client leaves, the caller cancels ``run``, and ``Generate`` and every ``Score`` and ``Encode`` are
cancelled at once. A language server that is lost costs the client nothing: another one goes on behind the last token.
"""

import asyncio
import logging
from typing import Final, Protocol

from common.service import metrics, tracing
from common.service.errors import DeadlineExceeded, DvdError, InternalError, Overloaded, Unavailable
from protos.language_pb2 import Admitted, Finished, Token
from router.affinity import content_key
from router.causes import cause_of
from router.encoding import encode_missing
from router.fleet import Fleet
from router.language_search import LanguageSearch
from router.quarantine import Trial
from router.record import RequestRecord
from router.replay import Progress
from router.request import ChatRequest
from router.turns import Turn
from router.workers import Events, LanguageWorker, ServerLost

log = logging.getLogger(__name__)

ENCODE_GRACE_SECONDS: Final = 1.0
"""Once all tokens are there, the features were delivered; the replies that say so get this long to arrive."""


class Answer(Protocol):
    """Where tokens go: an event stream or a collected body."""

    async def on_token(self, token: Token, is_more_ready: bool) -> None:
        """One generated token. The first one makes the answer's status final. Nobody waits before the next event
        where ``is_more_ready``."""
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
                with await self._fleet.turns.take(record.num_tiles) as turn:
                    await _Run(self._fleet, request, answer, record, turn).to_its_end()
        except TimeoutError:
            raise DeadlineExceeded("the request's time is used up") from None


class _Run:
    """One request on its way through the language tier."""

    def __init__(self, fleet: Fleet, request: ChatRequest, answer: Answer, record: RequestRecord, turn: Turn) -> None:
        self._fleet = fleet
        self._request = request
        self._answer = answer
        self._record = record
        self._turn = turn
        self._progress = Progress(request.num_choices)
        self._search = LanguageSearch(fleet, request.prefix)
        self._is_admitted = False  # by the language server that has the request now
        self._trial = self._on_trial("")

    async def to_its_end(self) -> None:
        """On one language server after another, as long as they are lost. Raises DvdError."""
        request: ChatRequest = self._request
        failure: DvdError | None = None
        self._fleet.note_request("language")
        while (language := await self._search.next(request.generate.request_id)) is not None:
            if failure is not None:
                # What a lost server had is taken over in any case: its streams all want it in one moment.
                if not self._search.has_lost_one and not self._fleet.may_retry("language", failure):
                    break
                self._tell_retry(language, failure)
                request = self._progress.rest_of(self._request)
            try:
                self._trial = self._on_trial(language.address)
                async with self._trial:
                    return await self._generate(language, request)
            except Unavailable as error:
                if self._progress.is_done:  # only the end of the call was lost
                    return None
                self._search.failed(language)
                failure = error
            except Overloaded as error:
                if self._is_admitted or not self._search.may_wait_for(language):
                    raise
                failure = error
        if self._record.has_first_token:
            metrics.REPLAYS.labels("given_up").inc()
        raise failure or Unavailable("no language server is available")

    def _on_trial(self, server: str) -> Trial:
        return self._fleet.quarantine.trial(lambda: content_key(self._request.generate), server)

    def _tell_retry(self, language: LanguageWorker, failure: DvdError) -> None:
        metrics.DISPATCH_RETRIES.labels("language", failure.code).inc()
        log.warning(
            "request id=%s is given to language server %s after %d tokens: %s",
            *(self._record.request_id, language.name, self._progress.num_tokens, failure.message),
        )

    async def _generate(self, language: LanguageWorker, request: ChatRequest) -> None:
        """One attempt on one language server: its tokens are relayed while the images are encoded."""
        self._is_admitted = False
        with self._search.watch():
            if not language.is_usable:  # any more, after others had their turn: whoever calls it now hears of a death
                raise ServerLost("closed", language.incarnation)
        with language.generate(request.generate, request.deadline.remaining()) as events:
            with self._search.watch():
                admitted = await _wait_admitted(events)
                if admitted.num_replayed_tokens != self._progress.num_tokens:
                    raise Unavailable("a language server cannot go on with a reply")
            self._is_admitted = True
            self._record.language = language.name
            self._record.admitted(admitted)
            tracing.describe_request(server__address=language.name, dvd__attempt=self._record.num_replays)
            try:
                async with asyncio.TaskGroup() as group:
                    encoding = None
                    if admitted.missing:
                        encoding = group.create_task(encode_missing(self._fleet, request, admitted, self._record))
                    with self._search.watch():
                        await self._relay(events, encoding)
            except BaseExceptionGroup as errors:
                raise cause_of(errors) from None

    async def _relay(self, events: Events, encoding: asyncio.Task[None] | None) -> None:
        """Pass on what is said until every choice has ended and the server has ended the call."""
        is_replay = self._record.has_first_token
        async for event in events:
            self._trial.passed()
            if is_replay:
                is_replay = False
                metrics.REPLAYS.labels("ok").inc()
            kind = event.WhichOneof("event")
            if kind == "token":
                token = event.token
                self._turn.is_over()
                self._record.token(token)
                self._progress.token(token)
                await self._answer.on_token(token, events.is_more_ready)
            elif kind == "finished":
                await self._finish(event.finished, encoding)
            else:
                raise InternalError("a server admitted twice")
        if not self._progress.is_done:
            raise Unavailable("a language server ended a call early")

    async def _finish(self, finished: Finished, encoding: asyncio.Task[None] | None) -> None:
        self._record.choice_finished(finished)
        self._progress.finished(finished)
        if self._progress.is_done:
            await _settle(encoding)
            self._record.stage = "done"
        await self._answer.on_finished(finished)


async def _wait_admitted(events: Events) -> Admitted:
    """The first event of every call."""
    async for event in events:
        if event.WhichOneof("event") != "admitted":
            raise InternalError("a server answered before it admitted")
        return event.admitted
    raise Unavailable("a language server ended a call early")


async def _settle(encoding: asyncio.Task[None] | None) -> None:
    """Take in the last replies of vision servers; whoever is later than that is not waited for."""
    if encoding is not None:
        await asyncio.wait([encoding], timeout=ENCODE_GRACE_SECONDS)
        encoding.cancel()
