"""Bytes of a streamed answer -> when its tokens came and how it ended (API.md section 4). Knows no sockets and no
clock.

The hot path of the client: one event is found, decoded into typed records and counted in a few microseconds.

* A token event carries text (or a tool call). Empty text without a ``role`` also is a token, one whose character is not
  complete yet; the first chunk of each choice, with ``role`` and no text, is none, nor is an empty one that says how
  it ended.
* An answer is good when every choice that spoke ended with ``stop``, ``length`` or ``tool_calls``, and no error came.
"""

from typing import Any, Final

import msgspec
from msgspec import Struct

from benchmarks.samples import Failure, Sample

GOOD_ENDS: Final = frozenset({"stop", "length", "tool_calls"})
_MAX_MESSAGE_CHARS: Final = 200


class _Delta(Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None
    index: int = 0


class _PromptDetails(Struct):
    cached_tokens: int | None = None
    multimodal_tokens: dict[str, int] | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: dict[str, Any] | None = None
    error: Any = None
    object: str | None = None


class _Error(Struct):
    message: str | None = None
    code: str | int | None = None
    type: str | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_error = msgspec.json.Decoder(_Error | str)


class AnswerStream:
    """Reads one answer into ``sample``. ``feed`` it what arrives, then ask ``failure``."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._rest = b""
        self._last_at = 0.0
        self._num_events = 0
        self._usage: _Usage | None = None
        self._open: set[int] = set()
        self._ends: dict[int, str] = {}
        self._failure: Failure | None = None
        self.is_done = False
        """``[DONE]`` has come: whatever the connection does now, the answer is complete."""

    def feed(self, data: bytes, now: float) -> None:
        """Take what was read at ``now``. Raises msgspec.DecodeError on an event that is not one of this API."""
        *lines, self._rest = (self._rest + data if self._rest else data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)
            elif line.startswith(b"event: error"):
                self._failure = Failure("error_event")

    def finish(self) -> Failure | None:
        """After the last byte: fill in the counts; why the answer is not good, or None."""
        self._count_tokens()
        if self._failure is not None:
            return self._failure
        bad = next((reason for reason in self._ends.values() if reason not in GOOD_ENDS), None)
        if bad is not None:
            return Failure("no_finish_reason", bad[:64])
        if not self._ends or self._open - self._ends.keys():
            return Failure("no_finish_reason")
        return None

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.is_done = True
            return
        chunk = _chunk.decode(payload)
        if chunk.error is not None or chunk.object == "error":
            self._failure = Failure("error_event", *describe_error(payload))
            return
        for choice in chunk.choices:
            self._choice(choice, now)
        if chunk.usage is not None:
            self._usage = chunk.usage
        if chunk.metrics is not None:
            self._sample.metrics = chunk.metrics

    def _choice(self, choice: _Choice, now: float) -> None:
        if choice.delta is not None and _is_token(choice.delta, choice.finish_reason):
            self._num_events += 1
            if self._sample.first_at is None:
                self._sample.first_at = now
            else:
                self._sample.gaps.append(now - self._last_at)
            self._last_at = now
        if choice.finish_reason is None:
            self._open.add(choice.index)
            return
        self._ends[choice.index] = choice.finish_reason
        self._sample.ended_at = now
        if self._sample.first_at is None:  # an answer that ended before it began: its end is its first sign
            self._sample.first_at = now

    def _count_tokens(self) -> None:
        usage, sample = self._usage or _Usage(), self._sample
        sample.output_tokens = self._num_events if usage.completion_tokens is None else usage.completion_tokens
        sample.prompt_tokens = usage.prompt_tokens
        details = usage.prompt_tokens_details or _PromptDetails()
        sample.cached_tokens = details.cached_tokens or 0
        sample.image_tokens = (details.multimodal_tokens or {}).get("image", 0)


def _is_token(delta: _Delta, finish_reason: str | None) -> bool:
    if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls is not None:
        return True
    return delta.content is not None and delta.role is None and finish_reason is None


def describe_error(body: bytes) -> tuple[str, str]:
    """Code and message of an error body, OpenAI's, a flat one, or anything else; as far as it says."""
    try:
        outer = msgspec.json.decode(body)
        error = _error.decode(msgspec.json.encode(outer.get("error", outer) if isinstance(outer, dict) else outer))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", body[:_MAX_MESSAGE_CHARS].decode("utf-8", "replace")
    if isinstance(error, str):
        return "", error[:_MAX_MESSAGE_CHARS]
    return str(error.code or error.type or "")[:64], (error.message or "")[:_MAX_MESSAGE_CHARS]
