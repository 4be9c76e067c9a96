"""What the decode pool and its workers say to each other: fixed little-endian records, and files in memory.

    pool -> worker    Job        with two descriptors: the medium's bytes, and room for its tiles
    worker -> pool    Outcome    facts or a refusal; tiles lie in the room

One record is one message on a socket that keeps messages apart (SOCK_SEQPACKET). Sizes are checked on both sides.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Final, Self

from common.model.geometry import Tiling
from common.service.errors import MAX_MESSAGE_CHARS, InvalidRequest

READY: Final = b"ready"
"""First message of a worker: it can decode, and has given up everything else."""
MAX_RECORD_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How a medium becomes tiles.

    Args:
        exif_orientation: turn an image as its EXIF says; published models do not.
        num_frames: of a video, one tile each, whatever ``tiling`` says of grids; 0: an image.
        first_tile: the tiles before it are made elsewhere.
        num_tiles: likewise those after so many; 0: all from ``first_tile`` on are wanted.
    """

    tiling: Tiling
    exif_orientation: bool = False
    num_frames: int = 0
    first_tile: int = 0
    num_tiles: int = 0

    @property
    def max_tiles(self) -> int:
        """No medium becomes more, thumbnail included."""
        return self.num_frames or self.tiling.max_tiles + 1

    @property
    def max_wanted(self) -> int:
        """Not more of them are wanted."""
        return self.num_tiles or self.max_tiles

    @property
    def is_part(self) -> bool:
        """Whether some tiles of the medium may not be wanted."""
        return self.first_tile > 0 or self.num_tiles > 0

    def wanted(self, num_tiles: int) -> range:
        """Of a medium that becomes ``num_tiles``. Raises InvalidRequest if it has not all that are wanted."""
        stop = self.first_tile + self.num_tiles if self.num_tiles else num_tiles
        if not self.first_tile < stop <= num_tiles:
            message = f"tiles {self.first_tile} to {stop - 1} are wanted of an image that has {num_tiles}"
            raise InvalidRequest(message, param="first_tile")
        return range(self.first_tile, stop)


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """How long a video is."""

    seconds: float
    num_frames: int


class Kind(IntEnum):
    MEASURE = 0
    TILES = 1
    PROBE = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One medium, and what is wanted of it. ``number``: comes back with the outcome."""

    number: int
    kind: Kind
    options: MediaOptions

    _FORM = struct.Struct("<QB???HHIHHH")

    def pack(self) -> bytes:
        tiling, options = self.options.tiling, self.options
        return self._FORM.pack(
            self.number, self.kind, options.exif_orientation, tiling.use_thumbnail, tiling.dynamic,
            tiling.min_tiles, tiling.max_tiles, tiling.tile_size, options.num_frames,
            options.first_tile, options.num_tiles,
        )  # fmt: skip

    @classmethod
    def unpack(cls, record: bytes) -> Self:
        number, kind, exif, thumbnail, dynamic, low, high, side, *counts = cls._FORM.unpack(record)
        return cls(number, Kind(kind), MediaOptions(Tiling(low, high, thumbnail, side, dynamic), exif, *counts))


_CODES: Final = ("", "invalid_image", "unsupported_media", "invalid_value")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job. ``num_tiles``: that the medium has, or that were made, as was asked. ``code`` not empty:
    refused, and ``message`` says why."""

    number: int
    num_tiles: int = 0
    seconds: float = 0.0
    num_frames: int = 0
    code: str = ""
    message: str = ""

    _FORM = struct.Struct("<QIdQB")

    def pack(self) -> bytes:
        code = _CODES.index(self.code)
        return self._FORM.pack(self.number, self.num_tiles, self.seconds, self.num_frames, code) + self.message.encode()

    @classmethod
    def unpack(cls, record: bytes) -> Self:
        """Raises ValueError on what no honest worker sends."""
        try:
            number, num_tiles, seconds, num_frames, code = cls._FORM.unpack_from(record)
            message = record[cls._FORM.size :].decode("ascii")
            if not (0 <= seconds < inf and num_frames < 2**32):
                raise ValueError
            return cls(number, num_tiles, seconds, num_frames, _CODES[code], message)
        except (struct.error, ValueError, IndexError):
            raise ValueError("a record that makes no sense") from None

    @classmethod
    def refused(cls, number: int, error: InvalidRequest) -> Self:
        return cls(number, code=error.code, message=error.message[:MAX_MESSAGE_CHARS])
