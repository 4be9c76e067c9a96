"""The story of a chat request, from a language server's ``Admitted`` to its last token (docs/life-of-a-request.md).

Knows nothing of HTTP and nothing of pixels. Everything a request starts lives inside ``Pipeline.run`` and ends with
it: when the client leaves, the caller cancels ``run``, and ``Generate`` and every ``Encode`` are cancelled at once.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from common.service import metrics
from common.service.errors import DeadlineExceeded, DvdError, InternalError, InvalidRequest, Overloaded, Unavailable
from protos.language_pb2 import Admitted, Finished, GenerateEvent, GenerateRequest, ImageTicket, Token
from protos.vision_pb2 import EncodeRequest, TilingOptions
from router.fleet import Fleet
from router.record import Deadline, RequestRecord
from router.workers import LanguageWorker

log = logging.getLogger(__name__)

MAX_ENCODE_ATTEMPTS: Final = 3
MAX_GENERATE_ATTEMPTS: Final = 2
ENCODE_GRACE_SECONDS: Final = 1.0
"""Once all tokens are there, the features were delivered; the replies that say so get this long to arrive."""


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image of a request, priced but not decoded."""

    data: bytes
    mm_hash: bytes
    num_tiles: int  # thumbnail included
    tiling: TilingOptions
    param: str  # where it stands in the request, for error messages


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request in the words of the wire."""

    generate: GenerateRequest
    images: Sequence[ImageInput]
    deadline: Deadline

    @property
    def num_choices(self) -> int:
        return int(self.generate.sampling.n)


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
                    encodes = [
                        group.create_task(self._encode(request, ticket, admitted, record))
                        for ticket in admitted.missing
                    ]
                    await _relay(events, request.num_choices, encodes, answer, record)
            except BaseExceptionGroup as errors:
                raise _cause(errors) from None

    async def _encode(
        self, request: ChatRequest, ticket: ImageTicket, admitted: Admitted, record: RequestRecord
    ) -> None:
        """Have one image encoded; a lost or full vision server is replaced by another one."""
        if ticket.image_index >= len(request.images):
            raise InternalError("a server asked for an image that does not exist")
        image = request.images[ticket.image_index]
        tried: set[str] = set()
        failure: DvdError = Unavailable("no vision server is available")
        while len(tried) < MAX_ENCODE_ATTEMPTS:
            vision = self._fleet.pick_vision(image.mm_hash, exclude=tried)
            if vision is None:
                break
            if tried:
                metrics.DISPATCH_RETRIES.labels("vision", failure.code).inc()
            call = EncodeRequest(
                request_id=request.generate.request_id,
                image_index=ticket.image_index,
                attempt=len(tried),
                mm_hash=image.mm_hash,
                image=image.data,
                tiling=image.tiling,
                deliver_to=admitted.deliver_to,
                ticket=ticket.ticket,
                dtype=admitted.dtype,
            )
            tried.add(vision.address)
            record.encode_attempts += 1
            try:
                record.encoded.append(await vision.encode(call, image.num_tiles, request.deadline.remaining()))
                return
            except InvalidRequest as error:
                raise InvalidRequest(error.message, code=error.code, param=image.param) from None
            except (Unavailable, Overloaded, InternalError) as error:
                log.warning("image %d was not encoded by %s: %s", ticket.image_index, vision.name, error.code)
                failure = error
        if not record.has_first_token:
            raise failure
        # A token needs the whole prompt: the features had arrived, only the reply that says so was lost.


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
    encodes: Sequence[asyncio.Task[None]],
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
                await _settle(encodes)
                record.stage = "done"
            await answer.on_finished(event.finished)
        else:
            raise InternalError("a server admitted twice")
    if num_open > 0:
        raise Unavailable("a language server ended a call early")


async def _settle(encodes: Sequence[asyncio.Task[None]]) -> None:
    """Take in the last replies of vision servers; whoever is later than that is not waited for."""
    if encodes:
        await asyncio.wait(encodes, timeout=ENCODE_GRACE_SECONDS)
    for task in encodes:
        task.cancel()


def _cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a task group failed of. A bug must not hide behind an expected error; bad input explains what it caused."""
    leaves = list(_leaves(errors))
    bugs = [error for error in leaves if not isinstance(error, DvdError)]
    bad_input = [error for error in leaves if isinstance(error, InvalidRequest)]
    return (bugs or bad_input or leaves)[0]


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Sequence[BaseException]:
    leaves: list[BaseException] = []
    for error in errors.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves
