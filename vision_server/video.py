"""A video's bytes -> the frames the tower sees (INTERNVL.md 6.4), through PyAV.

Three containers by their first bytes, six codecs, one stream, nothing that the file refers to. Which frames exist is
decided by the packets that are really there, not by what headers promise. Frames between the wanted ones are decoded
only from the last key frame on.
"""

import contextlib
import io
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import av
import numpy as np
from av.codec.context import ThreadType
from numpy.typing import NDArray

from common.service.errors import InvalidRequest
from vision_server.decode_job import VideoFacts
from vision_server.media import FOREIGN, MAX_PIXELS, invalid_image, translated

_CONTAINERS: Final = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip)", re.DOTALL),  # MP4, too
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),  # WebM, too
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
}
_DECODERS: Final = ("h264", "hevc", "vp8", "vp9", "libdav1d", "mpeg4")
_FOREIGN: Final = (av.FFmpegError, *FOREIGN)
_BROKEN: Final = "the video is broken or truncated"

Pixels = NDArray[np.uint8]


def probe(data: bytes, *, max_pixels: int = MAX_PIXELS) -> VideoFacts:
    """Read headers and count packets; nothing is shown. Raises InvalidRequest as ``sample_frames`` does."""
    with translated(_BROKEN, _FOREIGN):
        return _Film(data, max_pixels).facts


def sample_frames(data: bytes, num_frames: int, *, max_pixels: int = MAX_PIXELS) -> Iterator[Pixels]:
    """``num_frames`` frames from the middles of as many equal segments, ``[H, W, 4]`` each, turned upright; the fourth
    byte of a pixel means nothing. Where the video ends early, its last frame stands for those that are missing.

    Raises:
        InvalidRequest: ``unsupported_media``: another container or codec. ``invalid_image``: broken, without pictures,
            or more than ``max_pixels`` pixels a frame.
    """
    with translated(_BROKEN, _FOREIGN):
        film = _Film(data, max_pixels)
        positions = frame_positions(len(film.times), num_frames)
        for index, position in enumerate(positions):
            if index == 0 or position != positions[index - 1]:
                pixels = film.picture(position)
            yield pixels


def frame_positions(num_frames: int, num_segments: int) -> list[int]:
    """Which frames of a video stand for its segments; ascending. Source: ``get_index`` of the published code."""
    segment = (num_frames - 1) / num_segments
    return [int(segment / 2 + round(segment * number)) for number in range(num_segments)]


class _Film:
    """The packets of one video stream, and its decoder. Pictures are asked for in ascending order.

    Packets are kept: the file is in memory anyway, and jumping between them needs no index of the container's.

    Attributes:
        times: of all pictures, in the order of display; their numbers where the container has no times.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        with _open(data, max_pixels) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise invalid_image("the video has no pictures")
            self._decoder = self._checked(stream.codec_context)
            self._packets = [packet for packet in container.demux(stream) if packet.size]
            self._seconds_per_tick = float(stream.time_base or 0)
            is_avi = container.format.name == "avi"  # which only knows the order of decoding
        shown = [packet for packet in self._packets if not packet.is_discard]
        if not shown:
            raise invalid_image("the video has no pictures")
        times = sorted({packet.pts for packet in shown if packet.pts is not None})
        self._ticks = times[-1] - times[0] if times else 0
        self._has_times = len(times) == len(shown) and not is_avi
        self.times = times if self._has_times else list(range(len(shown)))
        self._keys = [
            (index, packet.pts)
            for index, packet in enumerate(self._packets)
            if self._has_times and packet.is_keyframe and packet.pts is not None
        ]
        self._next_packet = 0
        self._decoded: deque[av.VideoFrame] = deque()
        self._picture: av.VideoFrame | None = None
        self._time = -1

    @property
    def facts(self) -> VideoFacts:
        """From the first picture to the end of the last."""
        num_frames = len(self.times)
        mean = self._ticks / (num_frames - 1) if num_frames > 1 else self._packets[0].duration or 0
        return VideoFacts(max(0.0, num_frames * mean * self._seconds_per_tick), num_frames)

    def picture(self, position: int) -> Pixels:
        """The picture at ``position`` in the order of display; if it is missing the next, at the end the last one."""
        wanted = self.times[position]
        self._jump_to_key_before(wanted)
        while self._picture is None or self._time < wanted:
            picture = self._decode_next()
            if picture is None:
                break
            self._time = picture.pts if self._has_times and picture.pts is not None else self._time + 1
            self._picture = picture
        if self._picture is None:
            raise invalid_image(_BROKEN)
        self._check_size(self._picture)
        pixels = self._picture.to_ndarray(format="rgba")
        return np.ascontiguousarray(np.rot90(pixels, self._picture.rotation // 90))

    def _jump_to_key_before(self, time: int) -> None:
        """Where a key frame lies between here and there, decode from it on."""
        key = max((index for index, key_time in self._keys if key_time <= time), default=0)
        if key > self._next_packet:
            if self._next_packet:
                self._decoder.flush_buffers()
            self._decoded.clear()
            self._next_packet = key

    def _decode_next(self) -> av.VideoFrame | None:
        """The next picture in the order of display, None at the end."""
        while not self._decoded:
            if self._next_packet > len(self._packets):
                return None
            packet = self._packets[self._next_packet] if self._next_packet < len(self._packets) else None
            self._next_packet += 1
            with contextlib.suppress(av.error.InvalidDataError):  # a broken picture; others may be whole
                self._decoded.extend(self._decoder.decode(packet))  # None: what the decoder still holds
        return self._decoded.popleft()

    def _checked(self, decoder: Any) -> av.VideoCodecContext:
        """Ready to decode, if we take what it decodes. ``decoder`` is None where FFmpeg has none."""
        if not isinstance(decoder, av.VideoCodecContext) or decoder.name not in _DECODERS:
            raise _unsupported("the video must be coded as H.264, H.265, VP8, VP9, AV1 or MPEG-4")
        self._check_size(decoder)
        decoder.options = {"max_pixels": str(self._max_pixels)}  # pictures may grow on the way
        decoder.thread_type, decoder.thread_count = ThreadType.NONE, 1
        return decoder

    def _check_size(self, picture: av.VideoCodecContext | av.VideoFrame) -> None:
        width, height = picture.width, picture.height
        if width * height > self._max_pixels:
            raise invalid_image(
                f"a picture of the video has {width}x{height} pixels, at most {self._max_pixels} are accepted"
            )


def _open(data: bytes, max_pixels: int) -> av.container.InputContainer:
    name = next((name for name, signature in _CONTAINERS.items() if signature.match(data)), None)
    if name is None:
        raise _unsupported("the video must be MP4, MOV, WebM, MKV or AVI")
    return av.open(
        io.BytesIO(data),
        "r",
        format=name,
        options={"max_pixels": str(max_pixels)},
        container_options={"format_whitelist": name, "codec_whitelist": ",".join(_DECODERS)},
        io_open=_refuse_to_open,
    )


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """Of what else the file would have FFmpeg read."""
    raise PermissionError


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="unsupported_media")
