"""The way of one image through the vision server: bytes, tiles, device; and the two ways to be spared it.

An image that was encoded lately comes from the cache, one that is being encoded is shared by all who ask for it.
Everything here runs on the event loop: pixels are handled by decode workers, the device by ``ComputeThread``. Knows
nothing of requests, frames or gRPC.
"""

from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from common.service import metrics
from common.service.errors import InvalidRequest
from vision_server.batcher import ImageId
from vision_server.cache import GroupCache
from vision_server.compute import ComputeThread
from vision_server.decode_pool import DecodePool, MediaOptions, VideoFacts
from vision_server.device_jobs import EncodedGroup, Group, SeenGroup
from vision_server.encoder import Kind
from vision_server.single_flight import SingleFlight
from vision_server.tiling import Tiles
from vision_server.vir import VirChoice

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a video as it came, and what it is known by. ``key`` None: nobody else can have the same."""

    data: bytes
    options: MediaOptions
    key: bytes | None = None

    def identity(self, kind: Kind, dtype: torch.dtype) -> Hashable:
        """Equal where the same is to be computed of the same tiles.

        Patches become rows, and take a dtype, only after they have left here: whoever asked for scores has them.
        """
        wanted = self.options.first_tile, self.options.num_tiles
        return self.key, kind, None if kind == "patches" else dtype, wanted


@dataclass(frozen=True, slots=True)
class Passage:
    """Groups of one image in tile order."""

    groups: AsyncIterator[Group]
    is_cached: bool


class ImagePipeline:
    """Decode, encode, remember.

    Args:
        decoder: not owned.
        compute: likewise; its queue bounds what is in work here, images that come from the cache included.
        cache_bytes: of what may be remembered; 0 switches that off.
    """

    def __init__(self, decoder: DecodePool, compute: ComputeThread, cache_bytes: int) -> None:
        self._decoder = decoder
        self._compute = compute
        self._cache = GroupCache(cache_bytes)
        self._flights: SingleFlight[Group] = SingleFlight()

    @asynccontextmanager
    async def enter(self, medium: Medium, kind: Kind, dtype: torch.dtype) -> AsyncIterator[Passage]:
        """The image's groups; its place in the server is kept until the block is left.

        Entering, or reading the groups, raises InvalidRequest for an image that cannot be used, and what
        ``ComputeThread`` raises.
        """
        key: Hashable = object() if medium.key is None else medium.identity(kind, dtype)
        if (cached := self._cache.get(key) if medium.key is not None else None) is not None:
            place = self._compute.admit(is_encoded=True)
            try:
                yield Passage(_each(cached), is_cached=True)
            finally:
                self._compute.release(place)
            return
        if key in self._flights:
            metrics.VISION_COALESCED.inc()
        async with self._flights.board(key, lambda held: self._encode(medium, key, kind, dtype, held)) as flight:
            yield Passage(flight.items(), is_cached=False)

    async def probe(self, video: bytes) -> VideoFacts:
        """How long a video is. Raises Overloaded when the server is full, and what ``DecodePool.probe`` raises."""
        place = self._compute.admit(is_encoded=True)
        try:
            return await self._decoder.probe(video)
        finally:
            self._compute.release(place)

    async def routed(
        self, groups: AsyncIterator[Group], choice: VirChoice, dtype: torch.dtype
    ) -> AsyncIterator[EncodedGroup]:
        """Groups of ``patches`` as rows: each tile through the projector ``choice`` gives it, once that is known."""
        if not choice.needs_all_tiles:
            async for group in groups:
                assert isinstance(group, SeenGroup)
                yield await self._compute.project([group], choice.compressed(group.seen.scores), dtype)
            return
        seen = [group async for group in groups if isinstance(group, SeenGroup)]
        compressed = choice.compressed(torch.cat([group.seen.scores for group in seen]))
        yield await self._compute.project(seen, compressed, dtype)

    async def _encode(
        self, medium: Medium, key: Hashable, kind: Kind, dtype: torch.dtype, held: ExitStack
    ) -> AsyncIterator[Group]:
        image = self._compute.admit()
        held.callback(self._compute.release, image)
        tiles, num_image_tiles = await self._decode(image, medium)
        offset = medium.options.first_tile
        groups: list[Group] = []
        async for group in self._compute.encode(
            image, tiles, dtype, kind, offset=offset, num_image_tiles=num_image_tiles
        ):
            groups.append(group)
            yield group
        if medium.key is not None:
            self._cache.put(key, groups)

    async def _decode(self, image: ImageId, medium: Medium) -> tuple[Tiles, int]:
        """The wanted tiles, and how many the image has. Header first: the image's cost is known, and may be refused,
        before a pixel is decoded."""
        try:
            num_image_tiles = await self._decoder.measure(medium.data, medium.options)
            self._compute.resize(image, len(medium.options.wanted(num_image_tiles)))
            return await self._decoder.tiles(medium.data, medium.options), num_image_tiles
        except InvalidRequest as error:
            metrics.VISION_DECODE_REJECTED.labels(error.code).inc()
            raise


async def _each(items: Sequence[_T]) -> AsyncIterator[_T]:
    for item in items:
        yield item
