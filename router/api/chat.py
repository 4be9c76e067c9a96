"""``POST /v1/chat/completions``: from the bytes of a body to an answer, and the watch for a client that leaves, which
other routes share.
"""

import abc
import asyncio
import logging
import re
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Final

from starlette.types import Receive, Scope, Send

from common.service import tracing
from common.service.errors import (
    Cancelled,
    DvdError,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestReadTimeout,
    RequestTooLarge,
)
from protos.status_pb2 import ModelInfo
from router.admission import Admission, HeldBytes, Slot
from router.api.answers import AnswerOptions, FullAnswer, StreamAnswer, kept_alive
from router.api.exchange import Exchange
from router.api.media_parts import MediaCount
from router.api.messages import ReadMessage, media_of, read_messages
from router.api.models import ModelList
from router.api.named_media import NamedMedia
from router.api.remote import fetch_media
from router.api.schemas import ChatCompletionRequest, parse_chat
from router.api.strict import unknown_inside
from router.api.text_schemas import CompletionRequest
from router.api.translate import Origin, cache_scope, translate
from router.api.video import probe_lengths
from router.cut_off import CutOff
from router.fetch.fetcher import MediaFetcher
from router.fleet import Fleet
from router.pipeline import Pipeline
from router.record import Deadline
from router.request import ChatRequest
from router.settings import RouterSettings

log = logging.getLogger(__name__)

LARGE_BODY_BYTES: Final = 4 * 2**20
"""Bodies above this are read in a thread, so that they do not hold up the tokens of others: at this size for 1.5 ms."""
_MAX_NAMED_FIELDS: Final = 10
_UNCLEAN: Final = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class BodyEndpoint(abc.ABC):
    """An ASGI application for one route that takes a body. Raises DvdError; the exchange's owner tells the client."""

    generates: ClassVar[bool] = True  # and is counted and logged as such

    def __init__(
        self,
        fleet: Fleet,
        models: ModelList,
        admission: Admission,
        settings: RouterSettings,
        named_media: NamedMedia,
        cut_off: CutOff,
        fetcher: MediaFetcher | None,
    ) -> None:
        """``cut_off`` is set when a drain has waited long enough: whatever still runs is ended. Without a ``fetcher``
        media come in ``data:`` URLs only."""
        self._fleet = fleet
        self._models = models
        self._pipeline = Pipeline(fleet)
        self._admission = admission
        self._settings = settings
        self._named_media = named_media
        self._cut_off = cut_off
        self._fetcher = fetcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        exchange.record.is_chat = self.generates
        tracing.begin_request("router.request", exchange.headers, exchange.record.received_at)
        with self._admission.hold(0) as held:
            # Nobody but the work itself holds on to the body.
            work = self._answer(exchange, await self._read_body(exchange, receive, held), held)
            await self._until_left_or_cut_off(receive, work)

    async def _until_left_or_cut_off(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` to its end, unless nobody waits for it any more or the drain is over.

        Raises:
            Cancelled: the client left; ``work`` was cancelled and has let go of everything.
            Overloaded: ``draining``; likewise.
        """
        task = asyncio.current_task()
        assert task is not None  # a server runs each request in one
        reasons: list[DvdError] = []
        is_over = False

        def end(reason: DvdError) -> None:
            if not is_over:
                reasons.append(reason)
                task.cancel()

        leaving = asyncio.create_task(_wait_disconnect(receive))
        leaving.add_done_callback(lambda left: None if left.cancelled() else end(Cancelled("the client left")))
        try:
            with self._cut_off.calls(lambda: end(draining())):
                return await work
        except asyncio.CancelledError:
            if not reasons or task.cancelling() > len(reasons):
                raise
            raise reasons[0] from None
        finally:
            is_over = True
            for _ in reasons:
                task.uncancel()
            leaving.cancel()

    async def _read_body(self, exchange: Exchange, receive: Receive, held: HeldBytes) -> bytes:
        """The whole body, bounded in size and time.

        Raises:
            RequestTooLarge, RequestReadTimeout, Overloaded; Cancelled when the client leaves.
        """
        limit = self._settings.max_body_bytes
        declared = exchange.headers.get("content-length", "")
        # The declared size is refused before the first byte is kept; what is kept is counted as it comes.
        if declared.isdigit() and int(declared[:20]) > limit:
            raise _body_too_large(limit)
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._settings.body_read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Cancelled("the client left")
                    chunk: bytes = message.get("body", b"")
                    num_bytes += len(chunk)
                    if num_bytes > limit:
                        raise _body_too_large(limit)
                    held.grow(len(chunk))
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise RequestReadTimeout("the body took too long to arrive") from None

    @abc.abstractmethod
    async def _answer(self, exchange: Exchange, body: bytes, held: HeldBytes) -> None:
        """Everything between the body and the last byte of the answer. Cancelled when the client leaves."""

    async def _translate(
        self, exchange: Exchange, parsed: ChatCompletionRequest, model: ModelInfo, is_large: bool, held: HeldBytes
    ) -> ChatRequest:
        started_at = time.monotonic()
        origin = Origin(
            request_id=secrets.token_bytes(16),
            tenant=exchange.tenant,
            deadline=self._deadline(exchange),
        )
        fetched = await fetch_media(parsed, self._fetcher, self._settings, held, origin.deadline)
        fetched_at = time.monotonic()
        is_large = is_large or sum(map(len, fetched.values())) > LARGE_BODY_BYTES
        names = self._named_media.of(cache_scope(origin.tenant, parsed.cache_salt))
        messages: list[ReadMessage]
        messages = await in_thread_if(is_large, read_messages, parsed, model, self._settings, names, fetched)
        held.grow(names.num_bytes_found)  # as if they had been sent again
        is_large = is_large or names.num_bytes_found > LARGE_BODY_BYTES
        await self._learn_lengths(messages, origin.deadline)
        request: ChatRequest
        request = await in_thread_if(is_large, translate, parsed, messages, origin, model, self._settings)
        if request.images:
            exchange.record.media_started_at = started_at
            exchange.record.media_seconds = time.monotonic() - started_at
            _tell_sent(request, fetched, fetched_at)
            exchange.record.num_tiles = sum(image.num_tiles for image in request.images)
        return request

    async def _learn_lengths(self, messages: Sequence[ReadMessage], deadline: Deadline) -> None:
        """Of videos whose number of frames depends on it. Raises DvdError."""
        unknown = [medium for medium in media_of(messages) if medium.frames is not None]
        if unknown:
            videos = [(medium.data, medium.param) for medium in unknown]
            for medium, length in zip(unknown, await probe_lengths(self._fleet, videos, deadline), strict=True):
                medium.set_length(length)

    def _check_model(self, name: str | None) -> ModelInfo:
        """What is served. Raises NotFound for another model, Overloaded while nothing is known yet."""
        # Before the first server has spoken any name may turn out to be right.
        if name is not None and self._models.is_known and not self._models.knows(name):
            raise NotFound(f"no model {name[:64]!r} here", code="model_not_found", param="model")
        if self._fleet.model is None:
            raise not_ready()
        return self._fleet.model

    def _check_servers(self, *, has_media: bool) -> None:
        if not self._fleet.may_have("language") or (has_media and not self._fleet.may_have("vision")):
            raise not_ready()

    def _deadline(self, exchange: Exchange) -> Deadline:
        return Deadline(exchange.record.received_at + self._time_limit(exchange))

    def _time_limit(self, exchange: Exchange) -> float:
        """Seconds from receipt: what the client grants, capped by our own limit."""
        asked = exchange.headers.get("x-dvd-deadline-ms")
        if asked is None:
            return self._settings.request_timeout
        if not (asked.isascii() and asked.isdigit() and 0 < len(asked) <= 12 and int(asked) > 0):
            raise InvalidRequest("X-Dvd-Deadline-Ms must be a positive whole number", param="X-Dvd-Deadline-Ms")
        return min(int(asked) / 1e3, self._settings.request_timeout)


class ChatEndpoint(BodyEndpoint):
    """``POST /v1/chat/completions``."""

    async def _answer(self, exchange: Exchange, body: bytes, held: HeldBytes) -> None:
        exchange.record.stage = "admit"
        is_large = len(body) > LARGE_BODY_BYTES
        parsed, ignored = await in_thread_if(is_large, parse_chat, body)
        ignored += await in_thread_if(is_large, unknown_inside, exchange.headers, body, ChatCompletionRequest)
        del body  # as large as all images together; the answer may take minutes
        name_request(exchange, parsed)
        refuse_ignored(exchange, ignored)
        model = self._check_model(parsed.model)
        media = MediaCount.of(parsed)
        self._check_servers(has_media=media.items > 0)
        exchange.record.num_images, exchange.record.num_videos = media.images, media.videos
        exchange.record.kind = "image" if media.items else "text"
        exchange.record.is_flash = model.is_flash
        seconds_left = self._time_limit(exchange) - exchange.record.age()
        with self._admission.enter(exchange.record.kind, seconds_left) as slot:
            request = await self._translate(exchange, parsed, model, is_large, held)
            tracing.describe_request(gen_ai__request__model=self._models.name_for(parsed.model))
            sampling = request.generate.sampling
            exchange.record.num_choices, exchange.record.max_tokens = sampling.n, sampling.max_tokens
            exchange.charge(request.max_num_tokens, exchange.record.num_tiles)
            slot.weigh(request.num_prompt_tokens, exchange.record.num_tiles)
            answer = self._make_answer(exchange, parsed, slot, ignored_header(ignored))
            del parsed  # likewise: it still holds every image in base64
            async with kept_alive(answer):
                await self._pipeline.run(request, answer, exchange.record)
            await answer.end()

    def _make_answer(
        self, exchange: Exchange, parsed: ChatCompletionRequest, slot: Slot, headers: Mapping[str, str]
    ) -> FullAnswer | StreamAnswer:
        options = AnswerOptions.of(
            parsed,
            model=self._models.name_for(parsed.model),
            headers=headers,
            settings=self._settings,
        )
        return StreamAnswer(exchange, slot, options) if parsed.stream else FullAnswer(exchange, slot, options)


def _tell_sent(request: ChatRequest, fetched: Mapping[str, bytes], since: float) -> None:
    """A span of what came with the request; what was fetched has one for each URL."""
    of_urls = {id(data) for data in fetched.values()}
    sizes = [len(image.data) for image in request.images if id(image.data) not in of_urls]
    if sizes:
        tracing.span("media.fetch", since, time.monotonic(), scheme="data", bytes=sum(sizes))


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def in_thread_if(is_large: bool, function: Any, *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments) if is_large else function(*arguments)


def name_request(exchange: Exchange, parsed: ChatCompletionRequest | CompletionRequest) -> None:
    """The header's id wins over the body's."""
    in_body = parsed.request_id or parsed.rid
    if in_body is not None and not exchange.has_own_id:
        exchange.record.request_id = in_body


def refuse_ignored(exchange: Exchange, ignored: Sequence[str]) -> None:
    if not ignored:
        return
    log.debug("request id=%s: ignored fields: %s", exchange.record.request_id, _clean(ignored))
    if exchange.headers.get("x-dvd-strict") == "1":
        raise InvalidRequest(
            f"unknown fields: {_clean(ignored)}", code="unsupported_parameter", param=_UNCLEAN.sub("?", ignored[0][:64])
        )


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    return {"x-dvd-ignored": _clean(ignored)} if ignored else {}


def _clean(names: Sequence[str]) -> str:
    return ", ".join(_UNCLEAN.sub("?", name[:64]) for name in names[:_MAX_NAMED_FIELDS])


def draining() -> Overloaded:
    """This router is about to go away."""
    return Overloaded("this server is shutting down", code="draining", retry_after=1.0)


def not_ready() -> Overloaded:
    """A tier is empty, or nobody has said yet what is served."""
    return Overloaded("the servers are not ready yet", code="not_ready", retry_after=1.0)


def _body_too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"a request may have at most {limit} bytes")
