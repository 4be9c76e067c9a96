"""``data:`` URLs: strict in form, judged by magic bytes and header only."""

import base64
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.service.errors import DvdError, InvalidRequest, RequestTooLarge
from router.media import MediaLimits, load_image, load_video
from tests.router.conftest import data_url, png

LIMITS = MediaLimits(max_item_bytes=100_000, max_video_bytes=200_000, max_pixels=1_000_000)


def load(url: str):
    return load_image(url, LIMITS, "here")


def encoded(image_format: str, size=(8, 6), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(image_format):
    data = encoded(image_format, (30, 20))
    image = load(data_url(data, "text/plain"))  # the declared type is ignored
    assert (image.data, image.width, image.height) == (data, 30, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (200, 1)])
def test_degenerate_sizes(size):
    image = load(data_url(encoded("PNG", size)))
    assert (image.width, image.height) == size


@pytest.mark.parametrize(
    "prefix", ["data:image/png;base64,", "DATA:image/png;BASE64,", "data:;base64,", "data:image/png;name=a;base64,"]
)
def test_accepted_prefixes(prefix):
    assert load(prefix + base64.b64encode(png()).decode()).width == 64


B64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png;base64",
        f"data:image/png,{B64}",
        f"data:base64,{B64}",
        f"data:image/png;base64;x,{B64}",
        "data:image/png;base64,",
        f"data:image/png;base64, {B64}",
        f"data:image/png;base64,{B64}\n",
        f"data:image/png;base64,{B64[:100]}\n{B64[100:]}",
        f"data:image/png;base64,{B64[:-1]}",
        f"data:image/png;base64,{B64}AAAA=",
        f"data:image/png;base64,{B64.replace('+', '-').replace('/', '_')}=",
        "data:image/png;base64,%41%41",
        "data:image/png;base64,жжжж",
        f"data:{'x' * 300};base64,{B64}",
    ],
)
def test_malformed_data_urls(url):
    with pytest.raises(InvalidRequest) as refused:
        load(url)
    assert (refused.value.code, refused.value.param) == ("invalid_image", "here")


@pytest.mark.parametrize(
    "url",
    ["", "x", "https://a/b.png", "HTTP://a", "file:///etc/passwd", "/etc/passwd", B64, " data:image/png;base64,AAAA", "ftp://a"],
)  # fmt: skip
def test_everything_else_is_blocked_with_one_message(url):
    with pytest.raises(InvalidRequest) as refused:
        load(url)
    assert (refused.value.code, refused.value.message) == ("media_url_blocked", "this media URL is not allowed")


@pytest.mark.parametrize(
    "data", [b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF8", b"RIFF0000WEBP", b"%PDF-1.4", b"II*\0"]
)  # fmt: skip
def test_not_an_image(data):
    with pytest.raises(InvalidRequest) as refused:
        load(data_url(data))
    assert refused.value.code == "invalid_image"
    assert "0x" not in refused.value.message


def test_formats_outside_the_list_are_refused():
    with pytest.raises(InvalidRequest):
        load(data_url(encoded("TIFF")))


def test_too_many_pixels():
    with pytest.raises(InvalidRequest) as refused:
        load(data_url(encoded("PNG", (1001, 1000), "1")))
    assert refused.value.code == "invalid_image"
    assert "pixels" in refused.value.message


@pytest.mark.parametrize("extra", [1, 50_000])
def test_too_many_bytes(extra):
    with pytest.raises(RequestTooLarge):
        load(data_url(bytes(LIMITS.max_item_bytes + extra)))


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.integers(0, 400), st.binary(max_size=20))
def test_damaged_files_are_read_or_refused(image_format, cut, noise):
    """Never another exception, whatever the header says."""
    data = encoded(image_format)
    damaged = data[:cut] + noise + data[cut + len(noise) :]
    try:
        image = load(data_url(damaged))
    except DvdError as error:
        assert error.code == "invalid_image"
    else:
        assert image.width >= 1
        assert image.height >= 1


VIDEO_STARTS = [
    b"\0\0\0\x20ftypisom",
    b"\0\0\0\x14ftypqt  ",
    b"\0\0\0\x08wide",
    b"\0\1\0\0moov",
    b"\x1a\x45\xdf\xa3\x01",
    b"RIFF\x10\0\0\0AVI LIST",
]


@pytest.mark.parametrize("start", VIDEO_STARTS)
def test_videos_are_known_by_their_first_bytes(start):
    data = start + bytes(150_000)  # more than an image may have
    assert load_video(data_url(data, "text/plain"), LIMITS, "here") == data
    with pytest.raises(RequestTooLarge, match="a video may have at most 200000 bytes"):
        load_video(data_url(start + bytes(200_000)), LIMITS, "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        png(),
        b"ftypisom",
        b"\0\0\0\x20fty",
        b"RIFF\x10\0\0\0WEBP",
        b"RIFF\x10\0\0\0WAVE",
        b"#EXTM3U",
        b"\0\0\1\xba",
    ],
)
def test_everything_else_is_no_video(data):
    with pytest.raises(InvalidRequest) as refused:
        load_video(data_url(data, "video/mp4"), LIMITS, "here")
    assert (refused.value.code, refused.value.param) == ("unsupported_media", "here")


@pytest.mark.parametrize("prefix", ["data:video/jpeg;base64,", "DATA:Video/JPEG;base64,", "data:video/jpeg,"])
def test_frames_in_one_url_are_told_where_they_belong(prefix):
    with pytest.raises(InvalidRequest, match="as a list of images") as refused:
        load_video(f"{prefix}{B64},{B64}", LIMITS, "here")
    assert refused.value.code == "unsupported_media"
