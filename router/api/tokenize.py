"""``POST /tokenize`` and ``/detokenize``: a language server is asked, nothing is generated. vLLM's shapes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

from common.service.errors import DeadlineExceeded, InvalidRequest, Unavailable
from protos import language_pb2 as lang
from protos.status_pb2 import ModelInfo
from router.admission import HeldBytes
from router.api.chat import LARGE_BODY_BYTES, BodyEndpoint, ignored_header, in_thread_if, name_request, refuse_ignored
from router.api.exchange import Exchange
from router.api.media_parts import MediaCount
from router.api.schemas import ChatCompletionRequest
from router.api.strict import unknown_inside
from router.api.text_schemas import TokenizeRequest, parse_detokenize, parse_tokenize
from router.api.translate_text import raw_prompt, with_param
from router.language_search import LanguageSearch
from router.record import Deadline
from router.workers import LanguageWorker

_ReplyT = TypeVar("_ReplyT")


class TextEndpoint(BodyEndpoint):
    """What both have in common."""

    generates: ClassVar[bool] = False

    async def _ask(self, exchange: Exchange, call: Callable[[LanguageWorker, float], Awaitable[_ReplyT]]) -> _ReplyT:
        """What ``call`` returns on the first language server that answers.

        Raises:
            Unavailable: none does; what the last one said.
            DeadlineExceeded: the time is used up.
            DvdError: what a server said of the request, or of itself.
        """
        deadline = self._deadline(exchange)
        try:
            async with asyncio.timeout(deadline.remaining()):
                return await self._ask_in_turn(exchange.record.request_id.encode(), deadline, call)
        except TimeoutError:
            raise DeadlineExceeded("the request's time is used up") from None

    async def _ask_in_turn(
        self, request_id: bytes, deadline: Deadline, call: Callable[[LanguageWorker, float], Awaitable[_ReplyT]]
    ) -> _ReplyT:
        search = LanguageSearch(self._fleet)
        failure: Unavailable | None = None
        self._fleet.note_request("language")
        while (language := await search.next(request_id)) is not None:
            if failure is not None and not self._fleet.may_retry("language", failure):
                break
            try:
                with search.watch():
                    return await call(language, deadline.remaining())
            except Unavailable as error:
                search.failed(language)
                failure = error
        raise failure or Unavailable("no language server is available")


class TokenizeEndpoint(TextEndpoint):
    """``POST /tokenize``: the ids that a completion or a chat would be generated from."""

    async def _answer(self, exchange: Exchange, body: bytes, held: HeldBytes) -> None:
        is_large = len(body) > LARGE_BODY_BYTES
        parsed, chat, ignored = await in_thread_if(is_large, parse_tokenize, body)
        if chat is not None:
            ignored += await in_thread_if(is_large, unknown_inside, exchange.headers, body, ChatCompletionRequest)
        del body
        refuse_ignored(exchange, ignored)
        model = self._check_model(parsed.model)
        # Images are priced here; only the length of a video is for a vision server to tell.
        self._check_servers(has_media=chat is not None and MediaCount.of(chat).videos > 0)
        request = _of_prompt(parsed) if chat is None else await self._of_chat(exchange, chat, model, is_large, held)
        request.return_token_strs = bool(parsed.return_token_strs)
        del chat  # it still holds every image in base64

        async def ask(language: LanguageWorker, timeout: float) -> lang.TokenizeReply:
            return await language.tokenize(request, timeout)

        try:
            reply = await self._ask(exchange, ask)
        except InvalidRequest as error:
            raise with_param(error, "prompt" if request.HasField("raw") else "messages") from None
        answer: dict[str, Any] = {
            "count": len(reply.token_ids),
            "max_model_len": model.max_model_len,
            "tokens": list(reply.token_ids),
            "token_strs": list(reply.token_strs) if parsed.return_token_strs else None,
        }
        await exchange.respond_json(answer, headers=ignored_header(ignored))

    async def _of_chat(
        self, exchange: Exchange, chat: ChatCompletionRequest, model: ModelInfo, is_large: bool, held: HeldBytes
    ) -> lang.TokenizeRequest:
        name_request(exchange, chat)
        translated = await self._translate(exchange, chat, model, is_large, held)
        return lang.TokenizeRequest(
            messages=translated.generate.messages,
            num_tiles=[image.num_tiles for image in translated.images],
            thinking=translated.generate.thinking,
            tools=translated.generate.tools,
        )


class DetokenizeEndpoint(TextEndpoint):
    """``POST /detokenize``: the text of ids, special tokens included."""

    async def _answer(self, exchange: Exchange, body: bytes, held: HeldBytes) -> None:
        parsed, ignored = await in_thread_if(len(body) > LARGE_BODY_BYTES, parse_detokenize, body)
        refuse_ignored(exchange, ignored)
        self._check_model(parsed.model)
        self._check_servers(has_media=False)
        request = lang.DetokenizeRequest(token_ids=parsed.tokens)

        async def ask(language: LanguageWorker, timeout: float) -> lang.DetokenizeReply:
            return await language.detokenize(request, timeout)

        reply = await self._ask(exchange, ask)
        await exchange.respond_json({"prompt": reply.text}, headers=ignored_header(ignored))


def _of_prompt(parsed: TokenizeRequest) -> lang.TokenizeRequest:
    return lang.TokenizeRequest(
        raw=raw_prompt(parsed.prompt or "", "prompt", add_special_tokens=parsed.add_special_tokens)
    )
