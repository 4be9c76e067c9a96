"""What a GenerateRequest may say, and what its sampling fields mean to the engine.

The router has checked the ranges of API.md section 2 and says better what is wrong. They are checked again because a
value that no sampler expects could end the engine, and every request with it.
"""

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Final, TypeAlias

from common.service.errors import InvalidRequest
from language_server.bad_words import BadWords
from language_server.sequence import SamplingParams
from protos.language_pb2 import GenerateRequest
from protos.language_pb2 import SamplingParams as Wanted

REQUEST_ID_BYTES: Final = 16
MM_HASH_BYTES: Final = 32
MAX_SEED: Final = 2**63
MAX_STOP_STRINGS: Final = 16
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_CHARS: Final = 256
MAX_TOP_LOGPROBS: Final = 20
MAX_GRAMMAR_BYTES: Final = 2**17

_RANGES: Final = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_MUST_BE_POSITIVE: Final = ("top_p", "repetition_penalty")
_MAX_BIAS: Final = 100.0

Continuations: TypeAlias = Mapping[int, Items[int]]
"""What each choice that is not finished has said already, by its index; usually nothing."""


def check_request(request: GenerateRequest, *, vocab_size: int, max_choices: int, max_model_len: int) -> None:
    """Raises InvalidRequest, naming the field."""
    sampling = request.sampling
    if len(request.request_id) != REQUEST_ID_BYTES:
        raise InvalidRequest(f"{len(request.request_id)} bytes, expected {REQUEST_ID_BYTES}", param="request_id")
    if request.HasField("raw") and (request.messages or request.images or request.thinking or request.tools):
        raise InvalidRequest("a prompt is either raw or a conversation", param="raw")
    for index, image in enumerate(request.images):
        if len(image.mm_hash) != MM_HASH_BYTES:
            raise InvalidRequest(
                f"{len(image.mm_hash)} bytes, expected {MM_HASH_BYTES}", param=f"images[{index}].mm_hash"
            )
    if not 1 <= sampling.n <= max_choices:
        raise InvalidRequest(f"n must be between 1 and {max_choices}", param="n")
    if sampling.grammar.ByteSize() > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"the grammar has more than {MAX_GRAMMAR_BYTES} bytes", param=sampling.grammar.param)
    _check_ranges(sampling, vocab_size)
    for name, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
        *((f"continuations[{i}]", each.output_token_ids) for i, each in enumerate(request.continuations)),
    ):
        if any(token_id >= vocab_size for token_id in ids):
            raise InvalidRequest(f"a token id is outside the vocabulary of {vocab_size}", param=name)
    _check_continuations(request, max_model_len)


def _check_continuations(request: GenerateRequest, max_model_len: int) -> None:
    num_choices = request.sampling.n
    max_tokens = request.sampling.max_tokens or max_model_len
    seen = set[int]()
    for index, each in enumerate(request.continuations):
        param = f"continuations[{index}]"
        if each.choice >= num_choices or each.choice in seen:
            message = f"choice {each.choice}: each of the {num_choices} may be continued once"
            raise InvalidRequest(message, param=param)
        if len(each.output_token_ids) > max_tokens:
            message = f"{len(each.output_token_ids)} tokens, where max_tokens allows {max_tokens}"
            raise InvalidRequest(message, param=param)
        seen.add(each.choice)
    if sum(each.is_finished for each in request.continuations) == num_choices:
        raise InvalidRequest("every choice is finished", param="continuations")


def open_choices(request: GenerateRequest) -> Continuations:
    """The choices that are to be computed."""
    known = {each.choice: each for each in request.continuations}
    return {
        index: known[index].output_token_ids if index in known else ()
        for index in range(request.sampling.n)
        if index not in known or not known[index].is_finished
    }


def _check_ranges(sampling: Wanted, vocab_size: int) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high or (value == 0 and name in _MUST_BE_POSITIVE):  # also refuses NaN
            raise InvalidRequest(f"{name} is out of range: {value}", param=name)
    if not 0 <= sampling.top_k <= vocab_size:
        raise InvalidRequest(f"top_k is out of range: {sampling.top_k}", param="top_k")
    if sampling.top_logprobs > MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs is out of range: {sampling.top_logprobs}", param="top_logprobs")
    if not all(math.isfinite(bias) and abs(bias) <= _MAX_BIAS for bias in sampling.logit_bias.values()):
        raise InvalidRequest(f"a bias is not between -{_MAX_BIAS:g} and {_MAX_BIAS:g}", param="logit_bias")
    if len(sampling.bad_words) > MAX_BAD_WORDS or any(len(word) > MAX_BAD_WORD_CHARS for word in sampling.bad_words):
        message = f"more than {MAX_BAD_WORDS} words, or one of more than {MAX_BAD_WORD_CHARS} characters"
        raise InvalidRequest(message, param="bad_words")
    if len(sampling.stop) > MAX_STOP_STRINGS or not all(sampling.stop):
        raise InvalidRequest("too many stop strings, or an empty one", param="stop")


def check_context(num_prompt_tokens: int, max_model_len: int, *, may_be_longer: bool = False) -> None:
    """Raises InvalidRequest where a prompt leaves no room for a reply (``context_length_exceeded``).

    ``may_be_longer``: the number is only what the prompt has at least.
    """
    if num_prompt_tokens >= max_model_len:
        number = f"at least {num_prompt_tokens}" if may_be_longer else str(num_prompt_tokens)
        raise InvalidRequest(
            f"the prompt has {number} tokens, prompt and reply together may have {max_model_len}",
            code="context_length_exceeded",
            param="messages",
        )


def sampling_params(
    request: GenerateRequest, num_prompt_tokens: int, max_model_len: int, bad_words: BadWords
) -> SamplingParams:
    """The request's sampling, ``max_tokens`` clamped to the room that the prompt leaves.

    Raises:
        InvalidRequest: there is none (``context_length_exceeded``).
    """
    check_context(num_prompt_tokens, max_model_len)
    wanted = request.sampling
    room = max_model_len - num_prompt_tokens
    max_tokens = min(wanted.max_tokens or room, room)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(wanted.min_tokens, max_tokens),
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        seed=wanted.seed if wanted.HasField("seed") else None,
        stop_token_ids=frozenset(wanted.stop_token_ids),
        ignore_eos=wanted.ignore_eos,
        logit_bias=dict(wanted.logit_bias),
        bad_words=bad_words,
        logprobs=wanted.top_logprobs if wanted.logprobs else None,
    )


def for_each_choice(sampling: SamplingParams, num_choices: int) -> Items[SamplingParams]:
    """Choices of one seeded request differ from each other, and each is the same in every run."""
    if sampling.seed is None:
        return [sampling] * num_choices
    return [
        dataclasses.replace(sampling, seed=(sampling.seed + index) % MAX_SEED if index else sampling.seed)
        for index in range(num_choices)
    ]
