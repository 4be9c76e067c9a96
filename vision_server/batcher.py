"""Which tiles go to the device next. Pure: no torch, no clock, no thread, no event loop.

All tiles have one shape, so a batch is any set of tiles of which the same is wanted; its cost is their number. Images
are served in the order in which they became ready; an image larger than a batch is spread over several. A batch never
waits to be filled: the device takes what is there when it is free.
"""

from collections import deque
from dataclasses import dataclass

from common.service.errors import Overloaded

ImageId = int
Kind = str
"""What is to become of an image; opaque here."""


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Neighbouring tiles of one image that are encoded in one batch."""

    image: ImageId
    first_tile: int
    num_tiles: int


@dataclass(slots=True)
class _Image:
    num_tiles: int
    num_taken: int = 0
    kind: Kind = ""


class Batcher:
    """Bounded FIFO of tiles.

    An image is admitted before anything is spent on it, becomes ready once it is decoded, and occupies its place until
    it is released: features that could not be delivered yet keep new work out, so nothing piles up behind a slow peer.

    Args:
        max_batch_tiles: tiles in one batch.
        max_queued_tiles: tiles of all images that are admitted and not released.
    """

    def __init__(self, max_batch_tiles: int, max_queued_tiles: int) -> None:
        if not 1 <= max_batch_tiles <= max_queued_tiles:
            raise ValueError(
                f"need 1 <= max_batch_tiles <= max_queued_tiles, got {max_batch_tiles}, {max_queued_tiles}"
            )
        self.max_batch_tiles = max_batch_tiles
        self.max_queued_tiles = max_queued_tiles
        self._images: dict[ImageId, _Image] = {}
        self._ready: deque[ImageId] = deque()
        self._held_tiles = 0

    @property
    def held_tiles(self) -> int:
        """Tiles of all admitted images, whatever became of them."""
        return self._held_tiles

    @property
    def queued_tiles(self) -> int:
        """Tiles waiting for decode or for a batch."""
        return sum(image.num_tiles - image.num_taken for image in self._images.values())

    @property
    def num_waiting(self) -> int:
        """Images with a tile that is not yet in a batch."""
        return sum(image.num_taken < image.num_tiles for image in self._images.values())

    def __len__(self) -> int:
        return len(self._images)

    def admit(self, image: ImageId, num_tiles: int = 1, *, is_encoded: bool = False) -> None:
        """Take a place; one tile as long as the image's size is unknown.

        Args:
            is_encoded: nothing will be encoded, only delivered; that, too, is bounded.

        Raises:
            Overloaded: ``max_queued_tiles`` would be exceeded.
        """
        if image in self._images:
            raise ValueError(f"image {image} was admitted before")
        self._reserve(num_tiles)
        self._images[image] = _Image(num_tiles, num_taken=num_tiles if is_encoded else 0)

    def resize(self, image: ImageId, num_tiles: int) -> None:
        """The image's header was read. The place is kept when there is no room for the rest.

        Raises:
            Overloaded: ``max_queued_tiles`` would be exceeded.
        """
        self._reserve(num_tiles - self._images[image].num_tiles)
        self._images[image].num_tiles = num_tiles

    def make_ready(self, image: ImageId, kind: Kind = "") -> None:
        """The image's tiles exist: it joins the queue. A batch holds tiles of one kind."""
        if image not in self._images:
            raise ValueError(f"image {image} was never admitted")
        self._images[image].kind = kind
        self._ready.append(image)

    def take(self) -> list[TileGroup]:
        """The next batch, empty when no tile is ready. At most one group per image."""
        room = self.max_batch_tiles
        groups: list[TileGroup] = []
        kind = self._images[self._ready[0]].kind if self._ready else ""
        while room and self._ready and self._images[self._ready[0]].kind == kind:
            image_id = self._ready[0]
            image = self._images[image_id]
            count = min(room, image.num_tiles - image.num_taken)
            groups.append(TileGroup(image_id, image.num_taken, count))
            image.num_taken += count
            room -= count
            if image.num_taken == image.num_tiles:
                self._ready.popleft()
        return groups

    def release(self, image: ImageId) -> int:
        """Forget an image, delivered or not; returns how many of its tiles were dropped from the queue.

        Releasing an unknown image does nothing, so that every path may end in a release.
        """
        entry = self._images.pop(image, None)
        if entry is None:
            return 0
        self._held_tiles -= entry.num_tiles
        num_dropped = entry.num_tiles - entry.num_taken
        if num_dropped and image in self._ready:
            self._ready.remove(image)
        return num_dropped

    def _reserve(self, num_tiles: int) -> None:
        if self._held_tiles + num_tiles > self.max_queued_tiles:
            raise Overloaded("the vision server has as many images as it can hold")
        self._held_tiles += num_tiles
