"""What a client may send to ``/v1/chat/completions``: fields, kinds and bounds (API.md section 2).

Bounds that depend on the model or on options are checked in ``translate``. ``null`` means "not given" for every field.
"""

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct, field

from common.service.errors import InvalidRequest

MAX_JSON_DEPTH: Final = 64
MAX_JSON_CONTAINERS: Final = 200_000
"""Objects and arrays in one body; far above 128 images, and bounds what a body of brackets costs to read."""
MAX_TEMPLATE_KWARGS_BYTES: Final = 4 * 2**10
NULL: Final = Raw(b"null")
_MAX_SHOWN_CHARS: Final = 64

PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]
ClientId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,128}\Z")]
Uuid = Annotated[str, Meta(pattern=r"^[\x20-\x7e]{1,128}\Z")]
# A schema knows keys as text only.
_ID_NAMES: Final = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024, extra_json_schema=_ID_NAMES)
]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Detail = Literal["low", "high", "auto"]
FrameCount = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
FramesPerSecond = Annotated[float, Meta(ge=-1, le=1000)]
Threshold = Annotated[float, Meta(ge=0, le=1)]
Frames = Annotated[list[str], Meta(min_length=1)]
ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}\Z")]


class ImageUrl(Struct):
    """Where an image is and how many tiles it may have. Without a URL it is the one that its ``uuid`` names."""

    url: str | None = None
    detail: Detail | None = None
    max_dynamic_patch: PositiveInt | None = None
    min_dynamic_patch: PositiveInt | None = None


class VideoUrl(Struct):
    """Where a video is, or its frames as images, and how many frames of it are looked at; -1: no limit of this kind."""

    url: str | None = None
    frames: Frames | None = None
    num_frames: FrameCount | None = None
    fps: FramesPerSecond | None = None


class Part(Struct):
    """One part of a message. Which other fields count depends on ``type``."""

    type: str
    text: str | None = None
    image_url: str | ImageUrl | None = None
    video_url: str | VideoUrl | None = None
    video: Frames | None = None
    uuid: Uuid | None = None


class FunctionCall(Struct):
    """What was called; ``arguments`` is text that should hold a JSON object."""

    name: ToolName
    arguments: str


class ToolCall(Struct):
    """One of ``tool_calls`` of an earlier turn, as an answer of ours had it."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None


class Message(Struct):
    """One turn. Results of tools come in the order of their calls: ids and names change nothing, nor does what an
    answer of ours has beside content and calls."""

    role: Role
    content: str | Annotated[list[Part], Meta(min_length=1, max_length=1024)] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=1024)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None


class StreamOptions(Struct):
    """What a stream carries beside tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Struct):
    """``response_format.json_schema``. ``strict`` changes nothing: every schema is kept to."""

    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = field(default_factory=lambda: NULL)
    strict: bool | None = None


class ResponseFormat(Struct):
    """What the reply must be, as OpenAI says it."""

    type: str
    json_schema: JsonSchema | None = None


class Function(Struct):
    """A function that may be called. Without ``parameters`` it has none; ``strict``: arguments satisfy them."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = field(default_factory=lambda: NULL)
    strict: bool | None = None


class Tool(Struct):
    """Something the model may ask the client to do."""

    type: str
    function: Function | None = None


class FunctionName(Struct):
    """Which one."""

    name: ToolName


class ToolChoice(Struct):
    """A tool that must be called."""

    type: str
    function: FunctionName | None = None


class ProcessorKwargs(Struct, forbid_unknown_fields=True):
    """``mm_processor_kwargs``: the only two keys that are read."""

    max_dynamic_patch: PositiveInt | None = None
    min_dynamic_patch: PositiveInt | None = None


class VideoIo(Struct, forbid_unknown_fields=True):
    """The same for all videos. Clients that always send it may do so without any video."""

    num_frames: FrameCount | None = None
    fps: FramesPerSecond | None = None


class MediaIo(Struct, forbid_unknown_fields=True):
    """``media_io_kwargs``."""

    video: VideoIo | None = None


class ChatTemplateKwargs(Struct, forbid_unknown_fields=True):
    """``chat_template_kwargs``: a template is a program here, this is all that it can be told."""

    enable_thinking: bool | None = None


class VirFields(Struct, forbid_unknown_fields=True):
    """``dvd.vir``: which tiles a Flash model compresses."""

    mode: Literal["off", "auto", "force64"] | None = None
    scope: Literal["request", "image", "absolute"] | None = None
    relative_threshold: Threshold | None = None
    absolute_threshold: Threshold | None = None


class DvdFields(Struct, forbid_unknown_fields=True):
    """``dvd``: what no other server has. A wish that is not understood is refused, whatever ``X-Dvd-Strict`` says."""

    vir: VirFields | None = None
    tile_budget: Literal["per_image", "shared"] | None = None
    combine_images: bool | None = None


class GenerationFields(Struct):
    """What means the same for chats and completions."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    n: PositiveInt | None = None
    seed: Int64 | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=16)] | None = None
    logit_bias: LogitBias | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: ClientId | None = None
    rid: ClientId | None = None
    priority: Annotated[int, Meta(ge=-128, le=127)] | None = None
    cache_salt: Annotated[str, Meta(max_length=128)] | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Raw] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    separate_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_dynamic_patch: PositiveInt | None = None
    min_dynamic_patch: PositiveInt | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    media_io_kwargs: MediaIo | None = None
    dvd: DvdFields | None = None


# Fields that would change or constrain the output and that nothing here can honour yet, with the values that ask for
# nothing. Everything else in them is refused: a 200 with free text would be a lie.
UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "chat_template": (),
    "thinking_token_budget": (),
    "include_reasoning": (True,),
    "stream_reasoning": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "use_beam_search": (False,),
    "best_of": (1,),
    "modalities": (["text"], []),
    "audio": (),
    "prompt_embeds": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "echo": (False,),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "stop_regex": ([],),
    "min_new_tokens": (0,),
    "max_new_tokens": (),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "repetition_detection": (),
    "custom_logit_processor": (),
    "guided_whitespace_pattern": (),
    "lora_path": (),
    "web_search_options": (),
}

_T = TypeVar("_T")
StructT = TypeVar("StructT", bound=Struct)
# Tools that may not be called change nothing.
_NEEDLESS: Final[Mapping[str, str]] = {"functions": "function_call"}

_top_level = msgspec.json.Decoder(dict[str, Raw])
_chat = msgspec.json.Decoder(ChatCompletionRequest)
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_QUOTED = re.compile(rf"(?P<quote>['`])(?P<start>[^'`]{{{_MAX_SHOWN_CHARS}}})[^'`]*(?P=quote)")
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def parse_chat(body: bytes) -> tuple[ChatCompletionRequest, list[str]]:
    """The request, and the names of top-level fields that mean nothing to us.

    Raises:
        InvalidRequest: ``invalid_json``, ``invalid_value`` with the field's path, or ``unsupported_parameter``.
    """
    return parse_body(body, _chat, UNSUPPORTED)


def parse_body(
    body: bytes, decoder: msgspec.json.Decoder[StructT], unsupported: Mapping[str, tuple[Any, ...]]
) -> tuple[StructT, list[str]]:
    """The request, and the names of top-level fields that mean nothing to us.

    Args:
        unsupported: fields that are refused, with values that ask for nothing.

    Raises:
        InvalidRequest: as ``parse_chat``.
    """
    _check_nesting(body)
    at_once = _read_at_once(body, decoder.type, unsupported.keys())
    if at_once is not None:
        return at_once, []
    fields: dict[str, Raw] = decode(_top_level, body)
    for name in unsupported.keys() & fields.keys():
        if not _is_needless(name, fields):
            _check_inert(name, bytes(fields[name]), unsupported[name])
    if len(memoryview(fields.get("chat_template_kwargs", NULL))) > MAX_TEMPLATE_KWARGS_BYTES:
        message = f"chat_template_kwargs may have at most {MAX_TEMPLATE_KWARGS_BYTES} bytes"
        raise InvalidRequest(message, param="chat_template_kwargs")
    request: StructT = decode(decoder, body)
    known = unsupported.keys() | set(request.__struct_fields__)
    unknown = sorted(fields.keys() - known)
    return request, [name for name in unknown if bytes(memoryview(fields[name])[:5]) != b"null"]


def _read_at_once(body: bytes, kind: type[StructT], unsupported: Collection[str]) -> StructT | None:
    """A body in which there is nothing to look at twice; megabytes are read once, as a rule. None: look closely."""
    try:
        request = _of_known_fields(kind).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    closely = {"chat_template_kwargs", *unsupported} & set(request.__struct_fields__)
    return request if all(getattr(request, name) is None for name in closely) else None


@cache
def _of_known_fields(kind: type[StructT]) -> msgspec.json.Decoder[StructT]:
    """A decoder that refuses any other field."""
    return msgspec.json.Decoder(msgspec.defstruct(kind.__name__, [], bases=(kind,), forbid_unknown_fields=True))


def decode(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    """What a body, or a part of one, holds. Raises InvalidRequest, as ``parse_chat``."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = _explain(str(error))
        raise InvalidRequest(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest("the body is not valid JSON", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None


def _explain(message: str) -> tuple[str, str | None]:
    """A message of msgspec, split into what is wrong and the path of the field."""
    where = _WHERE.search(message)
    path = where["path"] if where else ""
    reason = _QUOTED.sub(r"\g<quote>\g<start>...\g<quote>", message[: where.start()] if where else message)
    return f"{path}: {reason}" if path else reason, path or None


def _is_needless(name: str, fields: Mapping[str, Raw]) -> bool:
    return name in _NEEDLESS and bytes(fields.get(_NEEDLESS[name], NULL)) == b'"none"'


def _check_inert(name: str, raw: bytes, inert: tuple[Any, ...]) -> None:
    # None of the harmless values is long; a long one need not even be read.
    if len(raw) > 1024 or msgspec.json.decode(raw) not in (None, *inert):
        raise InvalidRequest(f"{name} is not supported by this server", code="unsupported_parameter", param=name)


def _check_nesting(body: bytes) -> None:
    """Bound depth and number of containers before anything is built from them."""
    if _count_up_to(MAX_JSON_DEPTH + 1, b"[", body) + _count_up_to(MAX_JSON_DEPTH + 1, b"{", body) <= MAX_JSON_DEPTH:
        return
    depth = num_containers = 0
    for token in _JSON_TOKEN.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            num_containers += 1
            if depth > MAX_JSON_DEPTH:
                raise _too_deep()
            if num_containers > MAX_JSON_CONTAINERS:
                raise InvalidRequest("the body has too many objects and arrays")
        elif first in b"]}":
            depth -= 1


def _count_up_to(limit: int, byte: bytes, body: bytes) -> int:
    """How often ``byte`` is in ``body``, or ``limit``. Base64 has no brackets, and a search for one takes a tenth of
    the time of ``bytes.count``."""
    num, at = 0, body.find(byte)
    while at >= 0 and num < limit:
        num, at = num + 1, body.find(byte, at + 1)
    return num


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested deeper than {MAX_JSON_DEPTH} levels", code="invalid_json")
