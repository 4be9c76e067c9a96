"""From the fields of a chat request to the words of the wire: messages, priced images, sampling (API.md sections 2, 3).

Pure apart from decoding base64; runs in a thread when a request is large.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from blake3 import blake3

from common.model.geometry import Tiling, count_tiles
from common.service import metrics
from common.service.errors import InvalidRequest
from protos.language_pb2 import ChatMessage, ContentPart, GenerateRequest, ImageRef, SamplingParams
from protos.status_pb2 import ModelInfo
from protos.vision_pb2 import TilingOptions
from router.api.grammar import translate_grammar
from router.api.schemas import ChatCompletionRequest, ImageUrl, Message, Part, TileBudget
from router.media import CompressedImage, MediaLimits, load_image
from router.pipeline import ChatRequest, ImageInput
from router.record import Deadline
from router.settings import RouterSettings

IMAGE_MARKER: Final = "<IMAGE_TOKEN>"
"""What VLMEvalKit writes where an image belongs."""
MAX_PROMPT_BYTES: Final = 16 * 2**20
"""Text of all messages; no context holds more, and it must fit into one gRPC message."""
_ROLES: Final = {"developer": "system"}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a request's meaning depends on beside its body."""

    request_id: bytes  # 128 random bits
    tenant: str  # which API key was used; empty without keys
    deadline: Deadline


def count_images(request: ChatCompletionRequest) -> int:
    """Image parts of all messages, before anything of them is read."""
    lists = (message.content for message in request.messages if isinstance(message.content, list))
    return sum(part.type == "image_url" for parts in lists for part in parts)


def translate(
    request: ChatCompletionRequest, origin: Origin, model: ModelInfo, settings: RouterSettings
) -> ChatRequest:
    """The request as the servers understand it.

    Raises:
        InvalidRequest: a field out of bounds, a part that is not supported, or an image that cannot be used.
        RequestTooLarge: an image with too many compressed bytes.
    """
    if count_images(request) > settings.max_media_items:
        metrics.MEDIA_REJECTED.labels("items").inc()
        raise InvalidRequest(
            f"at most {settings.max_media_items} images are allowed", code="too_many_media_items", param="messages"
        )
    scope = _cache_scope(origin.tenant, request.cache_salt)
    images = _Images(request, model, settings, scope)
    messages = [_translate_message(index, message, images) for index, message in enumerate(request.messages)]
    generate = GenerateRequest(
        request_id=origin.request_id,
        messages=messages,
        images=[
            ImageRef(mm_hash=image.mm_hash, max_num_tokens=image.num_tiles * model.tokens_per_tile)
            for image in images.found
        ],
        sampling=_translate_sampling(request, model, settings),
        cache_scope=scope,
        priority=request.priority or 0,
        thinking=bool(request.chat_template_kwargs and request.chat_template_kwargs.enable_thinking),
    )
    if generate.thinking and generate.sampling.HasField("grammar"):
        message = "a reply of a given form cannot begin with thoughts: say enable_thinking or a form, not both"
        raise InvalidRequest(message, param="chat_template_kwargs.enable_thinking")
    if generate.ByteSize() > MAX_PROMPT_BYTES:
        raise InvalidRequest("the prompt is far too long", code="context_length_exceeded", param="messages")
    return ChatRequest(generate, images.found, origin.deadline)


@dataclass(slots=True)
class _Images:
    """Collects the images of a request in prompt order."""

    request: ChatCompletionRequest
    model: ModelInfo
    settings: RouterSettings
    scope: str
    found: list[ImageInput] = field(default_factory=list)
    num_pixels: int = 0

    def add(self, part: Part, param: str) -> int:
        """Read and price one image part; returns its index in the request."""
        if part.image_url is None:
            known = "unknown or forgotten" if part.uuid is not None else "missing"
            code = "unknown_media_uuid" if part.uuid is not None else None
            raise InvalidRequest(f"the image is {known}, send it", code=code, param=f"{param}.image_url")
        source = ImageUrl(part.image_url) if isinstance(part.image_url, str) else part.image_url
        tiling = resolve_tiling(source, self.request, self.model, self.settings, f"{param}.image_url")
        limits = MediaLimits(self.settings.max_item_bytes, self.settings.max_image_pixels)
        url_param = f"{param}.image_url" if isinstance(part.image_url, str) else f"{param}.image_url.url"
        image = load_image(source.url, limits, url_param)
        self._count_pixels(image, url_param)
        self.found.append(
            ImageInput(
                data=image.data,
                mm_hash=hash_image(image.data, tiling, self.scope),
                num_tiles=count_tiles(image.width, image.height, tiling),
                tiling=TilingOptions(
                    min_dynamic_patch=tiling.min_tiles,
                    max_dynamic_patch=tiling.max_tiles,
                    use_thumbnail=tiling.use_thumbnail,
                ),
                param=url_param,
            )
        )
        return len(self.found) - 1

    def _count_pixels(self, image: CompressedImage, param: str) -> None:
        self.num_pixels += image.num_pixels
        if self.num_pixels > self.settings.max_request_pixels:
            metrics.MEDIA_REJECTED.labels("pixels").inc()
            message = f"all images together may have at most {self.settings.max_request_pixels} pixels"
            raise InvalidRequest(message, code="invalid_image", param=param)


def resolve_tiling(
    source: ImageUrl, request: ChatCompletionRequest, model: ModelInfo, settings: RouterSettings, param: str
) -> Tiling:
    """The tile budget of one image: on the part > top level > ``mm_processor_kwargs`` > ``detail`` > configuration.

    Raises:
        InvalidRequest: more tiles than this server allows, or a minimum above the maximum.
    """
    if not model.dynamic_image_size:
        return Tiling(1, 1, model.use_thumbnail, model.image_size)
    kwargs = request.mm_processor_kwargs or TileBudget()
    asked_max = _first(source.max_dynamic_patch, request.max_dynamic_patch, kwargs.max_dynamic_patch)
    asked_min = _first(source.min_dynamic_patch, request.min_dynamic_patch, kwargs.min_dynamic_patch)
    by_detail = {"low": 1, "high": model.max_dynamic_patch}.get(source.detail or "auto")
    max_tiles = _first(asked_max, by_detail, settings.max_dynamic_patch, model.max_dynamic_patch) or 1
    # A minimum of the configuration gives way to a smaller maximum; one the client asked for does not.
    min_tiles = asked_min if asked_min is not None else min(model.min_dynamic_patch or 1, max_tiles)
    if asked_max is not None and max_tiles > settings.max_tiles_per_image:
        message = f"max_dynamic_patch may be at most {settings.max_tiles_per_image}"
        raise InvalidRequest(message, param=f"{param}.max_dynamic_patch")
    if min_tiles > max_tiles:
        message = f"min_dynamic_patch is above the maximum of {max_tiles} tiles"
        raise InvalidRequest(message, param=f"{param}.min_dynamic_patch")
    return Tiling(min_tiles, max_tiles, model.use_thumbnail, model.image_size)


def hash_image(data: bytes, tiling: Tiling, scope: str) -> bytes:
    """Identity of an image's features, 32 bytes: content, options and tenant scope."""
    digest = blake3(data, max_threads=1).digest()
    options = struct.pack("<III?", tiling.min_tiles, tiling.max_tiles, tiling.tile_size, tiling.use_thumbnail)
    return blake3(digest + options + scope.encode()).digest()


def _translate_message(index: int, message: Message, images: _Images) -> ChatMessage:
    param = f"messages[{index}]"
    if message.tool_calls:
        raise InvalidRequest(
            "tool calls are not supported by this server", code="unsupported_parameter", param=f"{param}.tool_calls"
        )
    if message.content is None:
        raise InvalidRequest("content is required", param=f"{param}.content")
    role = _ROLES.get(message.role, message.role)
    if isinstance(message.content, str):
        return ChatMessage(role=role, parts=[ContentPart(text=message.content)])
    parts = [_translate_part(f"{param}.content[{i}]", part, images) for i, part in enumerate(message.content)]
    if message.role == "user" and _has_marker(parts):
        return ChatMessage(role=role, parts=_place_at_markers(parts, f"{param}.content"), inline_images=True)
    return ChatMessage(role=role, parts=parts)


def _translate_part(param: str, part: Part, images: _Images) -> ContentPart:
    if part.type == "text":
        if part.text is None:
            raise InvalidRequest("text is required", param=f"{param}.text")
        return ContentPart(text=part.text)
    if part.type == "image_url":
        return ContentPart(image_index=images.add(part, param))
    raise InvalidRequest(
        f"parts of type {part.type[:64]!r} are not supported", code="unsupported_media", param=f"{param}.type"
    )


def _has_marker(parts: Sequence[ContentPart]) -> bool:
    """Markers mean something only beside images of the same message."""
    has_image = any(part.WhichOneof("part") == "image_index" for part in parts)
    return has_image and any(IMAGE_MARKER in part.text for part in parts)


def _place_at_markers(parts: Sequence[ContentPart], param: str) -> list[ContentPart]:
    """The i-th marker becomes the i-th image. Raises InvalidRequest when their numbers differ."""
    images = [part for part in parts if part.WhichOneof("part") == "image_index"]
    num_markers = sum(part.text.count(IMAGE_MARKER) for part in parts)
    if num_markers != len(images):
        message = f"{num_markers} image markers for {len(images)} images"
        raise InvalidRequest(message, code="image_marker_mismatch", param=param)
    remaining = iter(images)
    placed: list[ContentPart] = []
    for part in parts:
        if part.WhichOneof("part") == "image_index":
            continue
        first, *others = part.text.split(IMAGE_MARKER)
        pieces = [ContentPart(text=first)]
        for text in others:
            pieces += [next(remaining), ContentPart(text=text)]
        placed += [piece for piece in pieces if piece.WhichOneof("part") == "image_index" or piece.text]
    return placed


def _translate_sampling(request: ChatCompletionRequest, model: ModelInfo, settings: RouterSettings) -> SamplingParams:
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
        seed=request.seed,
        n=num_choices,
        stop=stop,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        logit_bias=request.logit_bias or {},
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


def _cache_scope(tenant: str, salt: str | None) -> str:
    """Who may share cached work with whom: equal keys with equal salts. Empty: everybody."""
    if not tenant and not salt:
        return ""
    return blake3(f"{tenant}\0{salt or ''}".encode()).hexdigest(length=16)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
