"""The rows of one image as they arrive: tiles in any order in, a prefix without gaps out.

Filled on the event loop, read by the engine thread. What makes that safe without a lock: rows are appended before the
count that covers them, and never change afterwards. Knows nothing of requests, budgets or sockets.
"""

import bisect
import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from common.service.errors import InternalError
from protos.frame import ITEM_SIZE, FeatureDtypeName

FLASH_COMPRESSION: Final = 4
"""A compressed tile of a Flash checkpoint has a quarter of the tokens."""


@dataclass(frozen=True, slots=True)
class ImageKey:
    """What makes two images the same to us: content, options and tenant scope, and the expected size."""

    mm_hash: bytes
    max_num_tokens: int


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """What every frame must look like; decided by this side, never by the sender."""

    fingerprint: bytes
    hidden_size: int
    dtype: FeatureDtypeName
    tokens_per_tile: int
    is_flash: bool = False

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * ITEM_SIZE[self.dtype]

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Token counts a tile may have."""
        if self.is_flash:
            return self.tokens_per_tile, self.tokens_per_tile // FLASH_COMPRESSION
        return (self.tokens_per_tile,)

    def num_tiles(self, max_num_tokens: int) -> int:
        """Of an image with so many tokens where no tile is compressed."""
        return max_num_tokens // self.tokens_per_tile

    def min_num_tokens(self, max_num_tokens: int) -> int:
        """Of the same image where every tile is."""
        return self.num_tiles(max_num_tokens) * min(self.tile_sizes)


class ImageUser(Protocol):
    """Who waits for an image, or reads it."""

    def on_rows(self) -> None:
        """Tiles of it became ready."""
        ...


class FeatureImage:
    """Rows of one image. Tiles may arrive in any order; the ready prefix is what the engine sees."""

    def __init__(self, key: ImageKey, layout: FeatureLayout) -> None:
        self.key = key
        self.num_bytes = key.max_num_tokens * layout.row_bytes  # the reservation; shrinks to what came
        self.num_tiles = layout.num_tiles(key.max_num_tokens)
        self._layout = layout
        self.users: set[ImageUser] = set()
        self._tiles: list[torch.Tensor | None] = [None] * self.num_tiles
        self._prefix: list[torch.Tensor] = []  # tiles [tokens, hidden] from the first on without a gap
        self._prefix_starts: list[int] = []
        self.num_ready_tokens = 0  # written last: the engine thread reads it first

    @property
    def is_complete(self) -> bool:
        return len(self._prefix) == self.num_tiles

    @property
    def tile_tokens(self) -> list[int]:
        """Rows of each tile. Where they can differ: of the ready prefix, so of all once the image is complete."""
        if self._layout.is_flash:
            return [len(tile) for tile in self._prefix]
        return [self._layout.tokens_per_tile] * self.num_tiles

    @property
    def min_num_tokens(self) -> int:
        """Rows it will have at least, from what has come."""
        num_open = self.num_tiles - len(self._prefix)
        return self.num_ready_tokens + num_open * min(self._layout.tile_sizes)

    @property
    def tile_hashes(self) -> list[bytes]:
        """What names the rows of each tile in the prefix cache, of the tiles in ``tile_tokens``."""
        return tile_hashes(self.key, self.tile_tokens, self._layout)

    def is_ready(self, tile: int) -> bool:
        return self._tiles[tile] is not None

    def link(self, first_tile: int, tiles: Sequence[torch.Tensor]) -> None:
        """Make tiles ready, those that were not. They share the memory of ``tiles`` only if they need all of it."""
        new = [index for index in range(len(tiles)) if not self.is_ready(first_tile + index)]
        for index in new:
            self._tiles[first_tile + index] = tiles[index] if len(new) == len(tiles) else tiles[index].clone()
        for ready in itertools.takewhile(lambda rows: rows is not None, self._tiles[len(self._prefix) :]):
            assert ready is not None
            self._prefix.append(ready)
            self._prefix_starts.append(self.num_ready_tokens)
            self.num_ready_tokens += len(ready)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``[stop - start, hidden]`` of the ready prefix; copied only where they span tiles."""
        first = bisect.bisect_right(self._prefix_starts, start) - 1
        pieces: list[torch.Tensor] = []
        for tile_start, tile in zip(self._prefix_starts[first:], self._prefix[first:], strict=False):
            if tile_start >= stop:
                break
            pieces.append(tile[max(0, start - tile_start) : stop - tile_start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class ComputedImage(FeatureImage):
    """An image whose keys and values lie in the prefix cache and stay there as long as it is needed: nobody asks for
    its rows. Takes no memory."""

    def __init__(self, key: ImageKey, layout: FeatureLayout, tile_tokens: Sequence[int]) -> None:
        super().__init__(key, layout)
        self.num_bytes = 0
        self.num_ready_tokens = sum(tile_tokens)
        self._tile_tokens = list(tile_tokens)

    @property
    def is_complete(self) -> bool:
        return True

    @property
    def tile_tokens(self) -> list[int]:
        return self._tile_tokens

    @property
    def min_num_tokens(self) -> int:
        return self.num_ready_tokens

    def rows(self, start: int, stop: int) -> torch.Tensor:
        raise InternalError("rows were asked for of an image that was computed before")


def tile_hashes(key: ImageKey, tile_tokens: Sequence[int], layout: FeatureLayout) -> list[bytes]:
    """Of the first tiles of an image, which have these sizes. Equal where the tile and all before it are the same: row
    64 of an image may begin its second tile, or not, if it is encoded again elsewhere and a tile that was nearly
    compressed then is now."""
    if not layout.is_flash:
        return [key.mm_hash] * len(tile_tokens)
    hashes, last = [], key.mm_hash
    for size in tile_tokens:
        last = hashlib.blake2b(last + struct.pack("<I", size), digest_size=32).digest()
        hashes.append(last)
    return hashes
