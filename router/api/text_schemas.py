"""What a client may send to the routes of text: ``/v1/completions``, ``/tokenize`` and ``/detokenize``.

Fields that mean the same as those of a chat have the same bounds (schemas.py). ``null`` means "not given".
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct, field

from common.service.errors import InvalidRequest
from router.api.schemas import (
    NULL,
    UNSUPPORTED,
    ChatCompletionRequest,
    GenerationFields,
    TokenId,
    decode,
    parse_body,
    parse_chat,
)

MAX_TOKENS: Final = 2**20
"""Ids in one list; no context holds more."""
DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's, for completions only."""

ModelName = Annotated[str, Meta(max_length=1024)]
TokenIdList = Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]
TextPrompt = str | list[int]

# Of fields that are read in a second step.
_TEXT_SCHEMA: Final = {"type": "string", "minLength": 1}
_ID_SCHEMA: Final = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
_IDS_SCHEMA: Final = {"type": "array", "items": _ID_SCHEMA, "minItems": 1, "maxItems": MAX_TOKENS}
_PROMPT_SCHEMA: Final = {
    "oneOf": [
        _TEXT_SCHEMA,
        {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}
_MESSAGES_SCHEMA: Final = {
    "type": ["array", "null"],
    "description": "As in a chat request.",
    "items": {"$ref": "#/components/schemas/Message"},
    "minItems": 1,
    "maxItems": 1024,
}


class TokenizeRequest(Struct):
    """The body of ``POST /tokenize``: ``prompt``, or ``messages`` and whatever else a chat request may say."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[Raw, Meta(extra_json_schema=_MESSAGES_SCHEMA)] = field(default_factory=lambda: NULL)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct):
    """The body of ``POST /detokenize``."""

    tokens: TokenIdList
    model: ModelName | None = None


class CompletionRequest(GenerationFields, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[Raw, Meta(extra_json_schema=_PROMPT_SCHEMA)] = field(default_factory=lambda: NULL)
    add_special_tokens: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None

    def as_chat(self) -> ChatCompletionRequest:
        """All that means the same in a chat, with the defaults of completions."""
        fields = {name: getattr(self, name) for name in GenerationFields.__struct_fields__} | {
            "max_tokens": DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs,
            "separate_reasoning": False,
        }
        return ChatCompletionRequest(messages=[], **fields)


_completion = msgspec.json.Decoder(CompletionRequest)
_prompts: msgspec.json.Decoder[str | list[str | TokenId | TokenIdList]] = msgspec.json.Decoder(
    str | list[str | TokenId | TokenIdList]
)
# Beside what chats cannot have either.
UNSUPPORTED_COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **{name: inert for name, inert in UNSUPPORTED.items() if name not in CompletionRequest.__struct_fields__},
    "suffix": ("",),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "dvd": ({},),
}
_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)
# What a template of ours always does, or never.
_FIXED: Final[dict[str, Any]] = {"add_special_tokens": False, "add_generation_prompt": True}


def parse_completion(body: bytes) -> tuple[CompletionRequest, list[TextPrompt], list[str]]:
    """The request, its prompts, and the names of fields that mean nothing to us.

    Raises:
        InvalidRequest: as ``parse_chat``; no prompt, or one that is neither text nor ids.
    """
    request, ignored = parse_body(body, _completion, UNSUPPORTED_COMPLETION)
    prompts = _read_prompts(bytes(request.prompt))
    if request.echo and request.logprobs is not None:
        raise _unsupported("echo with logprobs: tokens of prompts have none here", "echo")
    if request.echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise _unsupported("echo of token ids", "echo")
    return request, prompts, ignored


def _read_prompts(raw: bytes) -> list[TextPrompt]:
    """Text, ids, or a list of either."""
    if raw == bytes(NULL):
        raise InvalidRequest("prompt is required", param="prompt")
    try:
        value = decode(_prompts, raw)
    except InvalidRequest as error:
        message = f"prompt{error.message}" if error.param else f"prompt: {error.message}"
        raise InvalidRequest(message, param=f"prompt{error.param or ''}") from None
    if isinstance(value, str):
        return [value]
    kinds = {type(item) for item in value}
    if len(kinds) != 1:
        raise InvalidRequest("prompt must be text, token ids, or a list of one of them", param="prompt")
    if kinds == {int}:
        return [[item for item in value if isinstance(item, int)]]
    return [item for item in value if not isinstance(item, int)]


def _unsupported(what: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"not supported by this server: {what}", code="unsupported_parameter", param=param)


def parse_tokenize(body: bytes) -> tuple[TokenizeRequest, ChatCompletionRequest | None, list[str]]:
    """The request, the conversation if there is one, and the names of fields that mean nothing to us.

    Raises:
        InvalidRequest: as ``parse_chat``; ``prompt`` and ``messages`` both given, or neither.
    """
    request, ignored = parse_body(body, _tokenize, {})
    is_chat = bytes(memoryview(request.messages)[:5]) != bytes(NULL)
    if is_chat == (request.prompt is not None):
        raise InvalidRequest("either prompt or messages must be given", param="prompt")
    if not is_chat:
        return request, None, ignored
    for name, value in _FIXED.items():
        if getattr(request, name) not in (None, value):
            message = f"{name} must be {str(value).lower()} with messages"
            raise InvalidRequest(message, code="unsupported_parameter", param=name)
    chat, ignored = parse_chat(body)
    return request, chat, [name for name in ignored if name not in TokenizeRequest.__struct_fields__]


def parse_detokenize(body: bytes) -> tuple[DetokenizeRequest, list[str]]:
    """The request, and the names of fields that mean nothing to us. Raises InvalidRequest, as ``parse_chat``."""
    return parse_body(body, _detokenize, {})
