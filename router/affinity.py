"""What a language server may know of a request already: a key of the prompt's beginning. Pure.

Follow-up turns of a conversation begin as its first turn did, so they share its key and find their KV. Requests about
the same image share a key whatever they ask, and find its features, or its KV.
"""

from array import array
from typing import Final

from blake3 import blake3

from protos.language_pb2 import ChatMessage, GenerateRequest

_RAW_CHARS: Final = 1024
_RAW_TOKENS: Final = 256


def prefix_key(request: GenerateRequest) -> bytes:
    """32 bytes of the tenant's scope and the first user turn: of its first image, else of all text up to its end. Of a
    raw prompt, whose turns nobody knows: of its beginning."""
    scope = blake3(request.cache_scope.encode()).digest()
    digest = blake3(scope)
    if request.HasField("raw"):
        digest.update(request.raw.text[:_RAW_CHARS].encode())
        digest.update(array("I", request.raw.token_ids.ids[:_RAW_TOKENS]).tobytes())
        return digest.digest()
    for message in request.messages:
        if message.role == "user" and (index := _first_image(message)) is not None:
            # Not the text before it: the features are worth more than the KV of a system prompt.
            return blake3(request.images[index].mm_hash, key=scope).digest()
        for part in message.parts:
            digest.update(part.text.encode())
        digest.update(b"\0")
        if message.role == "user":
            break
    return digest.digest()


def content_key(request: GenerateRequest) -> bytes:
    """32 bytes of all that a language server works on: equal for every attempt at one request, and for its repetitions
    by the client."""
    content = GenerateRequest()
    content.CopyFrom(request)
    content.ClearField("request_id")
    content.ClearField("continuations")
    content.sampling.ClearField("seed")
    return blake3(content.SerializeToString(deterministic=True)).digest()


def _first_image(message: ChatMessage) -> int | None:
    for part in message.parts:
        kind = part.WhichOneof("part")
        if kind == "image_index":
            return part.image_index
        if kind == "block" and part.block.pieces:
            return part.block.pieces[0].image_index
    return None
