"""The story of a chat request, from a language server's ``Admitted`` to its last token (docs/life-of-a-request.md).

Knows nothing of HTTP and nothing of pixels. Everything a request starts lives inside ``Pipeline.run`` and ends with
it: when the client leaves, the caller cancels ``run``, and ``Generate`` and every ``Score`` and ``Encode`` are
cancelled at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final, Protocol

from common.service import metrics
from common.service.errors import DeadlineExceeded, DvdError, InternalError, Overloaded, Unavailable
from protos.language_pb2 import Admitted, Finished, GenerateEvent, ImageTicket, Token
from protos.vision_pb2 import EncodeReply, EncodeRequest, VirOptions
from router.causes import cause_of
from router.fleet import Fleet
from router.record import RequestRecord
from router.request import ChatRequest
from router.scores import Scores, collect_scores
from router.vision_calls import call_vision
from router.workers import LanguageWorker, VisionWorker

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
                        encoding = group.create_task(self._encode_missing(request, admitted, record))
                    await _relay(events, request.num_choices, encoding, answer, record)
            except BaseExceptionGroup as errors:
                raise cause_of(errors) from None

    async def _encode_missing(self, request: ChatRequest, admitted: Admitted, record: RequestRecord) -> None:
        """Have all images encoded that the language server lacks, once all scores are known where they are needed."""
        scores = await self._collect_scores(request, record) if request.needs_scores else None
        async with asyncio.TaskGroup() as group:
            for ticket in admitted.missing:
                group.create_task(self._encode(request, ticket, admitted, scores, record))

    async def _collect_scores(self, request: ChatRequest, record: RequestRecord) -> Scores:
        started_at = time.monotonic()
        scores = await collect_scores(self._fleet, request.images, request.deadline)
        record.score_seconds = time.monotonic() - started_at
        return scores

    async def _encode(
        self,
        request: ChatRequest,
        ticket: ImageTicket,
        admitted: Admitted,
        scores: Scores | None,
        record: RequestRecord,
    ) -> None:
        """Have one image encoded and delivered."""
        index = ticket.image_index
        if index >= len(request.images):
            raise InternalError("a server asked for an image that does not exist")
        image = request.images[index]
        call = EncodeRequest(
            request_id=request.generate.request_id,
            image_index=index,
            mm_hash=image.mm_hash,
            image_hash=image.image_hash,
            image=image.data,
            tiling=image.tiling,
            vir=_with_scores(request.vir, scores),
            deliver_to=admitted.deliver_to,
            ticket=ticket.ticket,
            dtype=admitted.dtype,
        )

        async def encode(vision: VisionWorker, attempt: int) -> EncodeReply:
            call.attempt = attempt
            record.encode_attempts += 1
            return await vision.encode(call, image.num_tiles, request.deadline.remaining())

        prefer = scores.servers[index] if scores is not None else None
        try:
            reply = await call_vision(self._fleet, image.image_hash, encode, param=image.param, prefer=prefer)
        except (Unavailable, Overloaded, InternalError):
            # A token needs the whole prompt: the features had arrived, only the reply that says so was lost.
            if not record.has_first_token:
                raise
        else:
            record.encoded.append(reply)


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


def _with_scores(vir: VirOptions | None, scores: Scores | None) -> VirOptions | None:
    """The options of one ``Encode``: those of the request, and what its tiles are compared with."""
    if vir is None or scores is None:
        return vir
    complete = VirOptions(request_scores=scores.of_tiles)
    complete.MergeFrom(vir)
    return complete
