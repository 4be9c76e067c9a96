"""What ``benchmarks engine`` measures: our language engine and transformers, with the same random weights.

Both do the same work for the same prompts and never stop early. Knows nothing of tables and rounds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.random_checkpoint import TextShape
from common.service.errors import InternalError
from language_server.backbone import build_model, make_backbone
from language_server.cpu_threads import tune_decode_threads
from language_server.engine import EngineConfig, LanguageEngine
from language_server.sequence import SamplingParams
from language_server.sequence import Sequence as EngineSequence

PROMPT_TOKENS: Final = 64
_MAX_MODEL_LEN: Final = 4096
_MAX_NUM_SEQS: Final = 64
_STD: Final = 0.02
_SEED: Final = 0
_CONFIG: Final = EngineConfig(
    max_model_len=_MAX_MODEL_LEN,
    max_num_seqs=_MAX_NUM_SEQS,
    max_num_batched_tokens=_MAX_MODEL_LEN,
    enable_prefix_caching=False,  # every round has the same prompts
)

Prompts = Sequence[list[int]]


class Subject(Protocol):
    """Seconds that a piece of work took."""

    @property
    def name(self) -> str: ...

    def decode(self, batch: int, num_tokens: int) -> float:
        """``num_tokens`` steps in which ``batch`` sequences generate; their prompts are not counted."""

    def prefill(self, num_tokens: int) -> float:
        """One prompt, to its first token."""

    def whole_batch(self, batch: int, num_tokens: int) -> float:
        """``batch`` prompts, each to its ``num_tokens``-th token."""


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """The same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocab_size, (num_prompts, num_tokens), generator=generator).tolist()


def make_pair(shape: TextShape, dtype: torch.dtype, device: torch.device) -> tuple["OurEngine", "Transformers"]:
    """Both with the same weights, drawn at random."""
    values = text_config(shape)
    reference = _random_model(values, dtype, device)
    ours: Any = build_model(values, True, dtype=dtype, device=device)
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[name])
    return OurEngine(make_backbone(ours)), Transformers(reference)


def text_config(shape: TextShape) -> dict[str, Any]:
    """A dense Qwen3 with tied embeddings, as its small members have them."""
    return {
        "model_type": "qwen3",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }


class OurEngine:
    """Steps of ``LanguageEngine``, as a server runs them."""

    name = "DvD"

    def __init__(self, backbone: Any, config: EngineConfig = _CONFIG) -> None:
        self._vocab_size: int = backbone.vocab_size
        started = time.perf_counter()
        self._engine = LanguageEngine(config, backbone, [], NoImages())
        self._engine.warm_up()
        self.start_seconds = time.perf_counter() - started
        tune_decode_threads(self._engine, alone=1.0)

    def decode(self, batch: int, num_tokens: int) -> float:
        self._add(batch, PROMPT_TOKENS, num_tokens + 1)
        self._engine.step()
        return self._seconds_to_the_end()

    def decode_steps(self, batch: int, num_tokens: int, prompt_tokens: int) -> list[float]:
        """Seconds of each step in which all of ``batch`` sequences generate, at most ``num_tokens`` of them, behind
        prompts of ``prompt_tokens``."""
        self._add(batch, prompt_tokens, num_tokens + 1)
        while self._engine.stats().num_step_decodes < batch:
            self._engine.step()
        seconds = []
        while self._engine.has_work():
            started = time.perf_counter()
            self._engine.step()
            took = time.perf_counter() - started
            if self._engine.stats().num_step_decodes == batch:  # those that began first also end first
                seconds.append(took)
        return seconds

    def prefill(self, num_tokens: int, num_prompts: int = 1) -> float:
        self._add(num_prompts, num_tokens, 1)
        return self._seconds_to_the_end()

    @property
    def kv_tokens(self) -> int:
        """What the KV memory holds."""
        return self._engine.stats().num_total_blocks * self._engine.block_size

    def whole_batch(self, batch: int, num_tokens: int) -> float:
        self._add(batch, PROMPT_TOKENS, num_tokens)
        return self._seconds_to_the_end()

    def _add(self, batch: int, prompt_tokens: int, max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(random_prompts(batch, prompt_tokens, self._vocab_size)):
            self._engine.add(EngineSequence(number, b"", prompt, sampling))

    def _seconds_to_the_end(self) -> float:
        started = time.perf_counter()
        while self._engine.has_work():
            for output in self._engine.step():
                if output.error is not None:
                    raise output.error
        return time.perf_counter() - started


class Transformers:
    """``generate`` for a batch of equal lengths, a plain forward for a prompt, ``generate_batch`` for a whole batch."""

    name = "transformers"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab_size: int = model.config.vocab_size

    def decode(self, batch: int, num_tokens: int) -> float:
        clock = _StepClock()
        self._generate(self._prompts(batch), num_tokens + 1, clock)
        return clock.seconds_after_the_first

    @torch.inference_mode()
    def prefill(self, num_tokens: int) -> float:
        token_ids = torch.tensor(random_prompts(1, num_tokens, self._vocab_size), device=self._model.device)
        started = time.perf_counter()
        self._model(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
        return time.perf_counter() - started

    def whole_batch(self, batch: int, num_tokens: int) -> float:
        """By continuous batching, which keeps its own paged cache."""
        prompts = random_prompts(batch, PROMPT_TOKENS, self._vocab_size)
        config = _generation_config(num_tokens)
        started = time.perf_counter()
        answers = self._model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - started
        lengths = {len(answer.generated_tokens) for answer in answers.values()}
        if len(answers) != batch or lengths != {num_tokens}:
            raise InternalError(f"generate_batch: {len(answers)} answers of {sorted(lengths)} tokens")
        return seconds

    def _prompts(self, batch: int) -> Tensor:
        return torch.tensor(random_prompts(batch, PROMPT_TOKENS, self._vocab_size), device=self._model.device)

    def _generate(self, token_ids: Tensor, num_tokens: int, clock: "_StepClock") -> None:
        mask = torch.ones_like(token_ids)
        config = _generation_config(num_tokens)
        self._model.generate(token_ids, attention_mask=mask, generation_config=config, stopping_criteria=[clock])


class _StepClock:
    """A stopping criterion that stops nothing: it is called after every token."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, token_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        self._times.append(time.perf_counter())
        return torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)

    @property
    def seconds_after_the_first(self) -> float:
        return self._times[-1] - self._times[0]


@dataclass(frozen=True, slots=True)
class NoImages:
    """For text only."""

    def num_ready_tokens(self, request_id: bytes, image_index: int) -> int:
        raise InternalError("a benchmark of text was asked for an image")

    def rows(self, request_id: bytes, image_index: int, start: int, stop: int) -> Tensor:
        raise InternalError("a benchmark of text was asked for an image")


def _generation_config(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
    )


def _random_model(values: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    config = AutoConfig.for_model(**values)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    fill_randomly(model)
    return model.to(device).eval().requires_grad_(False)


def fill_randomly(model: Any) -> None:
    """Matrices where they lie, the same at every call; norms get ones, biases zeros."""
    torch.manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_STD)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
