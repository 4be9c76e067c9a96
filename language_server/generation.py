"""One Generate call from its request to its last event: check, tokenise, reserve, admit, generate, clean up.

Whatever ends the call, ``close`` gives back its place in line, its KV blocks and its feature memory. Knows nothing of
gRPC beyond the messages.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from common.service import metrics, tracing
from common.service.errors import Cancelled, DeadlineExceeded, DvdError, InvalidRequest, Overloaded
from language_server.bad_words import BadWords
from language_server.choice import Choice
from language_server.detokenizer import IncrementalDetokenizer
from language_server.engine import StepOutput
from language_server.engine_thread import EngineThread
from language_server.feature_image import ImageKey
from language_server.features import FeatureStore
from language_server.grammar import GrammarCompiler, GrammarState
from language_server.prelude import make_prelude
from language_server.prompt import Prompt, PromptBuilder
from language_server.prompt_size import PromptSize
from language_server.reasoning import ReasoningSplitter
from language_server.request import (
    Continuations,
    check_context,
    check_request,
    for_each_choice,
    open_choices,
    sampling_params,
)
from language_server.reservation import Lease
from language_server.residency import look_up
from language_server.sequence import FinishReason, Sequence
from language_server.tokenizer import Tokenizer
from protos.language_pb2 import (
    Admitted,
    Finished,
    GenerateEvent,
    GenerateRequest,
    ImageTicket,
    LanguageTimings,
    RawPrompt,
    Usage,
)
from protos.status_pb2 import Endpoint, FeatureDtype

if TYPE_CHECKING:
    from opentelemetry.context import Context

_INLINE_CHARS: Final = 4096
"""Longer texts are tokenised in another thread, so that they do not hold up everybody's tokens."""
_BLOCK_CHARS: Final = 50
"""A block of images takes as long as so much text: each frame of a video has one."""
_INLINE_TOKENS: Final = 1024
"""Likewise, of replies that a lost server had begun."""
_COMPILE_SECONDS: Final = 10.0
"""The worst schema found takes three, a usual one some milliseconds."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What all calls share."""

    prompts: PromptBuilder
    grammars: GrammarCompiler
    tokenizer: Tokenizer
    features: FeatureStore
    engine: EngineThread
    tokenising: Executor
    compiling: Executor
    deliver_to: Items[Endpoint]
    feature_dtype: FeatureDtype
    has_priorities: bool  # else all requests have the same
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_model_len: int  # tokens
    block_size: int  # tokens
    max_choices: int
    streams_prefill: bool  # else a prompt waits for all of its images
    max_stream_events: int
    feature_timeout: float  # seconds
    seq_ids: Iterator[int]


class Generation:
    """See ``events``. ``deadline`` is in monotonic seconds, spans belong to ``trace``. Also a ``SequenceSink``."""

    def __init__(
        self, backend: Backend, request: GenerateRequest, deadline: float, trace: "Context | None" = None
    ) -> None:
        self._backend = backend
        self._request = request
        self._deadline = deadline
        self._trace = trace
        self._arrived = time.monotonic()
        self._admitted = self._arrived
        self._features_complete: float | None = None
        self._held_seconds = 0.0  # between admission and the engine, because the prompt's length was open
        self._lease: Lease | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._prelude: Sequence | None = None
        self._holder: Sequence | None = None  # of KV of images that need no features
        self._grammars: dict[int, GrammarState] = {}  # by choice; empty: free text
        self._choices: dict[int, Choice] = {}  # by seq_id
        self._inbox: deque[StepOutput] = deque()
        self._failure: DvdError | None = None
        self._news = asyncio.Event()
        self._is_closed = False
        self._size = PromptSize()
        self._bad_words = BadWords()

    async def events(self) -> AsyncIterator[GenerateEvent]:
        """One Admitted, then Tokens, then one Finished per choice that had none on another server.

        Raises:
            InvalidRequest: the request cannot be served as it is.
            Overloaded: no place, or the reader of these events is too slow.
            DeadlineExceeded: the time is up, or features did not arrive.
            Unavailable: the engine has died.
        """
        request, backend, layout = self._request, self._backend, self._backend.features.layout
        check_request(
            request,
            vocab_size=backend.vocab_size,
            max_choices=backend.max_choices,
            max_model_len=backend.max_model_len,
        )
        continuations = open_choices(request)
        backend.engine.check_room(len(continuations))
        keys = [ImageKey(image.mm_hash, image.max_num_tokens) for image in request.images]
        backend.features.check(keys)
        prompt = await self._tokenise()
        self._bad_words = BadWords.of(request.sampling.bad_words, backend.tokenizer.encode)
        self._check_context(prompt, sum(layout.min_num_tokens(key.max_num_tokens) for key in keys))
        self._grammars = await self._compile_grammar(continuations)
        lease = await self._reserve(prompt, keys)
        self._check_context(prompt, lease.min_num_tokens)
        yield GenerateEvent(admitted=self._admission(prompt, lease))
        if not lease.is_complete and (layout.is_flash or not backend.streams_prefill):
            await self._wait_for_features(prompt, lease)
        for choice, finish_reason in await self._replay(self._prepare(prompt, lease, continuations)):
            if finish_reason is not None:
                yield self._finish(choice, finish_reason)
        self._start()
        while not all(choice.is_finished for choice in self._choices.values()):
            for event in self._on_output(await self._next_output()):
                yield event

    def close(self) -> None:
        """Give everything back. Safe to call twice, and at any moment."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        release = self._lease.release if self._lease is not None else lambda: None
        # Feature memory goes back only after the engine has let go of the sequences that read it.
        self._backend.engine.abort(self._seq_ids, release)
        self._observe()

    # --- before the engine

    async def _tokenise(self) -> Prompt:
        if self._request.HasField("raw"):
            prompt = await self._tokenise_raw(self._request.raw)
            if not prompt.num_text_tokens:
                raise InvalidRequest("the prompt is empty", param="messages")
            return prompt
        messages, layout = self._request.messages, self._backend.features.layout
        num_tiles = [layout.num_tiles(image.max_num_tokens) for image in self._request.images]
        tools = self._request.tools
        build = partial(self._backend.prompts.build, messages, num_tiles, thinking=self._request.thinking, tools=tools)
        num_chars = sum(len(part.text) or _BLOCK_CHARS for message in messages for part in message.parts)
        num_chars += sum(len(call.arguments) for message in messages for call in message.tool_calls)
        if num_chars + sum(map(len, tools)) < _INLINE_CHARS:
            return build()
        return await asyncio.get_running_loop().run_in_executor(self._backend.tokenising, build)

    async def _tokenise_raw(self, raw: RawPrompt) -> Prompt:
        build = partial(self._backend.prompts.build_raw, raw, self._backend.vocab_size)
        if raw.ByteSize() < _INLINE_CHARS:
            return build()
        return await asyncio.get_running_loop().run_in_executor(self._backend.tokenising, build)

    def _check_context(self, prompt: Prompt, num_rows: int) -> None:
        """Whether the prompt may fit, with so many rows of images at least."""
        is_flash = self._backend.features.layout.is_flash
        num_tokens = prompt.num_text_tokens + num_rows
        check_context(num_tokens, self._backend.max_model_len, may_be_longer=is_flash and num_rows > 0)

    async def _compile_grammar(self, continuations: Continuations) -> dict[int, GrammarState]:
        """Where each choice is in the reply's grammar: at its beginning, or where a lost server left it."""
        if not self._request.sampling.HasField("grammar"):
            return {}
        has_begun = threading.Event()

        def compile_it() -> dict[int, GrammarState]:
            has_begun.set()
            return self._enter_grammar(continuations)

        compiling = asyncio.get_running_loop().run_in_executor(self._backend.compiling, compile_it)
        try:
            async with asyncio.timeout(min(self._remaining(), _COMPILE_SECONDS)):
                return await compiling
        except InvalidRequest:
            metrics.LANGUAGE_GRAMMAR_FAILURES.inc()
            raise
        except TimeoutError:
            self._remaining()
            if not has_begun.is_set():  # it is not at fault for those before it
                raise Overloaded("other grammars are being compiled") from None
            metrics.LANGUAGE_GRAMMAR_FAILURES.inc()
            message = "the grammar takes too long to compile"
            raise InvalidRequest(message, param=self._request.sampling.grammar.param) from None

    def _enter_grammar(self, continuations: Continuations) -> dict[int, GrammarState]:
        started = time.monotonic()
        beginning = self._backend.grammars.compile(self._request.sampling.grammar)
        metrics.LANGUAGE_GRAMMAR_COMPILE_SECONDS.observe(time.monotonic() - started)
        states = {choice: beginning.copy() for choice in continuations}
        for choice, token_ids in continuations.items():
            states[choice].replay(token_ids)
        return states

    async def _reserve(self, prompt: Prompt, keys: Items[ImageKey]) -> Lease:
        features, request_id = self._backend.features, self._request.request_id
        computed = await self._hold_images(prompt, keys)
        self._check_open()
        remaining = self._remaining()
        lease = features.try_reserve(request_id, keys, lifetime=remaining, computed=computed)
        if lease is None:
            self._drop_hold()  # nobody waits in line with something that others may need to leave it
            lease = await features.reserve(request_id, keys, timeout=remaining, lifetime=remaining)
        if self._is_closed:
            lease.release()
            raise Cancelled("the caller has left")
        self._lease = lease
        return lease

    async def _hold_images(self, prompt: Prompt, keys: Items[ImageKey]) -> Mapping[int, Items[int]]:
        """Rows of each tile of the images, by index, that need no features: their KV is here and stays."""
        backend = self._backend
        residency = look_up(
            prompt,
            self._request,
            keys,
            backend.features,
            seq_id=next(backend.seq_ids),
            max_model_len=backend.max_model_len,
        )
        if residency is None or not await residency.is_likely(backend.engine, backend.tokenising):
            return {}
        self._check_open()
        self._holder = residency.holder
        held = await residency.hold(backend.engine)
        if not held:
            self._holder = None
        return held

    def _drop_hold(self) -> None:
        holder, self._holder = self._holder, None
        if holder is not None:
            self._backend.engine.abort([holder.seq_id])

    def _admission(self, prompt: Prompt, lease: Lease) -> Admitted:
        self._admitted = time.monotonic()
        return Admitted(
            missing=[ImageTicket(image_index=index, ticket=ticket) for index, ticket in lease.missing.items()],
            deliver_to=self._backend.deliver_to if lease.missing else (),
            dtype=self._backend.feature_dtype,
            num_prompt_tokens=prompt.num_text_tokens + sum(image.max_num_tokens for image in self._request.images),
            num_replayed_tokens=sum(len(each.output_token_ids) for each in self._request.continuations),
            seals_features=self._backend.features.seals_features,
        )

    async def _wait_for_features(self, prompt: Prompt, lease: Lease) -> None:
        """Wait for all tiles of a Flash checkpoint's images: only then it is known how long the prompt is. What stands
        before the first one that is missing is computed meanwhile."""
        self._watcher = asyncio.create_task(self._watch_features(lease))
        while self._features_complete is None:
            if self._backend.streams_prefill and not lease.is_complete:
                self._extend_prelude(prompt, lease)
            await self._wait_for_news()
        self._held_seconds = self._features_complete - self._admitted

    def _extend_prelude(self, prompt: Prompt, lease: Lease) -> None:
        self._check_open()
        backend = self._backend
        prelude = make_prelude(
            prompt,
            self._request,
            lease,
            seq_id=next(backend.seq_ids),
            block_size=backend.block_size,
            priority=self._priority,
            holder=self._holder,
            before=self._prelude,
        )
        if prelude is not None:
            self._end_prelude()
            backend.engine.add([prelude], self)
            self._prelude = prelude

    def _end_prelude(self) -> Sequence | None:
        """Let go of it."""
        prelude, self._prelude = self._prelude, None
        if prelude is not None:
            self._backend.engine.abort([prelude.seq_id])
        return prelude

    def _prepare(self, prompt: Prompt, lease: Lease, continuations: Continuations) -> Items[Choice]:
        request, backend = self._request, self._backend
        tile_tokens = lease.tile_tokens
        ids, spans = prompt.lay_out(tile_tokens, lease.tile_hashes)
        self._size = PromptSize.of(len(ids), request.images, [sum(sizes) for sizes in tile_tokens])
        sampling = sampling_params(request, len(ids), backend.max_model_len, self._bad_words)
        prelude = self._end_prelude()
        samplings = for_each_choice(sampling, request.sampling.n)
        for index, token_ids in continuations.items():
            sequence = Sequence(
                seq_id=next(backend.seq_ids),
                request_id=request.request_id,
                prompt_token_ids=ids,
                sampling=samplings[index],
                image_spans=spans,
                output_token_ids=list(token_ids),
                cache_scope=request.cache_scope,
                constraint=self._grammars.get(index),
                priority=self._priority,
                prelude=prelude,
                holder=self._holder,
            )
            detokenizer = IncrementalDetokenizer(
                backend.tokenizer,
                request.sampling.skip_special_tokens,
                list(request.sampling.stop),
                backend.prompts.hidden_header,
            )
            splitter = ReasoningSplitter(request.sampling.separate_reasoning)
            self._choices[sequence.seq_id] = Choice(index, sequence, detokenizer, splitter, backend.tokenizer)
        return list(self._choices.values())

    async def _replay(self, choices: Items[Choice]) -> list[tuple[Choice, FinishReason | None]]:
        """Bring each to where a lost server left it; says of each why it had ended, if it had."""

        def replay() -> list[tuple[Choice, FinishReason | None]]:
            return [(choice, choice.replay(self._backend.eos_token_ids)) for choice in choices]

        if sum(len(choice.sequence.output_token_ids) for choice in choices) < _INLINE_TOKENS:
            return replay()
        return await asyncio.get_running_loop().run_in_executor(self._backend.tokenising, replay)

    @property
    def _priority(self) -> int:
        return self._request.priority if self._backend.has_priorities else 0

    @property
    def _seq_ids(self) -> list[int]:
        """Of all that the engine may have of this call."""
        prelude = [] if self._prelude is None else [self._prelude.seq_id]
        holder = [] if self._holder is None else [self._holder.seq_id]
        return [*prelude, *self._choices, *holder]

    def _check_open(self) -> None:
        if self._is_closed:
            raise Cancelled("the caller has left")

    def _start(self) -> None:
        self._check_open()
        sequences = [choice.sequence for choice in self._choices.values() if not choice.is_finished]
        if not sequences:
            return
        self._backend.engine.add(sequences, self)
        if self._lease is not None and not self._lease.is_complete:
            self._watcher = asyncio.create_task(self._watch_features(self._lease))

    async def _watch_features(self, lease: Lease) -> None:
        try:
            while await lease.wait_progress(self._backend.feature_timeout):
                self._news.set()
        except DeadlineExceeded as error:
            self.on_failure(error)
        else:
            self._features_complete = time.monotonic()
            self._news.set()

    # --- SequenceSink

    def on_start(self, seq_id: int, when: float) -> None:
        if (choice := self._choices.get(seq_id)) is not None:  # else the prelude
            choice.started = when

    def on_output(self, output: StepOutput) -> None:
        if len(self._inbox) >= self._backend.max_stream_events:
            self.on_failure(Overloaded("the reader of this stream is too slow"))
            return
        self._inbox.append(output)
        self._news.set()

    def on_failure(self, error: DvdError) -> None:
        """Nothing more will come: the engine stops working for this call at once, its reader hears of it next."""
        self._failure = self._failure or error
        self._news.set()
        self._backend.engine.abort(self._seq_ids)

    # --- after the engine

    async def _next_output(self) -> StepOutput:
        while not self._inbox or self._failure is not None:
            await self._wait_for_news()
        return self._inbox.popleft()

    async def _wait_for_news(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._news.clear()
        try:
            async with asyncio.timeout(self._remaining()):
                await self._news.wait()
        except TimeoutError:
            raise DeadlineExceeded("the request's time is up") from None

    def _on_output(self, output: StepOutput) -> Iterator[GenerateEvent]:
        choice = self._choices[output.seq_id]
        if choice.is_finished:  # tokens made while its stop string was being found
            return
        token, finish_reason = choice.take(output)
        if token is not None:
            yield GenerateEvent(token=token)
        if finish_reason is not None:
            if output.finish_reason is None:
                self._backend.engine.abort([output.seq_id])
            yield self._finish(choice, finish_reason)

    def _finish(self, choice: Choice, finish_reason: FinishReason) -> GenerateEvent:
        choice.is_finished = True
        reasoning, text = choice.flush()
        usage = Usage(
            prompt_tokens=self._size.num_tokens,
            completion_tokens=choice.num_tokens,
            reasoning_tokens=choice.num_reasoning_tokens,
            cached_tokens=min(choice.sequence.num_cached_tokens, self._size.num_tokens),  # the rest was a replay's
            image_tokens=self._size.num_image_tokens,
            video_tokens=self._size.num_video_tokens,
            saved_tokens=self._size.num_saved_tokens,
        )
        return GenerateEvent(
            finished=Finished(
                choice=choice.index,
                finish_reason=finish_reason,
                reasoning=reasoning,
                text=text,
                usage=usage,
                timings=self._timings(choice),
            )
        )

    # --- time

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the request's time is up")
        return remaining

    def _timings(self, choice: Choice) -> LanguageTimings:
        return LanguageTimings(
            queue_ms=_milliseconds(self._arrived + self._held_seconds, choice.started),
            feature_wait_ms=_milliseconds(self._admitted, self._features_complete),
            prefill_ms=_milliseconds(choice.started, choice.first_token),
            decode_ms=_milliseconds(choice.first_token, choice.last_token),
        )

    def _observe(self) -> None:
        """Count a call that ends."""
        metrics.LANGUAGE_REQUEST_DURATION_SECONDS.observe(time.monotonic() - self._arrived)
        if not all(choice.is_finished for choice in self._choices.values()) and self._failure is None:
            metrics.CANCELLED.labels("language").inc()
        for choice in self._choices.values():
            metrics.LANGUAGE_GENERATION_TOKENS.inc(choice.num_tokens - choice.num_replayed)
            if not choice.is_finished or choice.first_token is None:
                continue
            timings = self._timings(choice)
            metrics.LANGUAGE_QUEUE_SECONDS.observe(timings.queue_ms / 1000)
            metrics.LANGUAGE_FEATURE_WAIT_SECONDS.observe(timings.feature_wait_ms / 1000)
            metrics.LANGUAGE_PREFILL_SECONDS.observe(timings.prefill_ms / 1000)
            metrics.LANGUAGE_DECODE_SECONDS.observe(timings.decode_ms / 1000)
        if self._choices:
            self._size.count()
        if self._trace is not None:
            self._make_spans(self._trace)

    def _make_spans(self, parent: "Context") -> None:
        if self._admitted > self._arrived:
            images: dict[str, tracing.Attribute] = {"dvd__images": len(self._request.images)}
            tracing.span("language.admit", self._arrived, self._admitted, parent, **images)
            # As this end sees it: until all of them are here.
            tracing.span("feature.transfer", self._admitted, self._features_complete, parent, **images)
        for choice in self._choices.values():
            of: dict[str, tracing.Attribute] = {"dvd__choice": choice.index}
            cached = choice.sequence.num_cached_tokens
            tracing.span("language.queue", self._arrived + self._held_seconds, choice.started, parent, **of)
            tracing.span("prefill", choice.started, choice.first_token, parent, **of, dvd__cached_tokens=cached)
            tracing.span("decode", choice.first_token, choice.last_token, parent, **of, dvd__tokens=choice.num_tokens)


def _milliseconds(start: float | None, end: float | None) -> float:
    return 0.0 if start is None or end is None else max(0.0, end - start) * 1000
