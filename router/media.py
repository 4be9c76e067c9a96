"""The one place that turns a media URL into compressed bytes and looks at them.

``data:`` URLs are read; what is behind others has been fetched before (fetch/fetcher.py), or they are refused. Nothing
here decodes pixels: Pillow reads width and height from an image's header, and of
a video only the first bytes are looked at. Knows nothing of tiles, frames, prompts or servers.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import Final

import pybase64
from PIL import Image, UnidentifiedImageError

from common.model.orientation import read_orientation
from common.service import metrics
from common.service.errors import InvalidRequest, RequestTooLarge

_SIGNATURES: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM"),
}
# MP4 and MOV, also from before files said so in front; Matroska and WebM; AVI.
_VIDEO_SIGNATURE: Final = re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip)|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)
_FRAME_LIST: Final = re.compile(r"data:video/jpeg[;,]", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?P<media_type>[^,]*),", re.IGNORECASE)
_MAX_MEDIA_TYPE_CHARS: Final = 256
NOTHING_FETCHED: Final[Mapping[str, bytes]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Caps of RELIABILITY.md section 5.6 for one item."""

    max_item_bytes: int
    max_video_bytes: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class CompressedImage:
    """An image as the client sent it. ``data`` is JPEG, PNG, WebP, GIF or BMP with a readable header."""

    data: bytes
    width: int
    height: int

    @property
    def num_pixels(self) -> int:
        return self.width * self.height


def load_image(
    url: str,
    limits: MediaLimits,
    param: str,
    *,
    exif_orientation: bool = False,
    fetched: Mapping[str, bytes] = NOTHING_FETCHED,
) -> CompressedImage:
    """The image behind a URL.

    Args:
        exif_orientation: width and height are those of the image turned as its EXIF says.
        fetched: what is behind the URLs that were fetched.

    Raises:
        InvalidRequest: ``media_url_blocked`` for everything that is neither a ``data:`` URL nor fetched,
            ``invalid_image`` for what is not an image or too large in pixels.
        RequestTooLarge: more compressed bytes than allowed.
    """
    data = _read(url, limits.max_item_bytes, "an image", param, fetched)
    width, height = _read_size(data, limits, param, exif_orientation)
    _count_bytes(url, data)
    return CompressedImage(data, width, height)


def load_video(url: str, limits: MediaLimits, param: str, *, fetched: Mapping[str, bytes] = NOTHING_FETCHED) -> bytes:
    """The video file behind a URL, as the client sent it: MP4 or MOV, Matroska or WebM, or AVI by its first bytes.

    Raises:
        InvalidRequest: ``media_url_blocked`` as for images, ``invalid_image`` for a malformed ``data:`` URL, and
            ``unsupported_media`` for what is none of these files.
        RequestTooLarge: more bytes than allowed.
    """
    if _FRAME_LIST.match(url):
        message = "frames in one URL are not supported: send them as a list of images"
        raise _invalid("format", message, param, code="unsupported_media")
    data = _read(url, limits.max_video_bytes, "a video", param, fetched)
    if _VIDEO_SIGNATURE.match(data) is None:
        raise _invalid("format", "not an MP4, MOV, WebM, Matroska or AVI video", param, code="unsupported_media")
    _count_bytes(url, data)
    return data


def _read(url: str, max_bytes: int, what: str, param: str, fetched: Mapping[str, bytes]) -> bytes:
    if _holds_data(url):
        return _decode_data_url(url, max_bytes, what, param)
    data = fetched.get(url)
    if data is None:
        raise blocked_url(param)
    if len(data) > max_bytes:  # the same URL is a video elsewhere, which may have more
        raise _too_large(max_bytes, what, param)
    return data


def _holds_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _count_bytes(url: str, data: bytes) -> None:
    """What was fetched has been counted once, however often it is named."""
    if _holds_data(url):
        metrics.MEDIA_BYTES.labels("data").inc(len(data))


def _decode_data_url(url: str, max_bytes: int, what: str, param: str) -> bytes:
    """RFC 2397 with ``;base64`` required and decoded strictly; the declared media type is ignored."""
    header = _DATA_URL.match(url[:_MAX_MEDIA_TYPE_CHARS])
    if header is None or not header["media_type"].lower().endswith(";base64"):
        raise _invalid("base64", "a data: URL must carry ;base64 and a comma", param)
    # Four characters make three bytes; too much is refused before it is decoded.
    if (len(url) - header.end()) // 4 * 3 > max_bytes + 3:
        raise _too_large(max_bytes, what, param)
    try:
        data = pybase64.b64decode(url[header.end() :], validate=True)
    except ValueError:  # binascii.Error, or characters outside ASCII
        raise _invalid("base64", "the data: URL is not valid base64", param) from None
    if len(data) > max_bytes:
        raise _too_large(max_bytes, what, param)
    return data


def _read_size(data: bytes, limits: MediaLimits, param: str, exif_orientation: bool) -> tuple[int, int]:
    image_format = next((name for name, signature in _SIGNATURES.items() if signature.match(data)), None)
    if image_format is None:
        raise _invalid("format", "not a JPEG, PNG, WebP, GIF or BMP image", param)
    try:
        with Image.open(BytesIO(data), formats=[image_format]) as image:
            width, height = image.size
            if exif_orientation and read_orientation(image) >= 5:
                width, height = height, width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(limits, param) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error):
        # What Pillow's header parsers raise. Its messages may name addresses, so none is passed on.
        raise _invalid("format", "the image cannot be read", param) from None
    if width < 1 or height < 1:
        raise _invalid("format", "the image is empty", param)
    if width * height > limits.max_pixels:
        raise _too_many_pixels(limits, param)
    return width, height


def blocked_url(param: str) -> InvalidRequest:
    """One message for all causes: it tells nobody what is there."""
    return _invalid("blocked", "this media URL is not allowed", param, code="media_url_blocked")


def _too_large(max_bytes: int, what: str, param: str) -> RequestTooLarge:
    _count("too_large")
    return RequestTooLarge(f"{what} may have at most {max_bytes} bytes", param=param)


def _too_many_pixels(limits: MediaLimits, param: str) -> InvalidRequest:
    return _invalid("pixels", f"an image may have at most {limits.max_pixels} pixels", param)


def _invalid(reason: str, message: str, param: str, *, code: str = "invalid_image") -> InvalidRequest:
    _count(reason)
    return InvalidRequest(message, code=code, param=param)


def _count(reason: str) -> None:
    metrics.MEDIA_REJECTED.labels(reason).inc()
