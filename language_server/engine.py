"""The language engine: schedule -> run -> process, one step at a time.

Where the device computes by itself, the next step is launched before the tokens of this one are fetched, so that it
never waits for the host.

Synchronous and single-threaded: whoever owns it calls ``add``, ``abort`` and ``step`` from one thread. Knows nothing of
text, of the wire or of time.
"""

import dataclasses
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import torch

from common.model.graphs import Capture, CudaCapture
from common.service.errors import ConfigError, DvdError, InternalError, InvalidRequest, Overloaded
from language_server.attention import choose_backend
from language_server.attention.base import KVCache
from language_server.backbone import LanguageBackbone
from language_server.block_manager import BlockManager
from language_server.compiled_layers import compile_layers
from language_server.in_flight import InFlight, StepSizes, UnknownTokens
from language_server.kv_memory import default_kv_bytes
from language_server.model_runner import ImageEmbedsSource, ModelRunner, PreparedChunk
from language_server.pace import NO_LIMITS, PrefillLimits
from language_server.sampler import Sample, Sampler
from language_server.scheduler import ScheduledChunk, Scheduler
from language_server.sequence import FinishReason, SamplingParams, Sequence, SequenceStatus

_WARM_UP: Final = "warm-up"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the engine.

    KV memory is ``num_kv_blocks``, or else ``kv_cache_bytes``, or else what seems right: on CUDA ``kv_memory_fraction``
    of what is free once the weights are loaded, on a CPU a gibibyte.
    """

    max_model_len: int  # tokens of prompt and output together
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int = 2048  # tokens in one step
    max_num_waiting: int = 256  # sequences accepted beyond those running
    block_size: int | None = None  # tokens; None: what the attention backend likes
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    kv_memory_fraction: float = 0.85
    enable_prefix_caching: bool = True
    use_cuda_graphs: bool = True  # on CUDA, where attention can be captured
    compile_layers: bool = False
    async_scheduling: bool | None = None  # launch a step while the one before runs; None: where graphs are replayed

    def __post_init__(self) -> None:
        for key in ("max_model_len", "max_num_seqs", "max_num_waiting"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, found {getattr(self, key)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must not be less than max_num_seqs "
                f"({self.max_num_seqs}): every sequence that generates needs a token of every step"
            )


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step means for one sequence: a token, its end, or both. The token that stopped it is included.

    With ``error`` the sequence has failed and nothing else is set.
    """

    seq_id: int
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: DvdError | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_waiting_for_features: int  # of both kinds; nothing of them can run until rows arrive
    num_free_blocks: int
    num_total_blocks: int
    num_prefix_queries: int  # tokens since start
    num_prefix_hits: int
    num_preemptions: int  # since start
    num_step_tokens: int  # of the last step; 0: nothing could run
    num_step_sequences: int
    num_step_decodes: int  # of them, those that generate


class LanguageEngine:
    def __init__(
        self,
        config: EngineConfig,
        backbone: LanguageBackbone,
        eos_token_ids: Collection[int],
        embeds: ImageEmbedsSource,
        capture: Capture | None = None,
    ) -> None:
        """``capture``: makes the graphs; by default those of CUDA, on CUDA."""
        self.config = config
        attention = choose_backend(backbone.device)
        block_size = config.block_size or attention.block_size
        num_blocks = config.num_kv_blocks or self._num_kv_blocks(backbone, block_size)
        self.max_model_len = min(config.max_model_len, num_blocks * block_size)
        self._vocab_size = backbone.vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=config.enable_prefix_caching)
        self._scheduler = Scheduler(
            blocks, embeds, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        )
        if backbone.device.type == "cuda":
            torch.cuda.set_device(backbone.device)  # of this thread: Triton and graphs go where it says
            if config.use_cuda_graphs and attention.can_capture:
                capture = capture or CudaCapture()
        self._capture = capture
        num_scratch_blocks = 0 if capture is None else 1
        cache = KVCache(backbone.kv_shape, num_blocks + num_scratch_blocks, block_size, backbone.device)
        if config.compile_layers:
            compile_layers(backbone.model, cache)
        self._runner = ModelRunner(backbone, cache, attention, embeds)
        self._sampler = Sampler(eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        self._already_finished: list[StepOutput] = []
        self._in_flight: InFlight | None = None  # launched ahead, by the step before
        self._unfit: list[tuple[Sequence, DvdError]] = []  # found when their chunks were prepared
        self._last_sizes = StepSizes()

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def block_size(self) -> int:
        """Tokens of KV that are found again together."""
        return self._scheduler.blocks.block_size

    @property
    def launches_ahead(self) -> bool:
        """Whether the next step is launched while one runs. Without graphs the host takes as long as the device, and a
        model that cannot be captured makes it wait in the middle of a step."""
        is_async = self.config.async_scheduling
        return self.device.type == "cuda" and self._runner.has_graphs if is_async is None else is_async

    @property
    def decode_threads(self) -> int | None:
        """CPU threads of a step in which no prompt runs; None: as any other step."""
        return self._runner.decode_threads

    @decode_threads.setter
    def decode_threads(self, num_threads: int | None) -> None:
        self._runner.decode_threads = num_threads

    @property
    def prompt_threads(self) -> int | None:
        """CPU threads of a step in which prompts run; None: all."""
        return self._runner.prompt_threads

    @prompt_threads.setter
    def prompt_threads(self, num_threads: int | None) -> None:
        self._runner.prompt_threads = num_threads

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidRequest: it does not fit the context (``context_length_exceeded``), or is malformed.
            Overloaded: ``max_num_waiting`` sequences wait already.
        """
        _check(sequence, self.max_model_len, self._vocab_size)
        if self._scheduler.num_waiting >= self.config.max_num_waiting:
            raise Overloaded(f"{self.config.max_num_waiting} sequences are waiting already")
        if sequence.sampling.seed is None:
            sequence.set_seed(secrets.randbits(63))
        sequence.max_num_tokens = min(sequence.max_num_tokens, self.max_model_len)
        if sequence.output_token_ids and (reason := self._finish_reason(sequence)):
            self._already_finished.append(StepOutput(sequence.seq_id, finish_reason=reason))
            return
        self._sequences[sequence.seq_id] = sequence
        self._scheduler.add(sequence)

    def hold(self, holder: Sequence) -> int:
        """Keep the KV of the images that a prompt begins with, as far as it lies in the prefix cache, until ``holder``,
        which itself never runs, is aborted. Its request's sequences name it. Returns how many tokens are kept."""
        holder.max_num_tokens = min(holder.max_num_tokens, self.max_model_len)
        return self._scheduler.hold(holder)

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Of its prompt, at this moment; it may change with the next step. May be called from any thread, unlike the
        rest: it reads one entry after the other."""
        return len(self._scheduler.blocks.find_prefix(sequence)) * self.block_size

    def abort(self, seq_id: int) -> None:
        """Forget a sequence and free what it holds. Nothing happens if it has ended already."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            self._leave(sequence)
        else:
            self._scheduler.drop_hold(seq_id)

    def has_work(self) -> bool:
        """Whether ``step`` could do something, now or once features have arrived."""
        return bool(self._sequences or self._already_finished)

    def step(self, limits: PrefillLimits = NO_LIMITS) -> list[StepOutput]:
        """Run one batch, within ``limits`` of prompt tokens beside sequences that generate. With asynchronous
        scheduling the call before has launched it, and ``limits`` are those of the next, which this call launches.

        No outputs do not mean no progress: a long prompt takes several steps. ``EngineStats.num_step_tokens`` is 0 when
        every sequence waits for features.
        """
        outputs, self._already_finished = self._already_finished, []
        step = self._in_flight or self._launch(limits)
        self._last_sizes = StepSizes() if step is None else step.sizes
        if step is not None:
            self._in_flight = self._launch_behind(step, limits) if self.launches_ahead else None
            self._finish(step, outputs)
        self._end_unfit(outputs)
        return outputs

    def warm_up(self) -> None:
        """Prefill one token and generate another, so that the first request finds everything allocated and compiled.
        On CUDA also prefill as much as a step may hold, and capture the steps that generate."""
        if self.device.type == "cuda":
            self._warm_up_with(min(self.config.max_num_batched_tokens, self.max_model_len - 1))
        if self._capture is not None:
            self._runner.capture_graphs(self.config.max_num_seqs, self.max_model_len, self._capture)
        self._warm_up_with(1)

    def _warm_up_with(self, num_prompt_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        prompt = [0] * num_prompt_tokens
        self.add(Sequence(seq_id=-1, request_id=b"", prompt_token_ids=prompt, sampling=sampling, cache_scope=_WARM_UP))
        while self.has_work():
            self.step()

    def stats(self) -> EngineStats:
        scheduler, sizes = self._scheduler, self._last_sizes
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_waiting_for_features=scheduler.num_waiting_for_features,
            num_free_blocks=scheduler.blocks.num_free_blocks,
            num_total_blocks=scheduler.blocks.num_blocks,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            num_step_tokens=sizes.num_tokens,
            num_step_sequences=sizes.num_sequences,
            num_step_decodes=sizes.num_decodes,
        )

    def _num_kv_blocks(self, backbone: LanguageBackbone, block_size: int) -> int:
        """What the budget buys, and no more than all sequences at full length could use."""
        config = self.config
        most = config.max_num_seqs * -(-config.max_model_len // block_size)
        budget = config.kv_cache_bytes or default_kv_bytes(backbone.device, config.kv_memory_fraction)
        num_blocks = min(most, budget // backbone.kv_shape.bytes_per_block(block_size))
        if num_blocks < 1:
            raise ConfigError(f"{budget} bytes of KV memory hold no block of {block_size} tokens")
        return num_blocks

    def _launch_behind(self, step: InFlight, limits: PrefillLimits) -> InFlight | None:
        """The step after ``step``, which still runs. None: there is nothing to run, or the host must know the tokens.

        Sequences that turn out to have ended with ``step`` are computed once too often. Their blocks can be given to
        others as soon as that is known, and so can those of sequences that are preempted while they run: the device
        works in the order of the launches, so a new owner's KV is written behind the old one's, and it reads only what
        it has written or what was committed. What ``step`` and this one still write for the old owner lies behind its
        committed tokens, in no block that others may share.
        """
        if step.must_be_known:
            return None
        return self._launch(limits, step.add_unknown_tokens())

    def _launch(self, limits: PrefillLimits, unknown: UnknownTokens | None = None) -> InFlight | None:
        """Ask the device for a step; None when nothing can run. ``unknown``: tokens of the step before."""
        batch = self._prepare(self._scheduler.schedule(limits))
        if not batch:
            return None
        chunks = [prepared.chunk for prepared in batch]
        sampled = [chunk.sequence for chunk in chunks if chunk.is_sampled]
        sizes = StepSizes.of(chunks)
        logits = self._runner.run(batch, unknown)
        choice = self._sampler.choose(logits, sampled) if sampled else None
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.sequence.num_reached_tokens = chunk.end
        return InFlight(chunks, [chunk.sequence.num_preemptions for chunk in chunks], choice, sizes)

    def _prepare(self, chunks: list[ScheduledChunk]) -> list[PreparedChunk]:
        """Collect image rows, single tokens first. A sequence whose rows do not fit is left out."""
        batch = []
        for chunk in sorted(chunks, key=lambda chunk: chunk.num_tokens > 1):
            try:
                batch.append(self._runner.prepare(chunk))
            except DvdError as error:
                self._unfit.append((chunk.sequence, error))
        return batch

    def _finish(self, step: InFlight, outputs: list[StepOutput]) -> None:
        """Note what was computed, take the tokens, end the sequences that are done."""
        samples = step.fetch()
        for chunk in step.written:
            self._scheduler.blocks.commit(chunk.sequence, chunk.end)
        for sequence, sample in samples:
            outputs += self._advance(sequence, sample)

    def _end_unfit(self, outputs: list[StepOutput]) -> None:
        """Each alone, behind the last token it got."""
        unfit, self._unfit = self._unfit, []
        for sequence, error in unfit:
            if sequence.status is not SequenceStatus.FINISHED:
                outputs.append(self._fail(sequence, error))

    def _advance(self, sequence: Sequence, sample: Sample | DvdError) -> list[StepOutput]:
        if isinstance(sample, DvdError):
            self._scheduler.blocks.discard(sequence)
            return [self._fail(sequence, sample)]
        sequence.append(sample.token_id)
        try:
            if sequence.constraint is not None and not sequence.constraint.consume(sample.token_id):
                raise InternalError("a token was chosen that the grammar does not allow")
        except DvdError as error:
            return [self._fail(sequence, error)]
        reason = self._finish_reason(sequence)
        if reason:
            self._end(sequence, reason)
        output = StepOutput(sequence.seq_id, sample.token_id, sample.logprob, sample.top_logprobs)
        if reason != "stop" or self._is_stop_token(sequence):
            return [dataclasses.replace(output, finish_reason=reason)]
        # The token that completes a grammar is text, unlike one that stops.
        return [output, StepOutput(sequence.seq_id, finish_reason=reason)]

    def _is_stop_token(self, sequence: Sequence) -> bool:
        """Whether the last token ends the sequence by itself."""
        sampling, last = sequence.sampling, sequence.output_token_ids[-1]
        # Behind the end of a grammar nothing is left to generate.
        ignores_eos = sampling.ignore_eos and sequence.constraint is None
        return last in sampling.stop_token_ids or (last in self._eos_token_ids and not ignores_eos)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        constraint = sequence.constraint
        if self._is_stop_token(sequence) or (constraint is not None and constraint.is_finished):
            return "stop"
        return "length" if sequence.is_full else None

    def _fail(self, sequence: Sequence, error: DvdError) -> StepOutput:
        self._end(sequence, None)
        return StepOutput(sequence.seq_id, error=error)

    def _end(self, sequence: Sequence, reason: FinishReason | None) -> None:
        sequence.finish_reason = reason
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self._sequences[sequence.seq_id]
        sequence.drop_unknown_token()
        self._scheduler.remove(sequence)
        if not self._sequences:
            self._in_flight = None  # nobody wants to hear of it


def _check(sequence: Sequence, max_model_len: int, vocab_size: int) -> None:
    """Refuse what could not run. Ranges of sampling parameters are the router's business, vocabulary is ours."""
    if not sequence.prompt_token_ids:
        raise InvalidRequest("the prompt is empty", param="messages")
    # A resumed sequence may be full to the brim: then its last token was its end.
    if sequence.num_prompt_tokens >= max_model_len or sequence.num_tokens > max_model_len:
        raise InvalidRequest(
            f"the prompt has {sequence.num_tokens} tokens; prompt and reply together may have {max_model_len}",
            code="context_length_exceeded",
            param="messages",
        )
    ids = [*sequence.token_ids, *sequence.sampling.logit_bias, *sequence.sampling.stop_token_ids]
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InvalidRequest(f"token ids must be in [0, {vocab_size})")
    if sequence.sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, found {sequence.sampling.max_tokens}", param="max_tokens")
    _check_spans(sequence)


def _check_spans(sequence: Sequence) -> None:
    end = 0
    end_rows: dict[int, int] = {}  # by image
    for span in sequence.image_spans:
        if span.start < end or span.num_tokens < 1 or span.end > sequence.num_prompt_tokens:
            raise InvalidRequest(f"image {span.image_index} does not lie in the prompt, or images overlap")
        if span.first_row < end_rows.get(span.image_index, 0):
            raise InvalidRequest(f"rows of image {span.image_index} are out of order")
        end, end_rows[span.image_index] = span.end, span.end_row
