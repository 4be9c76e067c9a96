"""Orientation: read from what stands before the pixels, and never a reason to fail."""

import io
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from common.model.orientation import read_orientation

TAG = 0x0112


def picture(image_format="JPEG", orientation=None, exif=None) -> bytes:
    if exif is None:
        tags = Image.Exif()
        if orientation is not None:
            tags[TAG] = orientation
        exif = tags.tobytes()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def read(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return read_orientation(image)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(image_format, orientation):
    assert read(picture(image_format, orientation)) == orientation


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_without_a_tag(image_format):
    assert read(picture(image_format)) == 1


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_xmp_where_there_is_no_exif(image_format):
    buffer = io.BytesIO()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    options: dict[str, Any] = {"xmp": xmp}
    if image_format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": text}
    Image.new("RGB", (8, 4)).save(buffer, image_format, **options)
    assert read(buffer.getvalue()) == 8


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_a_value_that_means_nothing(orientation):
    assert read(picture(orientation=orientation)) == 1


def test_no_pixel_is_decoded():
    """A tag behind the pixels of a PNG is not there: reading it would decode them."""
    data = picture("PNG", 6)
    start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    moved = data[:start] + data[end : data.index(b"IEND") - 4] + data[start:end] + data[data.index(b"IEND") - 4 :]
    assert read(moved) == 1
    with Image.open(io.BytesIO(moved)) as image:
        image.load()
        assert image.getexif()[TAG] == 6  # the tag was moved, not destroyed


@given(st.binary(max_size=64))
def test_damaged_tags(noise):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 1 <= read(picture(exif=b"Exif\0\0" + noise)) <= 8
