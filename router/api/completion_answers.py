"""Tokens to the shapes of OpenAI's older completions: one body, or a stream of chunks.

A request may have several prompts, each of which may have several choices: choice ``c`` of prompt ``p`` has the index
``p * n + c``. For the servers, the bounds and the metrics each prompt is a request of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from protos.language_pb2 import Finished, Token
from router.admission import Slot
from router.api import sse
from router.api.answers import AnswerOptions, envelope
from router.api.exchange import Exchange
from router.record import RequestRecord

_KIND = "text_completion"


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """One prompt."""

    slot: Slot
    record: RequestRecord
    echo: str  # stands before the text of each of its choices


class CompletionAnswer(Protocol):
    """An answer to all prompts."""

    async def on_token(self, prompt: int, token: Token) -> None: ...

    async def on_finished(self, prompt: int, finished: Finished) -> None: ...

    async def end(self) -> None:
        """All choices have ended."""
        ...


class PromptAnswer:
    """What the pipeline knows of it: the answer to one prompt."""

    def __init__(self, answer: CompletionAnswer, prompt: int) -> None:
        self._answer = answer
        self._prompt = prompt

    async def on_token(self, token: Token, is_more_ready: bool) -> None:
        await self._answer.on_token(self._prompt, token)

    async def on_finished(self, finished: Finished) -> None:
        await self._answer.on_finished(self._prompt, finished)


class _Logprobs:
    """Four lists of one length; offsets count characters of the tokens, those of an echo before them."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def of(self, token: Token) -> dict[str, list[Any]]:
        """The lists of one token."""
        # Tokens that read alike share a key: the most likely of them has it. The token itself is always there.
        top = {entry.text: entry.logprob for entry in reversed(token.top_logprobs)}
        top.setdefault(token.logprob.text, token.logprob.logprob)
        offset = self._offset
        self._offset += len(token.logprob.text)
        return {
            "text_offset": [offset],
            "token_logprobs": [token.logprob.logprob],
            "tokens": [token.logprob.text],
            "top_logprobs": [top],
        }


@dataclass(slots=True)
class _Choice:
    logprobs: _Logprobs
    texts: list[str]
    token_ids: list[int] = field(default_factory=list)
    lists: dict[str, list[Any]] = field(
        default_factory=lambda: {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    )
    finish_reason: str | None = None


class FullCompletion:
    """Collects everything and answers once."""

    def __init__(self, exchange: Exchange, asked: Sequence[AskedPrompt], options: AnswerOptions) -> None:
        self._exchange = exchange
        self._asked = asked
        self._options = options
        self._choices = [
            _Choice(_Logprobs(len(prompt.echo)), [prompt.echo]) for prompt in asked for _ in range(options.num_choices)
        ]

    async def on_token(self, prompt: int, token: Token) -> None:
        self._asked[prompt].slot.first_token()
        choice = self._choices[prompt * self._options.num_choices + token.choice]
        choice.texts.append(token.text)
        choice.token_ids.append(token.token_id)
        if self._options.logprobs:
            for name, values in choice.logprobs.of(token).items():
                choice.lists[name] += values

    async def on_finished(self, prompt: int, finished: Finished) -> None:
        choice = self._choices[prompt * self._options.num_choices + finished.choice]
        choice.texts.append(finished.text)
        choice.finish_reason = finished.finish_reason

    async def end(self) -> None:
        """Send the body."""
        body = {
            **envelope(self._exchange, self._options.model, _KIND, "cmpl"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": _usage(self._asked),
        }
        if self._options.metrics:
            body["metrics"] = _metrics(self._asked)
        await self._exchange.respond_json(body, headers=self._options.headers)

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "index": index,
            "text": "".join(choice.texts),
            "logprobs": choice.lists if self._options.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self._options.token_ids:
            answer["token_ids"] = choice.token_ids
        return answer


class StreamCompletion:
    """Sends each token as one event, and the end of each choice. The 200 leaves with the first one of any prompt."""

    def __init__(self, exchange: Exchange, asked: Sequence[AskedPrompt], options: AnswerOptions) -> None:
        self._exchange = exchange
        self._asked = asked
        self._options = options
        self.stream = options.stream(exchange)
        self._envelope = envelope(exchange, options.model, _KIND, "cmpl")
        echoes = [prompt.echo for prompt in asked for _ in range(options.num_choices)]
        self._logprobs = [_Logprobs(len(echo)) for echo in echoes]
        self._echoes = echoes  # still to be sent
        self._num_open = len(echoes)

    async def on_token(self, prompt: int, token: Token) -> None:
        self._asked[prompt].slot.first_token()
        index = prompt * self._options.num_choices + token.choice
        chunk = self._chunk(index, token.text)
        (choice,) = chunk["choices"]
        if self._options.logprobs:
            choice["logprobs"] = self._logprobs[index].of(token)
        if self._options.token_ids:
            choice["token_ids"] = [token.token_id]
        await self._send(chunk)

    async def on_finished(self, prompt: int, finished: Finished) -> None:
        self._asked[prompt].slot.first_token()
        self._num_open -= 1
        index = prompt * self._options.num_choices + finished.choice
        chunk = self._chunk(index, finished.text, finished.finish_reason)
        if self._num_open == 0 and not self._options.include_usage and self._options.metrics:
            chunk["metrics"] = _metrics(self._asked)
        await self._send(chunk)

    async def end(self) -> None:
        """Send what follows the last choice, and close the stream."""
        last = b""
        if self._options.include_usage:
            chunk = {**self._envelope, "choices": [], "usage": _usage(self._asked)}
            if self._options.metrics:
                chunk["metrics"] = _metrics(self._asked)
            last = sse.data(chunk)
        await self.stream.write(last + sse.DONE, more_body=False)

    def _chunk(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        echo, self._echoes[index] = self._echoes[index], ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + text,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        chunk = {**self._envelope, "choices": [choice]}
        if self._options.continuous_usage:
            chunk["usage"] = _usage(self._asked)
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    async def _send(self, chunk: dict[str, Any]) -> None:
        await self.stream.write(sse.data(chunk))


def _usage(asked: Sequence[AskedPrompt]) -> dict[str, Any]:
    return _sum([prompt.record.usage() for prompt in asked])


def _sum(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _sum([usage[key] for usage in usages]) if isinstance(value, dict) else sum(usage[key] for usage in usages)
        for key, value in usages[0].items()
    }


def _metrics(asked: Sequence[AskedPrompt]) -> Any:
    """Of the only prompt, or a list of those of each."""
    blocks = [prompt.record.metrics_block() for prompt in asked]
    return blocks[0] if len(blocks) == 1 else blocks
