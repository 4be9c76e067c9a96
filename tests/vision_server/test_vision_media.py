"""A stranger's bytes become an RGB image, or ``invalid_image`` in our words: nothing else, and nothing large."""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.service.errors import InvalidRequest
from tests.vision_server.neighbours import encoded, picture
from vision_server.media import MAX_SIDE, decode, open_image, upright_size

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL")


def read(data: bytes) -> Image.Image:
    return decode(open_image(data))


def assert_refused(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        read(data)
    assert refusal.value.code == "invalid_image"
    assert "0x" not in refusal.value.message and "/" not in refusal.value.message
    assert refusal.value.__cause__ is None
    return refusal.value.message


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_all_formats_are_read_as_the_reference_reads_them(kind):
    data = encoded(picture(60, 40), kind)
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(read(data)), np.asarray(reference))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "YCbCr"])
def test_every_mode_becomes_plain_rgb(mode):
    """No EXIF, no compositing: ``convert("RGB")`` and nothing else."""
    source = Image.new("I;16", (30, 20), 40_000) if mode == "I;16" else picture(30, 20).convert(mode)
    data = encoded(source, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    image = read(data)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_and_exif_orientation_are_ignored():
    transparent = encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 0)))
    assert read(transparent).getpixel((0, 0)) == (200, 100, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(encoded(picture(60, 40), "JPEG", exif=exif)).size == (60, 40)


def test_a_palette_image_with_transparent_entries_is_read():
    source = picture(16, 16).quantize(16)
    data = encoded(source, "PNG", transparency=bytes(range(16)))
    assert read(data).mode == "RGB"


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert read(data).getpixel((0, 0)) == (255, 0, 0), kind


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PDF"])
def test_other_formats_are_refused(kind):
    assert_refused(encoded(picture(64, 64), kind))


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM"]
)
def test_what_is_no_image_is_refused(data):
    assert_refused(data)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_a_truncated_image_is_refused_wherever_it_ends(kind):
    data = encoded(picture(120, 80), kind)
    for length in range(1, len(data) * 9 // 10, len(data) // 23):
        assert_refused(data[:length])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_damaged_bytes_never_raise_anything_of_pillow(kind):
    """Whatever a flipped byte does, the outcome is an image or our refusal."""
    rng = random.Random(1)
    data = encoded(picture(64, 48), kind)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            outcomes.add(read(bytes(damaged)).mode)
        except InvalidRequest as refusal:
            outcomes.add(refusal.code)
    assert outcomes <= {"RGB", "invalid_image"}


def bomb(side: int) -> bytes:
    """A small 1-bit PNG with ``side * side`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side * ((side + 7) // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [7072, 13_000, 30_000])
def test_a_decompression_bomb_is_refused_before_pixels_exist(side):
    data = bomb(side)
    assert len(data) < 200_000
    tracemalloc.start()
    try:
        message = assert_refused(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    assert "pixels" in message or "cannot be read" in message


def test_the_pixel_limit_is_an_option():
    data = encoded(picture(100, 100))
    assert open_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(InvalidRequest, match="100x100"):
        open_image(data, max_pixels=9_999)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (1, 65535)])
def test_degenerate_sizes_are_images(size):
    assert read(encoded(Image.new("RGB", size, "green"))).size == size


def test_no_side_is_longer_than_any_picture():
    row = io.BytesIO()
    Image.new("1", (MAX_SIDE + 1, 1)).save(row, "PNG")
    with pytest.raises(InvalidRequest, match="on a side"):
        open_image(row.getvalue())


def with_orientation(number: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(picture(60, 40), kind, exif=exif.tobytes())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", range(1, 9))
def test_the_switch_turns_images_as_their_exif_says(number, kind):
    data = with_orientation(number, kind)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode(open_image(data), exif_orientation=True)
    assert upright_size(open_image(data), exif_orientation=True) == image.size == expected.size
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert upright_size(open_image(data), exif_orientation=False) == read(data).size == (60, 40)


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(number):
    assert upright_size(open_image(with_orientation(number)), exif_orientation=True) == (60, 40)


def test_damaged_exif_is_ignored():
    """Whatever stands there, the image is read, and its size is known before."""
    rng = random.Random(2)
    clean = with_orientation(6)
    start = clean.index(b"Exif\0\0")
    for _ in range(300):
        damaged = bytearray(clean)
        for _ in range(rng.randint(1, 12)):
            damaged[rng.randrange(start, start + 32)] = rng.randrange(256)
        image = open_image(bytes(damaged))
        size = upright_size(image, exif_orientation=True)
        assert decode(image, exif_orientation=True).size == size


def test_exif_behind_the_pixels_of_a_png_is_ignored():
    """To find it all pixels would have to be decoded before the image's size is known."""
    data = with_orientation(6, "PNG")
    chunk = data.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", data[chunk : chunk + 4])[0]
    end = data.index(b"IEND") - 4
    moved = data[:chunk] + data[chunk + length : end] + data[chunk : chunk + length] + data[end:]
    assert upright_size(open_image(moved), exif_orientation=True) == (60, 40)
    assert decode(open_image(moved), exif_orientation=True).size == (60, 40)
