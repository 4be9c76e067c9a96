"""Messages as they come: roles, texts, and media read but not yet placed (API.md sections 2 and 3)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from common.service.errors import InvalidRequest
from protos.status_pb2 import ModelInfo
from router.api.media_parts import ImagePart, MediaReader, Medium, VideoPart, check_num_items
from router.api.named_media import MediaNames
from router.api.schemas import ChatCompletionRequest, FunctionCall, Message, Part
from router.api.tiles import TileBudgets
from router.media import NOTHING_FETCHED
from router.settings import RouterSettings

_ROLES: Final = {"developer": "system"}

ReadPart = str | ImagePart | VideoPart


@dataclass(frozen=True, slots=True)
class ReadMessage:
    """One turn."""

    role: str
    parts: Sequence[ReadPart]
    param: str  # of its content, for error messages
    calls: Sequence[FunctionCall] = ()  # behind its parts


def read_messages(
    request: ChatCompletionRequest,
    model: ModelInfo,
    settings: RouterSettings,
    names: MediaNames,
    fetched: Mapping[str, bytes] = NOTHING_FETCHED,
) -> list[ReadMessage]:
    """All turns of a request. Decodes base64: runs in a thread when that is much.

    Args:
        names: of media, for the request's scope; whatever has a name in this request is bound to it.
        fetched: what is behind its ``https:`` URLs.

    Raises:
        InvalidRequest: a part that is not supported, too many media, or one that cannot be used.
        RequestTooLarge: a medium with too many bytes.
    """
    count = check_num_items(request, settings)
    budgets = TileBudgets(request, model, settings, count.images)
    reader = MediaReader(request, model, settings, budgets, names, fetched)
    return [_read(message, f"messages[{index}]", reader) for index, message in enumerate(request.messages)]


def media_of(messages: Iterable[ReadMessage]) -> list[Medium]:
    """All media, in the order of their parts."""
    found: list[Medium] = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                found.append(part.medium)
            elif isinstance(part, VideoPart):
                found.extend(part.media)
    return found


def _read(message: Message, param: str, reader: MediaReader) -> ReadMessage:
    calls = [call.function for call in message.tool_calls or []]
    if calls and message.role != "assistant":
        raise InvalidRequest("only assistants call tools", param=f"{param}.tool_calls")
    param = f"{param}.content"
    if message.content is None and not calls:
        raise InvalidRequest("content is required", param=param)
    role = _ROLES.get(message.role, message.role)
    if message.content is None or isinstance(message.content, str):
        return ReadMessage(role, [message.content] if message.content is not None else [], param, calls)
    parts = [_read_part(part, f"{param}[{index}]", reader) for index, part in enumerate(message.content)]
    return ReadMessage(role, parts, param, calls)


def _read_part(part: Part, param: str, reader: MediaReader) -> ReadPart:
    if part.type == "text":
        if part.text is None:
            raise InvalidRequest("text is required", param=f"{param}.text")
        return part.text
    if part.type == "image_url":
        return reader.image(part, param)
    if part.type in ("video_url", "video"):
        return reader.video(part, param)
    raise InvalidRequest(
        f"parts of type {part.type[:64]!r} are not supported", code="unsupported_media", param=f"{param}.type"
    )
