"""An image, however a caller holds it, as the URL a server reads. Judges nothing: that is the server's business."""

import base64
import io
import mimetypes
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from PIL import Image
from typing_extensions import TypeIs

from common.service.errors import InvalidRequest

ImageSource = str | os.PathLike[str] | bytes | Image.Image
"""A path, a ``data:`` or ``https:`` URL, the bytes of an image file, or a PIL image."""

_URL: Final = re.compile(r"data:|https?://", re.IGNORECASE)
_PNG_LEVEL: Final = 1  # the bytes travel once: time counts, not size
# Pillow reads the file of an image when its pixels are asked for, and one image may go with many prompts at once.
_reading_pixels = threading.Lock()


def is_image_source(given: object) -> TypeIs[ImageSource]:
    """Whether this is one image, and not several."""
    return isinstance(given, str | os.PathLike | bytes | Image.Image)


def is_url(image: str) -> bool:
    """Whether the server is to find it, and not we."""
    return _URL.match(image) is not None


def as_images(given: ImageSource | Iterable[ImageSource]) -> tuple[ImageSource, ...]:
    """One image or several, in order.

    Raises:
        TypeError: something in it is not an image.
    """
    images = (given,) if is_image_source(given) else tuple(given)
    for image in images:
        if not is_image_source(image):
            kind = type(image).__name__
            raise TypeError(f"an image is a path, a URL, the bytes of a file or a PIL image, not {kind}")
    return images


def image_url(image: ImageSource) -> str:
    """URLs as they are, everything else as a ``data:`` URL: files byte for byte, the pixels of a PIL image as PNG.

    Raises:
        InvalidRequest: the file, or the PIL image's own file, cannot be read.
    """
    if isinstance(image, str) and is_url(image):
        return image
    if isinstance(image, bytes):
        return _data_url(image, "application/octet-stream")
    if isinstance(image, Image.Image):
        return _data_url(_png(image), "image/png")
    return file_url(Path(image))


def file_url(path: Path) -> str:
    """The file's bytes as they are.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    return _data_url(content, mimetypes.guess_type(path.name)[0] or "application/octet-stream")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _png(image: Image.Image) -> bytes:
    """What the reference makes of a PIL image: ``convert("RGB")`` and nothing else."""
    buffer = io.BytesIO()
    try:
        with _reading_pixels:
            image.load()
        image.convert("RGB").save(buffer, "PNG", compress_level=_PNG_LEVEL)
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for a closed, cut or broken file
        raise InvalidRequest(f"the PIL image cannot be read: {error}", code="invalid_image") from None
    return buffer.getvalue()
