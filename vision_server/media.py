"""Compressed bytes -> one RGB image, safely (RELIABILITY.md 5.4).

The one place where Pillow reads a stranger's bytes. Five formats, size checked before pixels exist, first frame only,
and no word of Pillow's own in any message: whatever it raises becomes ``InvalidRequest`` here. Transparency is ignored,
as in the reference: ``convert("RGB")`` and nothing else. So is EXIF orientation, unless it is asked for.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import Image

from common.model.orientation import read_orientation
from common.service.errors import InvalidRequest

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS: Final = 50_000_000
MAX_SIDE: Final = 65_535
"""What JPEG and GIF can say. A PNG of 50 million pixels in one row would take more than any picture to stretch."""

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored pixels upright (EXIF 2.3, section 4.6.4)."""

# What libraries raise on bytes they do not expect: nearly anything.
FOREIGN: Final = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
    Warning,  # where the process turns warnings into errors
)  # fmt: skip


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only: ``.size`` is known, no pixel is decoded.

    Raises:
        InvalidRequest: code ``invalid_image``: no image, a format we do not take, more than ``max_pixels`` pixels, or
            more than ``MAX_SIDE`` on a side.
    """
    with translated("the image cannot be read: it must be JPEG, PNG, WebP, GIF or BMP"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    if width * height > max_pixels:
        raise invalid_image(f"the image has {width}x{height} pixels, at most {max_pixels} are accepted")
    if max(width, height) > MAX_SIDE:
        raise invalid_image(f"the image has {width}x{height} pixels, at most {MAX_SIDE} on a side are accepted")
    if width < 1 or height < 1:
        raise invalid_image("the image has no pixels")
    return image


def upright_size(image: Image.Image, *, exif_orientation: bool) -> tuple[int, int]:
    """Width and height that ``decode`` will give an opened image."""
    width, height = image.size
    is_on_its_side = exif_orientation and read_orientation(image) >= 5
    return (height, width) if is_on_its_side else (width, height)


def decode(image: Image.Image, *, exif_orientation: bool = False) -> Image.Image:
    """All pixels of the first frame as RGB.

    Args:
        exif_orientation: turn them as the file's EXIF or XMP says.

    Raises:
        InvalidRequest: code ``invalid_image``: broken or truncated.
    """
    turn = _TURNS.get(read_orientation(image)) if exif_orientation else None
    with translated("the image is broken or truncated"):
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def translated(message: str, foreign: tuple[type[BaseException], ...] = FOREIGN) -> Iterator[None]:
    """A library's errors become ours; its own text may hold addresses and paths."""
    try:
        yield
    except foreign:
        raise invalid_image(message) from None


def invalid_image(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_image")
