"""How tokens are chosen and when a reply ends: as the client says, else the checkpoint (API.md section 2)."""

import secrets
from typing import Final

from common.service.errors import InvalidRequest
from protos.language_pb2 import SamplingParams
from protos.status_pb2 import ModelInfo
from router.api.grammar import translate_grammar
from router.api.schemas import ChatCompletionRequest
from router.settings import RouterSettings

_SEED_BITS: Final = 63


def translate_sampling(request: ChatCompletionRequest, model: ModelInfo, settings: RouterSettings) -> SamplingParams:
    """Raises InvalidRequest for what is out of bounds for this model or these settings."""
    num_choices = request.n or 1
    if num_choices > settings.max_n:
        raise InvalidRequest(f"n: at most {settings.max_n} choices are allowed", param="n")
    top_k = model.default_top_k if request.top_k is None else request.top_k
    _check_vocabulary(request, model)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream", param="stream_options")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return SamplingParams(
        max_tokens=_max_tokens(request, model),
        min_tokens=request.min_tokens or 0,
        temperature=_given(request.temperature, model.default_temperature),
        # A checkpoint that says nothing leaves zeros; OpenAI's defaults switch these off.
        top_p=_given(request.top_p, model.default_top_p or 1.0),
        top_k=max(0, top_k),
        min_p=_given(request.min_p, 0.0),
        repetition_penalty=_given(request.repetition_penalty, model.default_repetition_penalty or 1.0),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        # Drawn here, so that every language server that has a part in the reply draws the same tokens.
        seed=secrets.randbits(_SEED_BITS) if request.seed is None else request.seed,
        n=num_choices,
        stop=stop,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        logit_bias=request.logit_bias or {},
        bad_words=_bad_words(request),
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
        grammar=translate_grammar(request),
        separate_reasoning=request.separate_reasoning is not False,
    )


def _max_tokens(request: ChatCompletionRequest, model: ModelInfo) -> int:
    """0: whatever room the prompt leaves. The language server clamps to that room in any case."""
    asked = _first(request.max_completion_tokens, request.max_tokens)
    limit = model.max_model_len if asked is None else min(asked, model.max_model_len)
    if request.min_tokens is not None and request.min_tokens > limit:
        raise InvalidRequest(f"min_tokens is above the limit of {limit} tokens", param="min_tokens")
    return 0 if asked is None else limit


def _check_vocabulary(request: ChatCompletionRequest, model: ModelInfo) -> None:
    size = model.vocab_size
    if request.top_k is not None and request.top_k > size:
        raise InvalidRequest(f"top_k is above the vocabulary of {size} tokens", param="top_k")
    for index, token_id in enumerate(request.stop_token_ids or []):
        if token_id >= size:
            raise InvalidRequest(f"token ids are below {size}", param=f"stop_token_ids[{index}]")
    if any(token_id >= size for token_id in request.logit_bias or {}):
        raise InvalidRequest(f"token ids are below {size}", param="logit_bias")


def _bad_words(request: ChatCompletionRequest) -> list[str]:
    words = request.bad_words or []
    for index, word in enumerate(words):
        if not word.strip():
            raise InvalidRequest("a word has more than blanks", param=f"bad_words[{index}]")
    return words


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
