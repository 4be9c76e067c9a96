"""From the fields of a chat request to the words of the wire: messages, priced images, sampling (API.md sections 2, 3).

Pure; runs in a thread when a request is large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from common.service.errors import InvalidRequest
from protos.language_pb2 import GenerateRequest, Grammar, ImageRef
from protos.status_pb2 import ModelInfo
from protos.vision_pb2 import VirOptions
from router.affinity import prefix_key
from router.api.layout import Layout
from router.api.media_parts import Medium
from router.api.messages import ReadMessage
from router.api.sampling import translate_sampling
from router.api.schemas import ChatCompletionRequest
from router.api.tools import translate_tools
from router.api.vir import resolve_vir
from router.identity import hash_features, hash_image
from router.record import Deadline
from router.request import ChatRequest, ImageInput
from router.settings import RouterSettings

MAX_PROMPT_BYTES: Final = 16 * 2**20
"""Text of all messages; no context holds more, and it must fit into one gRPC message."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a request's meaning depends on beside its body."""

    request_id: bytes  # 128 random bits
    tenant: str  # which API key was used; empty without keys
    deadline: Deadline


def translate(
    request: ChatCompletionRequest,
    messages: Sequence[ReadMessage],
    origin: Origin,
    model: ModelInfo,
    settings: RouterSettings,
) -> ChatRequest:
    """The request as the servers understand it.

    Args:
        messages: of this request, as ``read_messages`` gives them; the length of every video is known.

    Raises:
        InvalidRequest: a field out of bounds, images that do not match their markers, or far too much text.
    """
    scope = cache_scope(origin.tenant, request.cache_salt)
    layout = Layout(combine_images=bool(request.dvd and request.dvd.combine_images))
    placed = [layout.lay_out(message) for message in messages]
    vir = resolve_vir(request, model, settings, len(layout.media))
    images = _identify(layout.media, vir, model, scope)
    tools = translate_tools(request)
    generate = GenerateRequest(
        request_id=origin.request_id,
        messages=placed,
        images=[
            ImageRef(
                mm_hash=image.mm_hash,
                max_num_tokens=image.num_tiles * model.tokens_per_tile,
                is_video=medium.is_video,
            )
            for image, medium in zip(images, layout.media, strict=True)
        ],
        sampling=translate_sampling(request, model, settings),
        cache_scope=scope,
        priority=request.priority or 0,
        thinking=bool(request.chat_template_kwargs and request.chat_template_kwargs.enable_thinking),
        tools=tools.offered,
    )
    _set_grammar(generate, tools.grammar, may_call=bool(tools.offered))
    if generate.thinking and _has_given_form(generate):
        message = "a reply of a given form cannot begin with thoughts: say enable_thinking or a form, not both"
        raise InvalidRequest(message, param="chat_template_kwargs.enable_thinking")
    if generate.ByteSize() > MAX_PROMPT_BYTES:
        raise InvalidRequest("the prompt is far too long", code="context_length_exceeded", param="messages")
    return ChatRequest(generate, images, origin.deadline, vir, prefix_key(generate), settings.split_min_tiles)


def _identify(media: Sequence[Medium], vir: VirOptions | None, model: ModelInfo, scope: str) -> list[ImageInput]:
    hashes = [hash_image(medium.data, medium.tiling, model.image_size, scope) for medium in media]
    return [
        ImageInput(
            data=medium.data,
            image_hash=image_hash,
            mm_hash=hash_features(image_hash, vir, hashes),
            num_tiles=medium.num_tiles,
            tiling=medium.tiling,
            param=medium.param,
        )
        for medium, image_hash in zip(media, hashes, strict=True)
    ]


def _set_grammar(generate: GenerateRequest, of_calls: Grammar | None, *, may_call: bool) -> None:
    """A reply is either of the given form or free to call tools."""
    sampling = generate.sampling
    if may_call and sampling.HasField("grammar"):
        message = "tools and a form of the reply cannot both be given: say tool_choice 'none', or no form"
        raise InvalidRequest(message, code="unsupported_parameter", param=sampling.grammar.param.partition(".")[0])
    if of_calls is not None:
        sampling.grammar.CopyFrom(of_calls)


def _has_given_form(generate: GenerateRequest) -> bool:
    grammar = generate.sampling.grammar
    return generate.sampling.HasField("grammar") and not grammar.tool_calls.allows_text


def cache_scope(tenant: str, salt: str | None) -> str:
    """Who may share cached work with whom: equal keys with equal salts. Empty: everybody."""
    if not tenant and not salt:
        return ""
    return blake3(f"{tenant}\0{salt or ''}".encode()).hexdigest(length=16)
