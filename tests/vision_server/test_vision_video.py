"""Frames are the ones the published code picks, whatever the container, and hostile files end as refusals."""

import random
import struct

import numpy as np
import pytest

from common.service.errors import InvalidRequest
from tests.vision_server.videos import film, number_of
from vision_server.video import frame_positions, probe, sample_frames


def get_index(max_frame: int, num_segments: int, first: int = 0) -> list[int]:
    """INTERNVL.md 6.4, without a time bound."""
    segment = float(max_frame - first) / num_segments
    return [int(first + (segment / 2) + np.round(segment * k)) for k in range(num_segments)]


def numbers(data: bytes, num_frames: int) -> list[int]:
    return [number_of(frame) for frame in sample_frames(data, num_frames)]


def test_positions_are_those_of_the_published_code():
    for num_frames in (1, 2, 3, 7, 8, 9, 25, 100, 1001):
        for segments in (1, 2, 3, 8, 13, 32, 128):
            positions = frame_positions(num_frames, segments)
            assert positions == get_index(num_frames - 1, segments)
            assert 0 <= positions[0] <= positions[-1] < num_frames


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": 3}),
        ("mp4", "libx265", {"x265-params": "log-level=none"}),
        ("mov", "mpeg4", {}),
        ("webm", "libvpx", {}),
        ("webm", "libvpx-vp9", {}),
        ("matroska", "libx264", {"bf": 2}),
        ("avi", "libx264", {"bf": 2}),
    ],
)
@pytest.mark.parametrize("num_frames", [1, 8, 60])
def test_every_container_and_codec_gives_the_same_frames(kind, codec, options, num_frames):
    data = film(60, kind, codec, **options)
    assert numbers(data, num_frames) == get_index(59, num_frames)
    facts = probe(data)
    assert facts.num_frames == 60
    assert facts.seconds == pytest.approx(2.4, abs=0.01)


def test_av1_is_read(monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    assert numbers(film(20, "mp4", "libsvtav1"), 4) == get_index(19, 4)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_a_short_video_repeats_frames(num_frames):
    assert numbers(film(num_frames), 8) == get_index(num_frames - 1, 8)


def test_one_long_group_of_pictures_is_decoded_through():
    assert numbers(film(100, g=1000), 6) == get_index(99, 6)


def test_frames_have_their_own_size_and_stand_upright():
    data = film(3, size=(96, 48))
    assert next(sample_frames(data, 1)).shape == (48, 96, 4)
    upright = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    lying = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    at = data.index(upright, data.index(b"tkhd"))  # the track's matrix, not the film's
    turned = next(sample_frames(data[:at] + lying + data[at + 36 :], 1))
    assert turned.shape == (96, 48, 4)
    assert turned.flags.c_contiguous


def test_a_video_cut_short_shows_what_is_left():
    """A WebM has no index: its frames are those that are there. Then the last one stands for the missing."""
    data = film(60, "webm", "libvpx")
    cut = data[: len(data) * 2 // 3]
    num_left = probe(cut).num_frames
    assert 20 < num_left < 60
    assert numbers(cut, 8)[:7] == get_index(num_left - 1, 8)[:7]


@pytest.mark.parametrize("promised", [40, 2**20, 2**31, 2**32 - 1])
def test_a_header_that_promises_more_is_not_believed(promised):
    """A table of samples that are not there. Frames that are there are shown, or the file is refused."""
    data = film(20, codec="mpeg4", g=1)
    at = data.index(b"stsz") + 12
    assert struct.unpack(">I", data[at : at + 4]) == (20,)
    lying = data[: at - 4] + struct.pack(">II", 400, promised) + data[at + 4 :]
    try:
        frames = list(sample_frames(lying, 8))
    except InvalidRequest as refusal:
        assert refusal.code == "invalid_image"
    else:
        assert len(frames) == 8


def test_frames_are_bounded_before_they_are_decoded():
    data = film(5, size=(640, 480))
    assert len(list(sample_frames(data, 2, max_pixels=640 * 480))) == 2
    for read in (lambda: list(sample_frames(data, 2, max_pixels=640 * 480 - 1)), lambda: probe(data, max_pixels=1000)):
        with pytest.raises(InvalidRequest) as refusal:
            read()
        assert refusal.value.code == "invalid_image"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"\xff\xd8\xff\xe0 a JPEG",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"GIF89a",
        bytes(1000),
    ],
)
def test_other_containers_are_refused(data):
    with pytest.raises(InvalidRequest) as refusal:
        probe(data)
    assert refusal.value.code == "unsupported_media"


def test_other_codecs_are_refused():
    with pytest.raises(InvalidRequest) as refusal:
        probe(film(3, "avi", "ffv1"))
    assert refusal.value.code == "unsupported_media"


@pytest.mark.parametrize("kind", ["mp4", "webm", "avi"])
def test_damaged_videos_end_as_frames_or_refusals(kind):
    data = film(30, kind, {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}[kind])
    rng = random.Random(3)
    outcomes: set[int | str] = set()
    variants = [data[: len(data) * n // 20] for n in range(20)]
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        variants.append(bytes(broken))
    for variant in variants:
        try:
            outcomes.add(len(list(sample_frames(variant, 4))))
        except InvalidRequest as refusal:
            assert "/" not in refusal.message and "0x" not in refusal.message
            outcomes.add(refusal.code)
    assert 4 in outcomes
    assert outcomes <= {4, "invalid_image", "unsupported_media"}
