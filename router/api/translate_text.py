"""From the fields of a completion request to the words of the wire: one request for each of its prompts. Pure."""

import secrets
from collections.abc import Sequence

from common.service.errors import InvalidRequest
from protos.language_pb2 import GenerateRequest, RawPrompt, TokenIds
from protos.status_pb2 import ModelInfo
from router.affinity import prefix_key
from router.api.sampling import translate_sampling
from router.api.text_schemas import CompletionRequest, TextPrompt
from router.api.translate import MAX_PROMPT_BYTES, Origin, cache_scope
from router.request import ChatRequest
from router.settings import RouterSettings


def raw_prompt(prompt: TextPrompt, param: str, *, add_special_tokens: bool | None) -> RawPrompt:
    """One prompt. Raises InvalidRequest for far too much text."""
    if isinstance(prompt, str):
        raw = RawPrompt(text=prompt, add_special_tokens=add_special_tokens is not False)
    else:
        raw = RawPrompt(token_ids=TokenIds(ids=prompt))
    if raw.ByteSize() > MAX_PROMPT_BYTES:
        raise InvalidRequest("the prompt is far too long", code="context_length_exceeded", param=param)
    return raw


def prompt_params(num_prompts: int) -> list[str]:
    """How errors name each prompt."""
    return ["prompt"] if num_prompts == 1 else [f"prompt[{index}]" for index in range(num_prompts)]


def with_param(error: InvalidRequest, param: str) -> InvalidRequest:
    """What a language server says of a prompt, which for it is always the messages."""
    return type(error)(error.message, code=error.code, param=param if error.param == "messages" else error.param)


def check_num_choices(request: CompletionRequest, num_prompts: int, settings: RouterSettings) -> None:
    """Raises InvalidRequest for more replies than one request may ask for."""
    if num_prompts > 1 and num_prompts * (request.n or 1) > settings.max_n:
        message = f"{num_prompts} prompts with n={request.n or 1}: at most {settings.max_n} choices are allowed"
        raise InvalidRequest(message, param="prompt")


def translate_completion(
    request: CompletionRequest,
    prompts: Sequence[TextPrompt],
    origin: Origin,
    model: ModelInfo,
    settings: RouterSettings,
) -> list[ChatRequest]:
    """The requests as the language servers understand them, one for each prompt. Seeds that nobody gave differ.

    Raises:
        InvalidRequest: a field out of bounds, or far too much text.
    """
    chat, scope = request.as_chat(), cache_scope(origin.tenant, request.cache_salt)
    requests: list[ChatRequest] = []
    for prompt, param in zip(prompts, prompt_params(len(prompts)), strict=True):
        generate = GenerateRequest(
            request_id=secrets.token_bytes(len(origin.request_id)) if requests else origin.request_id,
            raw=raw_prompt(prompt, param, add_special_tokens=request.add_special_tokens),
            sampling=translate_sampling(chat, model, settings),
            cache_scope=scope,
            priority=request.priority or 0,
        )
        requests.append(ChatRequest(generate, (), origin.deadline, prefix=prefix_key(generate)))
    return requests
