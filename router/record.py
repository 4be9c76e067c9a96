"""What happened to one HTTP request: the source of its log line, its metrics and its ``metrics`` block.

Times are seconds of the monotonic clock inside and milliseconds outside (API.md section 4).
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal

from prometheus_client import Histogram

from common.service import metrics, tracing
from common.service.errors import DeadlineExceeded
from protos.language_pb2 import Admitted, Finished, LanguageTimings, Token, Usage
from protos.vision_pb2 import EncodeReply
from router.admission import RequestClass

log = logging.getLogger(__name__)

Stage = Literal["read", "admit", "language", "vision", "decode", "done"]
"""Where a request is: reading the body; checks and admission; waiting for a first token, with images to encode
("vision") or without ("language"); between tokens; answered."""

CLIENT_LEFT: Final = 499


@dataclass(frozen=True, slots=True)
class Deadline:
    """The end of a request's time, on the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left. Raises DeadlineExceeded when there are none."""
        seconds = self.at - time.monotonic()
        if seconds <= 0:
            raise DeadlineExceeded("the request's time is used up")
        return seconds


@dataclass(slots=True)
class EncodeCall:
    """One attempt at an image, or at a part of one. Without a reply at its end it failed, or came too late."""

    server: str
    image_index: int
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float | None = None
    reply: EncodeReply | None = None


@dataclass(slots=True)
class RequestRecord:
    """Filled in while a request moves through the router."""

    request_id: str
    received_at: float = field(default_factory=time.monotonic)
    kind: RequestClass = "text"
    stage: Stage = "read"
    is_chat: bool = False  # or a completion: generated, counted and logged
    is_flash: bool = False  # ViR may save tokens
    num_images: int = 0
    num_videos: int = 0
    num_tiles: int = 0  # thumbnails and frames included
    media_started_at: float | None = None
    media_seconds: float | None = None
    score_started_at: float | None = None
    score_seconds: float | None = None
    num_choices: int = 1  # asked for
    max_tokens: int = 0  # asked for, of each choice; 0: as many as there is room for
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    encode_attempts: int = 0
    encodes: list[EncodeCall] = field(default_factory=list)  # of every attempt
    encoded: list[EncodeReply] = field(default_factory=list)
    finished: dict[int, Finished] = field(default_factory=dict)
    num_replays: int = 0  # times that another language server went on with the reply
    language: str = ""  # name of the language server that has it now
    is_prompt_read: bool = False  # by the language server that has the request now, or it needs not be
    admitted_at: float | None = None  # the first time
    first_token_at: dict[int, float] = field(default_factory=dict)
    last_token_at: dict[int, float] = field(default_factory=dict)

    @property
    def has_first_token(self) -> bool:
        return bool(self.first_token_at)

    def admitted(self, admitted: Admitted) -> None:
        """A language server has taken the request, or what is left of it."""
        self.num_prompt_tokens = admitted.num_prompt_tokens
        self.is_prompt_read = False
        if self.has_first_token:
            self.num_replays += 1
        else:
            self.stage = "vision" if admitted.missing else "language"
        if self.admitted_at is None:
            self.admitted_at = time.monotonic()
            metrics.REQUEST_QUEUE_SECONDS.labels(self.kind).observe(self.age())

    def token(self, token: Token) -> None:
        """A token has come."""
        now = time.monotonic()
        self.is_prompt_read = True
        if not self.has_first_token:
            self.stage = "decode"
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.labels(self.kind).observe(now - self.received_at)
        if token.choice in self.last_token_at:
            gap = now - self.last_token_at[token.choice]
            _gaps(self.kind).observe(gap)
        self.first_token_at.setdefault(token.choice, now)
        self.last_token_at[token.choice] = now
        self.num_tokens += 1

    def choice_finished(self, finished: Finished) -> None:
        """One choice has ended."""
        self.is_prompt_read = True  # or there was nothing left to read it for
        self.finished[finished.choice] = self._across_servers(finished) if self.num_replays else finished
        metrics.REQUEST_SUCCESS.labels(finished.finish_reason).inc()

    @contextmanager
    def encode(self, server: str, image_index: int) -> Iterator[EncodeCall]:
        """An attempt that lasts as long as the block; whoever runs it adds the reply."""
        call = EncodeCall(server, image_index)
        self.encode_attempts += 1
        self.encodes.append(call)
        try:
            yield call
        finally:
            call.ended_at = time.monotonic()

    def age(self) -> float:
        """Seconds since the request came in."""
        return time.monotonic() - self.received_at

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object: final once all choices have ended, running before; reasoning is counted at the end."""
        done = self._usages()
        completion_tokens = sum(usage.completion_tokens for usage in done)
        if not done or self.stage != "done":
            completion_tokens = max(completion_tokens, self.num_tokens)
        prompt_tokens = max((usage.prompt_tokens for usage in done), default=self.num_prompt_tokens)
        saved = {"saved_tokens": max((usage.saved_tokens for usage in done), default=0)} if self.is_flash else {}
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": max((usage.cached_tokens for usage in done), default=0),
                "multimodal_tokens": {"image": self._image_tokens(), "video": self._video_tokens()},
                **saved,
            },
            "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in done)},
        }

    def metrics_block(self) -> dict[str, Any]:
        """Stage times of a finished request; ``*_ms`` is the slowest item's, null where a stage did not run."""
        timings = [finished.timings for finished in self.finished.values()]
        decode_ms = _slowest(timing.decode_ms for timing in timings)
        num_tokens = max((finished.usage.completion_tokens for finished in self.finished.values()), default=0)
        return {
            "time_to_first_token_ms": _slowest(timing.prefill_ms for timing in timings),
            "queue_time_ms": _slowest(timing.queue_ms for timing in timings),
            "generation_time_ms": decode_ms,
            "mean_itl_ms": round(decode_ms / (num_tokens - 1), 3) if decode_ms is not None and num_tokens > 1 else None,
            "tokens_per_second": round(num_tokens / decode_ms * 1e3, 3) if decode_ms else None,
            "dvd": self._stages(),
        }

    def finish(self, status: int, code: str | None) -> None:
        """The request has ended with ``status`` (499: its client left): count it and write its log line."""
        if not self.is_chat:
            return
        if status == CLIENT_LEFT:
            metrics.REQUESTS_ABORTED.labels(self.stage).inc()
        elif code is not None:
            metrics.REQUEST_ERRORS.labels(code, self.stage).inc()
        else:
            self._count_success()
        usage = self.usage()
        tracing.end_request(
            code,
            gen_ai__operation__name="chat",
            gen_ai__provider__name="dvd",
            gen_ai__usage__input_tokens=usage["prompt_tokens"],
            gen_ai__usage__output_tokens=usage["completion_tokens"],
        )
        stages = {key: value for key, value in self._stages().items() if value is not None}
        if self.num_replays:
            stages["replays"] = self.num_replays
        log.info(
            "request id=%s status=%d code=%s stage=%s prompt_tokens=%d completion_tokens=%d %s",
            *(self.request_id, status, code or "-", self.stage, usage["prompt_tokens"], usage["completion_tokens"]),
            " ".join(f"{key}={value}" for key, value in stages.items()),
        )

    def _across_servers(self, finished: Finished) -> Finished:
        """What several servers had a part in is timed here: to the last one, the reply began in the middle."""
        whole = Finished()
        whole.CopyFrom(finished)
        first, last = self.first_token_at.get(finished.choice), self.last_token_at.get(finished.choice)
        if first is not None and last is not None and self.admitted_at is not None:
            whole.timings.prefill_ms = (first - self.admitted_at) * 1e3
            whole.timings.decode_ms = (last - first) * 1e3
        return whole

    def _stages(self) -> dict[str, Any]:
        vision = [reply.timings for reply in self.encoded]
        language = [finished.timings for finished in self.finished.values()]
        return {
            "total_ms": _milliseconds(self.age()),
            "fetch_ms": None if self.media_seconds is None else _milliseconds(self.media_seconds),
            "score_ms": None if self.score_seconds is None else _milliseconds(self.score_seconds),
            "decode_ms": _slowest(timing.decode_ms for timing in vision),
            "vision_queue_ms": _slowest(timing.queue_ms for timing in vision),
            "encode_ms": _slowest(timing.encode_ms for timing in vision),
            "transfer_ms": _slowest(timing.transfer_ms for timing in vision),
            "feature_wait_ms": _slowest(timing.feature_wait_ms for timing in language),
            "language_queue_ms": _slowest(timing.queue_ms for timing in language),
            "prefill_ms": _slowest(timing.prefill_ms for timing in language),
            "images": self.num_images,
            "videos": self.num_videos,
            "tiles": self.num_tiles,
            "image_tokens": self._image_tokens(),
            "video_tokens": self._video_tokens(),
            "feature_bytes": sum(reply.feature_bytes for reply in self.encoded),
            "feature_cache_hits": sum(reply.cache_hit for reply in self.encoded),
            "encode_attempts": self.encode_attempts,
            "transport": next((reply.transport for reply in self.encoded), None),
        }

    def _usages(self) -> list[Usage]:
        return [finished.usage for finished in self.finished.values()]

    def _image_tokens(self) -> int:
        return max((usage.image_tokens for usage in self._usages()), default=0)

    def _video_tokens(self) -> int:
        return max((usage.video_tokens for usage in self._usages()), default=0)

    def _count_success(self) -> None:
        usage = self.usage()
        by_kind = usage["prompt_tokens_details"]["multimodal_tokens"]
        metrics.PROMPT_TOKENS.labels("text").inc(max(0, usage["prompt_tokens"] - sum(by_kind.values())))
        for kind, num_tokens in by_kind.items():
            metrics.PROMPT_TOKENS.labels(kind).inc(num_tokens)
        metrics.SAVED_PROMPT_TOKENS.inc(usage["prompt_tokens_details"].get("saved_tokens", 0))
        metrics.CACHED_PROMPT_TOKENS.inc(usage["prompt_tokens_details"]["cached_tokens"])
        metrics.GENERATION_TOKENS.inc(usage["completion_tokens"])
        metrics.REQUEST_PROMPT_TOKENS.observe(usage["prompt_tokens"])
        metrics.REQUEST_GENERATION_TOKENS.observe(usage["completion_tokens"])
        metrics.REQUEST_IMAGES.observe(self.num_images)
        metrics.REQUEST_TILES.observe(self.num_tiles)
        metrics.REQUEST_PARAMS_N.observe(self.num_choices)
        if self.max_tokens:
            metrics.REQUEST_PARAMS_MAX_TOKENS.observe(self.max_tokens)
        metrics.REQUEST_DURATION_SECONDS.labels(self.kind).observe(self.age())
        for finished in self.finished.values():
            _count_stages(finished.timings)
            if finished.usage.completion_tokens > 1:
                seconds = finished.timings.decode_ms / 1e3 / (finished.usage.completion_tokens - 1)
                metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.labels(self.kind).observe(seconds)


@cache
def _gaps(kind: RequestClass) -> Histogram:
    """Looked up once: it is wanted for every token."""
    return metrics.INTER_TOKEN_LATENCY_SECONDS.labels(kind)


def _count_stages(timings: LanguageTimings) -> None:
    stages = {"queue": timings.queue_ms, "prefill": timings.prefill_ms, "decode": timings.decode_ms}
    for stage, milliseconds in (*stages.items(), ("inference", timings.prefill_ms + timings.decode_ms)):
        metrics.REQUEST_STAGE_SECONDS.labels(stage).observe(milliseconds / 1e3)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _slowest(milliseconds: Iterable[float]) -> float | None:
    slowest = max(milliseconds, default=None)
    return None if slowest is None else round(slowest, 3)
