"""Which server encodes which tiles of an image. Pure: no clocks, no sockets, no state; the caller brings what is known.

A large image that is divided among idle servers is there sooner. Parts are contiguous and in tile order, and all are
begun at once, so that the language server can prefill the first while the others are still being encoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MIN_SAVED_SECONDS: Final = 0.02
"""Every server decodes the compressed image, and gets a copy of it: what a division saves must be worth that."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tiles of one image for one server, by its address. ``num_tiles`` 0: all from ``first_tile`` on."""

    server: str | None
    first_tile: int = 0
    num_tiles: int = 0


WHOLE: Final = (Part(None),)
"""Not divided; whoever suits best encodes it."""


def divide(num_tiles: int, servers: Sequence[str], min_tiles: int, tiles_per_second: float) -> Sequence[Part]:
    """Equal parts of at least ``min_tiles``; the first is no larger than any, so that prefill begins early.

    Args:
        num_tiles: of the image.
        servers: idle ones, in the order in which they should get parts.
        tiles_per_second: that a server encodes; 0: not known yet.

    Returns:
        ``WHOLE`` where a division saves too little.
    """
    num_parts = min(len(servers), num_tiles // min_tiles)
    if num_parts < 2:
        return WHOLE
    share, rest = divmod(num_tiles, num_parts)
    sizes = [share] * (num_parts - rest) + [share + 1] * rest
    if tiles_per_second > 0 and (num_tiles - sizes[-1]) / tiles_per_second < MIN_SAVED_SECONDS:
        return WHOLE
    parts, first_tile = [], 0
    for server, size in zip(servers[:num_parts], sizes, strict=True):
        parts.append(Part(server, first_tile, size))
        first_tile += size
    return parts
