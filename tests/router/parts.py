"""Media parts as clients send them, and what they are on the wire."""

from typing import Any

from protos.language_pb2 import ContentPart, GenerateRequest, ImageBlock, ImagePiece
from tests.router.conftest import System, data_url, png, user

RED, BLUE = png("red"), png("blue")
MP4 = b"\0\0\0\x18ftypmp42" + bytes(64)
PHOTO = (1920, 1080)  # two by one tiles of six, four by two of twelve


def image(data: bytes, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), **fields}}


def video(data: bytes = MP4, **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4"), **fields}}


def frames(*images: bytes) -> dict[str, Any]:
    return {"type": "video", "video": [data_url(image, "image/jpeg") for image in images]}


async def ask(system: System, *parts: Any, **body: Any) -> GenerateRequest:
    """What the language server is told of a message of these parts, once it has answered."""
    response = await system.chat(messages=[user(*parts)], **body)
    assert response.status_code == 200, response.text
    assert "x-dvd-ignored" not in response.headers
    return system.language.requests[-1]


def tiles(request: GenerateRequest) -> list[int]:
    """Of each image."""
    return [image.max_num_tokens // 256 for image in request.images]


def parts_of(system: System) -> list[ContentPart]:
    """The last message of the last request, part by part."""
    return list(system.language.requests[-1].messages[-1].parts)


def text(words: str) -> ContentPart:
    return ContentPart(text=words)


def whole(index: int) -> ContentPart:
    """A block of one image."""
    return ContentPart(image_index=index)


def block(*pieces: tuple[int, int, int]) -> ContentPart:
    """Of pieces of images: index, first tile, number of tiles."""
    wire = [ImagePiece(image_index=index, first_tile=tile, num_tiles=count) for index, tile, count in pieces]
    return ContentPart(block=ImageBlock(pieces=wire))


def film(index: int, num_frames: int) -> list[ContentPart]:
    """One file, frame by frame."""
    return [part for i in range(num_frames) for part in (text(f"Frame-{i + 1}: "), block((index, i, 1)))]
