"""What a client may send to the routes of text: ``/v1/completions``, ``/tokenize`` and ``/detokenize``.

Fields that mean the same as those of a chat have the same bounds (schemas.py). ``null`` means "not given".
"""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct

from common.service.errors import InvalidRequest
from router.api.schemas import NULL, ChatCompletionRequest, TokenId, parse_body, parse_chat

MAX_TOKENS: Final = 2**20
"""Ids in one list; no context holds more."""

ModelName = Annotated[str, Meta(max_length=1024)]
TokenIdList = Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]


class TokenizeRequest(Struct):
    """The body of ``POST /tokenize``: ``prompt``, or ``messages`` and whatever else a chat request may say."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Raw = NULL
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct):
    """The body of ``POST /detokenize``."""

    tokens: TokenIdList
    model: ModelName | None = None


_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)
# What a template of ours always does, or never.
_FIXED: Final[dict[str, Any]] = {"add_special_tokens": False, "add_generation_prompt": True}


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
