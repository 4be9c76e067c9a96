"""The language engine: schedule -> run -> process, one step at a time.

Synchronous and single-threaded: whoever owns it calls ``add``, ``abort`` and ``step`` from one thread. Knows nothing of
text, of the wire or of time.
"""

import dataclasses
import secrets
from collections.abc import Collection
from dataclasses import dataclass

import torch

from common.service.errors import ConfigError, DvdError, InternalError, InvalidRequest, Overloaded
from language_server.attention import choose_backend
from language_server.attention.base import KVCache
from language_server.backbone import LanguageBackbone
from language_server.block_manager import BlockManager
from language_server.kv_memory import default_kv_bytes
from language_server.model_runner import ImageEmbedsSource, ModelRunner, PreparedChunk
from language_server.sampler import Sample, Sampler
from language_server.scheduler import ScheduledChunk, Scheduler
from language_server.sequence import FinishReason, SamplingParams, Sequence


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
    ) -> None:
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
        cache = KVCache(backbone.kv_shape, num_blocks, block_size, backbone.device)
        self._runner = ModelRunner(backbone, cache, attention, embeds)
        self._sampler = Sampler(eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        self._already_finished: list[StepOutput] = []
        self._num_step_tokens = 0
        self._num_step_sequences = 0
        self._num_step_decodes = 0

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def decode_threads(self) -> int | None:
        """CPU threads of a step in which no prompt runs; None: as any other step."""
        return self._runner.decode_threads

    @decode_threads.setter
    def decode_threads(self, num_threads: int | None) -> None:
        self._runner.decode_threads = num_threads

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
        if sequence.output_token_ids and (reason := self._finish_reason(sequence)):
            self._already_finished.append(StepOutput(sequence.seq_id, finish_reason=reason))
            return
        self._sequences[sequence.seq_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, seq_id: int) -> None:
        """Forget a sequence and free what it holds. Nothing happens if it has ended already."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def has_work(self) -> bool:
        """Whether ``step`` could do something, now or once features have arrived."""
        return bool(self._sequences or self._already_finished)

    def step(self, max_prefill_tokens: int | None = None) -> list[StepOutput]:
        """Run one batch, with at most ``max_prefill_tokens`` prompt tokens beside sequences that generate.

        No outputs do not mean no progress: a long prompt takes several steps. ``EngineStats.num_step_tokens`` is 0 when
        every sequence waits for features.
        """
        outputs, self._already_finished = self._already_finished, []
        batch = self._prepare(self._scheduler.schedule(max_prefill_tokens), outputs)
        self._num_step_tokens = sum(prepared.chunk.num_tokens for prepared in batch)
        self._num_step_sequences = len(batch)
        self._num_step_decodes = sum(prepared.chunk.sequence.is_decoding for prepared in batch)
        if batch:
            logits = self._runner.run(batch)
            self._process(batch, logits, outputs)
        return outputs

    def warm_up(self) -> None:
        """Prefill one token and generate another, so that the first request finds everything allocated and compiled."""
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.add(Sequence(seq_id=-1, request_id=b"", prompt_token_ids=[0], sampling=sampling))
        while self.has_work():
            self.step()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_waiting_for_features=scheduler.num_waiting_for_features,
            num_free_blocks=scheduler.blocks.num_free_blocks,
            num_total_blocks=scheduler.blocks.num_blocks,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            num_step_tokens=self._num_step_tokens,
            num_step_sequences=self._num_step_sequences,
            num_step_decodes=self._num_step_decodes,
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

    def _prepare(self, chunks: list[ScheduledChunk], outputs: list[StepOutput]) -> list[PreparedChunk]:
        """Collect image rows, single tokens first. A sequence whose rows do not fit ends here, alone."""
        batch = []
        for chunk in sorted(chunks, key=lambda chunk: chunk.num_tokens > 1):
            try:
                batch.append(self._runner.prepare(chunk))
            except DvdError as error:
                outputs.append(self._fail(chunk.sequence, error))
        return batch

    def _process(self, batch: list[PreparedChunk], logits: torch.Tensor, outputs: list[StepOutput]) -> None:
        """Note what was computed, choose the next tokens, end the sequences that are done."""
        sampled = [prepared.chunk.sequence for prepared in batch if prepared.chunk.is_sampled]
        for prepared in batch:
            self._scheduler.blocks.commit(prepared.chunk.sequence, prepared.chunk.end)
        samples = self._sampler.sample(logits, sampled) if sampled else []
        for sequence, sample in zip(sampled, samples, strict=True):
            outputs += self._advance(sequence, sample)

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
        sampling, constraint = sequence.sampling, sequence.constraint
        if self._is_stop_token(sequence) or (constraint is not None and constraint.is_finished):
            return "stop"
        if len(sequence.output_token_ids) >= sampling.max_tokens or sequence.num_tokens >= self.max_model_len:
            return "length"
        return None

    def _fail(self, sequence: Sequence, error: DvdError) -> StepOutput:
        self._end(sequence, None)
        return StepOutput(sequence.seq_id, error=error)

    def _end(self, sequence: Sequence, reason: FinishReason | None) -> None:
        sequence.finish_reason = reason
        del self._sequences[sequence.seq_id]
        self._scheduler.remove(sequence)


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
    for span in sequence.image_spans:
        if span.start < end or span.num_tokens < 1 or span.end > sequence.num_prompt_tokens:
            raise InvalidRequest(f"image {span.image_index} does not lie in the prompt, or images overlap")
        end = span.end
