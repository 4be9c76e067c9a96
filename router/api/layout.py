"""Where media stand in the prompt: at their parts or at markers, alone or combined, frame by frame (API.md section 3).

Where a block stands is said by a part of its own on the wire, never by text: no text that a client writes can make,
move or take the place of one.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from common.service.errors import InvalidRequest
from protos.language_pb2 import ChatMessage, ContentPart, ImageBlock, ImagePiece, ToolCall
from router.api.media_parts import ImagePart, Medium, VideoPart
from router.api.messages import ReadMessage, ReadPart

IMAGE_MARKER: Final = "<IMAGE_TOKEN>"
"""What VLMEvalKit writes where an image belongs."""


class Layout:
    """Lays messages out one after another.

    Args:
        combine_images: consecutive images of a message are read as one image with the tiles of all.
    """

    def __init__(self, *, combine_images: bool) -> None:
        self.media: list[Medium] = []  # in prompt order, which gives them their indices
        self._combine_images = combine_images

    def lay_out(self, message: ReadMessage) -> ChatMessage:
        """One message. Raises InvalidRequest when its markers and images do not match."""
        images = [part.medium for part in message.parts if isinstance(part, ImagePart)]
        if message.role == "user" and images and _num_markers(message.parts):
            parts = self._at_markers(message, images)
            return ChatMessage(role=message.role, parts=parts, inline_images=True)
        calls = [ToolCall(name=call.name, arguments=call.arguments or "{}") for call in message.calls]
        return ChatMessage(role=message.role, parts=self._in_place(message.parts), tool_calls=calls)

    def _in_place(self, parts: Sequence[ReadPart]) -> Iterator[ContentPart]:
        """Every block where its part stands."""
        for are_images, run in groupby(parts, key=lambda part: isinstance(part, ImagePart)):
            if are_images:
                for group in self._groups([part.medium for part in run if isinstance(part, ImagePart)]):
                    yield self._block(group)
                continue
            for part in run:
                if isinstance(part, str):
                    yield ContentPart(text=part)
                elif isinstance(part, VideoPart):
                    yield from self._frames(part)

    def _at_markers(self, message: ReadMessage, images: Sequence[Medium]) -> Iterator[ContentPart]:
        """The i-th marker becomes the i-th block. Videos stay where they are."""
        groups = self._groups(images)
        num_markers = _num_markers(message.parts)
        if num_markers != len(groups):
            what = "combined image" if self._combine_images else "images"
            text = f"{num_markers} image markers for {len(groups)} {what}"
            raise InvalidRequest(text, code="image_marker_mismatch", param=message.param)
        remaining = iter(groups)
        for part in message.parts:
            if isinstance(part, str):
                yield from self._replace_markers(part, remaining)
            elif isinstance(part, VideoPart):
                for piece in self._frames(part):
                    yield piece
                    if piece.HasField("block"):  # nobody else puts a newline here, beside markers
                        yield ContentPart(text="\n")

    def _replace_markers(self, text: str, groups: Iterator[Sequence[Medium]]) -> Iterator[ContentPart]:
        first, *others = text.split(IMAGE_MARKER)
        if first:
            yield ContentPart(text=first)
        for other in others:
            yield self._block(next(groups))
            if other:
                yield ContentPart(text=other)

    def _groups(self, images: Sequence[Medium]) -> list[Sequence[Medium]]:
        """Images that share a block."""
        return [images] if self._combine_images else [[image] for image in images]

    def _block(self, images: Sequence[Medium]) -> ContentPart:
        indices = [self._add(image) for image in images]
        if len(indices) == 1:
            return ContentPart(image_index=indices[0])
        return ContentPart(block=ImageBlock(pieces=[ImagePiece(image_index=index) for index in indices]))

    def _frames(self, video: VideoPart) -> Iterator[ContentPart]:
        """Each frame with its number, as in training (INTERNVL.md section 5.3)."""
        number = 0
        for medium in video.media:
            index = self._add(medium)
            for tile in range(medium.num_tiles):
                number += 1
                yield ContentPart(text=f"Frame-{number}: ")
                piece = ImagePiece(image_index=index, first_tile=tile, num_tiles=1)
                yield ContentPart(block=ImageBlock(pieces=[piece]))

    def _add(self, medium: Medium) -> int:
        self.media.append(medium)
        return len(self.media) - 1


def _num_markers(parts: Sequence[ReadPart]) -> int:
    return sum(part.count(IMAGE_MARKER) for part in parts if isinstance(part, str))
