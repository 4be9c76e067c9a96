"""Which way up an image is meant to be seen, by what is noted in it: router and vision server must read it alike.

The router prices an image that is turned by its turned size, so a difference between the two would be a wrong number of
tiles. Knows nothing of pixels.
"""

import struct
from typing import Final

from PIL import ExifTags, Image

UPRIGHT: Final = 1
# What Pillow's EXIF reader raises on bytes it does not expect, and its warnings where they are made errors.
_FOREIGN: Final = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError,
    AssertionError, RuntimeError, MemoryError, struct.error, Warning,
)  # fmt: skip


def read_orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF, else XMP, says; 1, upright, where neither does or what it says makes no sense. 5 to 8 exchange
    width and height.

    Call it on an image that has been opened and not loaded: only what stands in front of the pixels is read.
    """
    try:
        # PNG's own method would decode the pixels, to see what stands behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except _FOREIGN:
        return UPRIGHT
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else UPRIGHT
