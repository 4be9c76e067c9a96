"""Messages as a router sends them."""

from protos.language_pb2 import ChatMessage


def message(role, *parts, inline_images=False):
    """A part is text, the index of an image, or a list of pieces (image, first tile, number of tiles)."""
    return ChatMessage(role=role, parts=[_part(part) for part in parts], inline_images=inline_images)


def video(image_index, num_frames):
    """Parts of a message: each frame under its number."""
    return [part for frame in range(num_frames) for part in (f"Frame-{frame + 1}: ", [(image_index, frame, 1)])]


def _part(part):
    if isinstance(part, list):
        names = ("image_index", "first_tile", "num_tiles")
        return {"block": {"pieces": [dict(zip(names, piece, strict=True)) for piece in part]}}
    return {"text": part} if isinstance(part, str) else {"image_index": part}
