"""The scheduler's unit of work: one sequence of tokens and how it wants to be sampled.

Pure Python. Knows nothing of blocks' contents, tensors, text or the wire.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from language_server.bad_words import BadWords
from language_server.image_spans import ImageSpans

UNKNOWN_TOKEN: Final = -1
"""In place of a token that the device has chosen and the host does not know yet."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token. Ranges are those of API.md section 2; ``LanguageEngine.add`` checks them."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None  # None: the engine draws one
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: BadWords = field(default_factory=BadWords)
    logprobs: int | None = None  # None: off, else how many top logprobs come with each token

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def may_keep_any_number(self) -> bool:
        """Nobody can say beforehand how many tokens ``top_p`` keeps."""
        return self.top_p < 1.0 and self.top_k == 0


class Constraint(Protocol):
    """What the output of one sequence must be. It goes forward with the sequence, and two never share one."""

    @property
    def is_finished(self) -> bool:
        """The output is whole and nothing may be added to it."""
        ...

    def mask(self) -> bytes:
        """The tokens that may come next, one bit each, lowest bit first; at least as many as the vocabulary has.

        Raises DvdError when it cannot say; then the sequence fails.
        """
        ...

    def consume(self, token_id: int) -> bool:
        """Go on behind a token; False if it is not allowed. Raises DvdError when it cannot; then the sequence fails."""
        ...


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of one request: the prompt, what was generated, and how much of it lies in the KV cache.

    ``output_token_ids`` given at construction were already sent by another server: they count as outputs, so sampling
    goes on at the position where that server stopped; a ``constraint`` has consumed them already. ``cache_scope`` seeds
    the prefix hash: sequences of different scopes never share blocks. A smaller ``priority`` is served first.
    """

    seq_id: int
    request_id: bytes
    prompt_token_ids: list[int]
    sampling: SamplingParams
    image_spans: ImageSpans = field(default_factory=ImageSpans)
    output_token_ids: list[int] = field(default_factory=list)
    cache_scope: str = ""
    constraint: Constraint | None = None
    priority: int = 0
    prelude: "Sequence | None" = None  # computed the beginning of the prompt for this very sequence
    holder: "Sequence | None" = None  # holds the beginning of the prompt, of which no image rows will come

    has_images: bool = field(init=False)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    num_computed_tokens: int = field(default=0, init=False)  # KV of the first so many tokens is, or is being, computed
    num_committed_tokens: int = field(default=0, init=False)  # of these, those that others may share
    num_reached_tokens: int = field(default=0, init=False)  # the same, and not forgotten when its blocks are given back
    num_cached_tokens: int = field(default=0, init=False)  # of these, reused from other sequences at first admission
    num_preemptions: int = field(default=0, init=False)
    block_table: list[int] = field(default_factory=list, init=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False)  # of full blocks, as far as computed
    token_ids: list[int] = field(init=False)  # prompt and output
    max_num_tokens: int = field(init=False)  # prompt and output; the engine may lower it

    def __post_init__(self) -> None:
        self.has_images = len(self.image_spans) > 0
        if self.holder is not None:  # whose prompt begins as ours does
            self.block_hashes = self.holder.block_hashes[: len(self.holder.block_table)]
        self.output_token_ids = list(self.output_token_ids)
        self.token_ids = [*self.prompt_token_ids, *self.output_token_ids]
        self.max_num_tokens = len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def num_prepared_tokens(self) -> int:
        """Of the prompt, computed by its preludes: finding them is no reuse. For the engine thread, which alone knows
        how far they came."""
        prelude, num_tokens = self.prelude, 0
        while prelude is not None:  # the last of them may not have begun
            num_tokens = max(num_tokens, prelude.num_reached_tokens - prelude.num_cached_tokens)
            prelude = prelude.prelude
        return num_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 in steady decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Only the token generated last is missing from the cache, and another may follow it."""
        num_tokens = len(self.token_ids)
        is_generated = len(self.prompt_token_ids) < num_tokens < self.max_num_tokens
        return is_generated and num_tokens - self.num_computed_tokens == 1

    @property
    def is_full(self) -> bool:
        """No token may follow the last one, so that one never runs."""
        return len(self.token_ids) >= self.max_num_tokens

    @property
    def has_unknown_token(self) -> bool:
        """Whether the last token is there, but not its id."""
        return self.token_ids[-1] == UNKNOWN_TOKEN

    @property
    def needs_known_tokens(self) -> bool:
        """Whether the next token cannot be chosen by the device alone, before the host knows the last one."""
        sampling = self.sampling
        return (
            self.constraint is not None
            or sampling.has_penalties
            or sampling.may_keep_any_number
            or sampling.bad_words.needs_history
            or sampling.logprobs is not None
        )

    def append(self, token_id: int) -> None:
        """Add a token, or say which one the unknown token is."""
        self.drop_unknown_token()
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)

    def drop_unknown_token(self) -> None:
        """If there is one."""
        if self.has_unknown_token:
            del self.output_token_ids[-1], self.token_ids[-1]

    def set_seed(self, seed: int) -> None:
        """Fix the seed of a sequence that came without one."""
        self.sampling = dataclasses.replace(self.sampling, seed=seed)
