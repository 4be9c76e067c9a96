"""What the device thread works on: an image whose tiles are encoded, and tiles that are projected once ViR has decided.

A job belongs to one caller on the event loop, who waits for its results; the device thread posts them. Knows nothing of
queues of tiles, requests or sockets.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.service import metrics
from common.service.errors import DvdError, InternalError
from vision_server.encoder import Kind, Projected, Seen
from vision_server.tiling import Tiles


@dataclass(frozen=True, slots=True)
class Times:
    """Stations of a group, in ``time.monotonic`` seconds: its tiles joined the queue, left it, were done."""

    queued: float
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """Rows ``[sum(tokens_per_tile), hidden]`` of neighbouring tiles."""

    first_tile: int
    num_image_tiles: int
    tokens_per_tile: tuple[int, ...]
    features: Tensor
    times: Times

    @property
    def num_tiles(self) -> int:
        return len(self.tokens_per_tile)

    @property
    def num_bytes(self) -> int:
        return self.features.nbytes


@dataclass(frozen=True, slots=True)
class SeenGroup:
    """Neighbouring tiles between tower and projector."""

    first_tile: int
    num_image_tiles: int
    seen: Seen
    times: Times

    @property
    def num_tiles(self) -> int:
        return len(self.seen.scores)

    @property
    def num_bytes(self) -> int:
        return self.seen.patches.nbytes


Group = EncodedGroup | SeenGroup


class ImageJob:
    """An image between decode and the last of its groups. One place in ``results`` for each tile, one for bad news.

    Args:
        tiles: those that are wanted, of all that the image has.
        offset: number of the first of them.
        num_image_tiles: how many the image has; default: no more than these.
    """

    def __init__(
        self, kind: Kind, tiles: Tiles, dtype: torch.dtype, offset: int = 0, num_image_tiles: int | None = None
    ) -> None:
        self.kind = kind
        self.tiles = tiles
        self.dtype = dtype
        self.offset = offset
        self.num_image_tiles = num_image_tiles or len(tiles)
        self.queued = time.monotonic()
        self.num_waiting = len(tiles)  # tiles not yet in a batch
        self.num_pending = len(tiles)  # tiles whose group is still to come
        self.results: asyncio.Queue[Group | DvdError] = asyncio.Queue(len(tiles) + 1)

    def group(self, first: int, result: Tensor | Seen, times: Times) -> Group:
        """Of this job's part of a batch's result, from its tile number ``first`` on.

        Raises:
            InternalError: it holds NaN or infinity.
        """
        if isinstance(result, Seen):
            _check_finite(result.scores)
            return SeenGroup(self.offset + first, self.num_image_tiles, result, times)
        _check_finite(result)
        tokens_per_tile = (result.shape[1],) * len(result)
        rows = result.to(self.dtype).flatten(0, 1)
        return EncodedGroup(self.offset + first, self.num_image_tiles, tokens_per_tile, rows, times)


@dataclass(eq=False, slots=True)
class ProjectionJob:
    """Tiles ``[patches, vision hidden]`` each, and which of them are compressed."""

    patches: Sequence[Tensor]
    compressed: Sequence[bool]
    dtype: torch.dtype
    result: asyncio.Future[Projected]

    def own(self, rows: Tensor, tokens_per_tile: tuple[int, ...]) -> Projected:
        """This job's part of what was projected. Raises InternalError as ``ImageJob.group`` does."""
        _check_finite(rows)
        return Projected(rows.to(self.dtype), tokens_per_tile)


def _check_finite(values: Tensor) -> None:
    # Neither is hidden by the other, nor by a number, and torch reads 10 GB/s; isfinite and all, a seventieth of that.
    if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        metrics.VISION_NONFINITE.inc()
        raise InternalError("the image's features are not finite")
