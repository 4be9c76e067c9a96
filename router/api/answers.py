"""Tokens to OpenAI's answer shapes: one body, or a stream of chunks (API.md section 4).

Both implement ``pipeline.Answer``; what differs is when the client hears of a token. OpenAI's shapes have no place for
what a model thinks: it goes under both names that clients look for, SGLang's ``reasoning_content`` and vLLM's newer
``reasoning``.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from protos.language_pb2 import Finished, Token, TokenLogprob
from router.admission import Slot
from router.api import sse
from router.api.event_stream import EventStream
from router.api.exchange import Exchange
from router.api.schemas import ChatCompletionRequest
from router.api.tool_calls import CallPiece, Divided, ToolCallParser
from router.api.tools import callable_names
from router.settings import RouterSettings

_CONTENT: Final = b'"content":'
_MAX_HELD_EVENTS: Final = 64
_NO_TEXT: Final = _CONTENT + b'""'


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What the client wants to see."""

    model: str
    num_choices: int
    logprobs: bool
    token_ids: bool
    include_usage: bool
    continuous_usage: bool
    tool_names: frozenset[str]  # of tools that the reply may call
    metrics: bool
    headers: Mapping[str, str]
    slow_reader_timeout: float
    keep_alive_interval: float

    @classmethod
    def of(
        cls,
        request: ChatCompletionRequest,
        *,
        model: str,
        headers: Mapping[str, str],
        settings: RouterSettings,
    ) -> "AnswerOptions":
        options = request.stream_options
        return cls(
            model=model,
            num_choices=request.n or 1,
            logprobs=bool(request.logprobs),
            token_ids=bool(request.return_token_ids),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            tool_names=callable_names(request),
            metrics=settings.enable_per_request_metrics,
            headers=headers,
            slow_reader_timeout=settings.slow_reader_timeout,
            keep_alive_interval=settings.sse_keep_alive_interval,
        )

    def stream(self, exchange: Exchange) -> EventStream:
        """Where events go."""
        return EventStream(
            exchange,
            self.headers,
            slow_reader_timeout=self.slow_reader_timeout,
            keep_alive_interval=self.keep_alive_interval,
        )


@dataclass(slots=True)
class _Choice:
    reasoning: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class FullAnswer:
    """Collects everything and answers once."""

    def __init__(self, exchange: Exchange, slot: Slot, options: AnswerOptions) -> None:
        self._exchange = exchange
        self._slot = slot
        self._options = options
        self._choices = [_Choice() for _ in range(options.num_choices)]

    async def on_token(self, token: Token, is_more_ready: bool) -> None:
        self._slot.first_token()
        choice = self._choices[token.choice]
        choice.reasoning.append(token.reasoning)
        choice.texts.append(token.text)
        choice.token_ids.append(token.token_id)
        if self._options.logprobs:
            choice.logprobs.append(_logprob_entry(token))

    async def on_finished(self, finished: Finished) -> None:
        choice = self._choices[finished.choice]
        choice.reasoning.append(finished.reasoning)
        choice.texts.append(finished.text)
        choice.finish_reason = finished.finish_reason

    async def end(self) -> None:
        """Send the body."""
        body = {
            **envelope(self._exchange, self._options.model, "chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": self._exchange.record.usage(),
        }
        if self._options.metrics:
            body["metrics"] = self._exchange.record.metrics_block()
        await self._exchange.respond_json(body, headers=self._options.headers)

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text, calls = _divide_whole("".join(choice.texts), self._options)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        answer: dict[str, Any] = {
            "index": index,
            "message": {**message, **_reasoning("".join(choice.reasoning) or None)},
            "logprobs": _logprobs(choice.logprobs) if self._options.logprobs else None,
            "finish_reason": _finish_reason(choice.finish_reason, len(calls)),
        }
        if self._options.token_ids:
            answer["token_ids"] = choice.token_ids
        return answer


class StreamAnswer:
    """Sends each token as one event. The 200 leaves with the first one, so that earlier failures keep their status."""

    def __init__(self, exchange: Exchange, slot: Slot, options: AnswerOptions) -> None:
        self._exchange = exchange
        self._slot = slot
        self._options = options
        self.stream = options.stream(exchange)
        self._envelope = envelope(exchange, options.model, "chat.completion.chunk")
        self._num_open = options.num_choices
        self._has_begun = False
        self._is_plain = not (options.logprobs or options.token_ids or options.continuous_usage or options.tool_names)
        self._parsers = [ToolCallParser(options.tool_names) for _ in range(options.num_choices)]
        self._around_text: dict[int, tuple[bytes, bytes]] = {}  # choice -> bytes of its events
        self._held: list[bytes] = []  # events of tokens behind which others were ready

    async def on_token(self, token: Token, is_more_ready: bool) -> None:
        """Tokens that came at once leave at once, each still an event; the first one waits for no other."""
        is_first = not self._has_begun
        if self._is_plain and self._has_begun and not token.reasoning:
            self._held.append(self._text_event(token))
        else:
            logprobs = [_logprob_entry(token)] if self._options.logprobs else None
            delta = _delta(token.reasoning, *self._divide(token.choice, token.text))
            chunk = self._chunk(token.choice, delta, logprobs=logprobs, token_ids=[token.token_id])
            self._held += map(sse.data, [*self._begin(), chunk])
        if is_first or not is_more_ready or len(self._held) >= _MAX_HELD_EVENTS:
            await self._flush()

    def _text_event(self, token: Token) -> bytes:
        """What ``_chunk`` would be as an event: of such tokens only the text differs."""
        around = self._around_text.get(token.choice)
        if around is None:
            event = sse.data(self._chunk(token.choice, _delta("", "")))
            before, _, after = event.partition(_NO_TEXT)  # no other quotes are without a backslash inside a string
            around = self._around_text[token.choice] = before + _CONTENT, after
        return around[0] + sse.encode(token.text) + around[1]

    async def on_finished(self, finished: Finished) -> None:
        self._num_open -= 1
        chunks = self._begin()
        text, calls = self._divide(finished.choice, finished.text, is_end=True)
        if finished.reasoning or text or calls:
            chunks.append(self._chunk(finished.choice, _delta(finished.reasoning, text, calls)))
        reason = _finish_reason(finished.finish_reason, self._parsers[finished.choice].num_calls)
        chunks.append(self._chunk(finished.choice, {}, finish_reason=reason))
        if self._num_open == 0 and not self._options.include_usage:
            self._add_metrics(chunks[-1])
        await self._send(chunks)

    def _divide(self, choice: int, text: str, *, is_end: bool = False) -> Divided:
        """Text and calls of a token, or of all that was held back."""
        if not self._options.tool_names:
            return text, []
        parser = self._parsers[choice]
        said, calls = parser.push(text)
        rest, last = parser.flush() if is_end else ("", [])
        return said + rest, calls + last

    async def end(self) -> None:
        """Send what follows the last choice, and close the stream."""
        last = b""
        if self._options.include_usage:
            chunk = {**self._envelope, "choices": [], "usage": self._exchange.record.usage()}
            self._add_metrics(chunk)
            last = sse.data(chunk)
        await self.stream.write(last + sse.DONE, more_body=False)

    def _begin(self) -> list[dict[str, Any]]:
        """Before the first chunk: the role of each choice."""
        if self._has_begun:
            return []
        self._has_begun = True
        self._slot.first_token()
        return [
            self._chunk(choice, {"role": "assistant", "content": ""}) for choice in range(self._options.num_choices)
        ]

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        token_ids: list[int] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": choice,
            "delta": delta,
            "logprobs": None if logprobs is None else _logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        if self._options.token_ids and token_ids is not None:
            entry["token_ids"] = token_ids
        chunk = {**self._envelope, "choices": [entry]}
        if self._options.continuous_usage:
            chunk["usage"] = self._exchange.record.usage()
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    def _add_metrics(self, chunk: dict[str, Any]) -> None:
        if self._options.metrics:
            chunk["metrics"] = self._exchange.record.metrics_block()

    async def _send(self, chunks: Sequence[dict[str, Any]]) -> None:
        self._held += map(sse.data, chunks)
        await self._flush()

    async def _flush(self) -> None:
        data = b"".join(self._held)
        self._held.clear()
        await self.stream.write(data)


def kept_alive(answer: object) -> AbstractAsyncContextManager[None]:
    """What a stream needs while tokens are waited for; a whole answer needs nothing."""
    stream = getattr(answer, "stream", None)
    return stream.kept_alive() if isinstance(stream, EventStream) else nullcontext()


def envelope(exchange: Exchange, model: str, kind: str, prefix: str = "chatcmpl") -> dict[str, Any]:
    """What every body and every chunk begins with."""
    return {
        "id": f"{prefix}-{exchange.record.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _divide_whole(text: str, options: AnswerOptions) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls of a whole reply, as ``message`` has them."""
    if not options.tool_names:
        return text, []
    parser = ToolCallParser(options.tool_names)
    (said, pieces), (rest, last) = parser.push(text), parser.flush()
    calls: list[dict[str, Any]] = []
    for piece in pieces + last:
        if piece.id is not None:
            calls.append({name: value for name, value in piece.delta().items() if name != "index"})
        else:
            calls[piece.index]["function"]["arguments"] += piece.arguments
    return said + rest, calls


def _finish_reason(reason: str | None, num_calls: int) -> str | None:
    return "tool_calls" if num_calls and reason == "stop" else reason


def _delta(reasoning: str, text: str, calls: Sequence[CallPiece] = ()) -> dict[str, Any]:
    """A token without any text is one of the content, as every client expects it."""
    if calls:
        said = {"tool_calls": [piece.delta() for piece in calls]}
        return said | ({"content": text} if text else {}) | (_reasoning(reasoning) if reasoning else {})
    if not reasoning:
        return {"content": text}
    return {**_reasoning(reasoning), "content": text} if text else _reasoning(reasoning)


def _reasoning(text: str | None) -> dict[str, Any]:
    return {"reasoning_content": text, "reasoning": text}


def _logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": entries, "refusal": None}


def _logprob_entry(token: Token) -> dict[str, Any]:
    return {**_token_logprob(token.logprob), "top_logprobs": [_token_logprob(top) for top in token.top_logprobs]}


def _token_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.token_bytes)}
