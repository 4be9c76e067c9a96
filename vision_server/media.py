"""Compressed bytes -> one RGB image, safely (RELIABILITY.md 5.4).

The one place where Pillow reads a stranger's bytes. Five formats, size checked before pixels exist, first frame only,
and no word of Pillow's own in any message: whatever it raises becomes ``InvalidRequest`` here. EXIF orientation and
transparency are ignored, as in the reference: ``convert("RGB")`` and nothing else.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import Image

from common.service.errors import InvalidRequest

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS: Final = 50_000_000

# Pillow's plugins raise nearly anything on bytes they do not expect.
_FOREIGN: Final = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
    Warning,  # where the process turns warnings into errors
)  # fmt: skip


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only: ``.size`` is known, no pixel is decoded.

    Raises:
        InvalidRequest: code ``invalid_image``: no image, a format we do not take, or more than ``max_pixels`` pixels.
    """
    with _translated("the image cannot be read: it must be JPEG, PNG, WebP, GIF or BMP"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    if width * height > max_pixels:
        raise _invalid(f"the image has {width}x{height} pixels, at most {max_pixels} are accepted")
    if width < 1 or height < 1:
        raise _invalid("the image has no pixels")
    return image


def decode(image: Image.Image) -> Image.Image:
    """All pixels of the first frame as RGB.

    Raises:
        InvalidRequest: code ``invalid_image``: broken or truncated.
    """
    with _translated("the image is broken or truncated"):
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _translated(message: str) -> Iterator[None]:
    try:
        yield
    except _FOREIGN:
        raise _invalid(message) from None  # Pillow's text may hold addresses and paths


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_image")
