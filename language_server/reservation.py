"""One request's hold on feature memory and the states it goes through (docs/reservations.md).

    WRITING -> READY -> RELEASED, and from WRITING also EXPIRED -> RELEASED

Belongs to the event loop. Knows nothing of budgets, of the line in which requests wait, or of sockets.
"""

import asyncio
import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from common.service.errors import DeadlineExceeded
from language_server.feature_image import FeatureImage
from protos.frame import FrameHeader


class LeaseState(enum.Enum):
    WRITING = "writing"
    """Some tiles have not come: frames are taken."""
    READY = "ready"
    """Every image is complete."""
    EXPIRED = "expired"
    """What was missing did not come in time: frames are refused. The memory is held until the engine has let go."""
    RELEASED = "released"


@dataclass(eq=False, slots=True)
class Delivery:
    """The right to write one image of one request, and what is being written.

    Attempts are counted by tile: tiles of one image may come from several servers, and one that was sent again makes
    nothing stale of the others. They are this request's own: an image may be on its way to several.
    """

    ticket: bytes
    attempts: list[int]  # the highest that has begun each tile
    # Placed, not committed: rows, and the view of them that their writer has.
    pending: OrderedDict[FrameHeader, tuple[torch.Tensor, memoryview]] = field(default_factory=OrderedDict)

    def highest_attempt(self, tiles: range) -> int:
        """Of those that have begun any of these tiles."""
        return max(self.attempts[tiles.start : tiles.stop], default=0)

    def begin(self, header: FrameHeader, rows: torch.Tensor, view: memoryview) -> None:
        """Somebody writes these tiles; lower attempts come too late for them."""
        tiles = tiles_of(header)
        self.attempts[tiles.start : tiles.stop] = [header.attempt] * len(tiles)
        self.pending[header] = rows, view

    def bound(self, num_bytes: int) -> None:
        """Forget the oldest unfinished frames beyond so many: their writers have died. One that has not keeps what it
        writes into, and learns at the end that it was for nothing."""
        while sum(header.payload_bytes for header in self.pending) > num_bytes:
            self.pending.popitem(last=False)


class Lease:
    """From ``FeatureStore.reserve`` to ``release``.

    Args:
        images: by index; equal ones are the same object, also among requests.
        deliveries: by index of the images still to be delivered.
        expires: on ``clock``; no frame is taken later.
        on_change: called with the state that was left, whenever that happens.
    """

    def __init__(
        self,
        request_id: bytes,
        images: Sequence[FeatureImage],
        deliveries: dict[int, Delivery],
        expires: float,
        on_change: Callable[["Lease", LeaseState], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request_id = request_id
        self.images = images
        self.deliveries = deliveries
        self.expires = expires
        self.state = LeaseState.READY if self.is_complete else LeaseState.WRITING
        self._on_change = on_change
        self._clock = clock
        self._progress = asyncio.Event()

    @property
    def missing(self) -> dict[int, bytes]:
        """Ticket of each image that must still be delivered, by image index."""
        return {index: delivery.ticket for index, delivery in self.deliveries.items()}

    @property
    def is_reservation(self) -> bool:
        """Whether it holds feature memory at all."""
        return any(image.num_bytes for image in self.images)

    @property
    def is_complete(self) -> bool:
        return all(image.is_complete for image in self.images)

    @property
    def awaited(self) -> set[int]:
        """Indices of the images that are not complete."""
        return {index for index, image in enumerate(self.images) if not image.is_complete}

    @property
    def tile_tokens(self) -> list[list[int]]:
        """Rows of each tile of each image, as far as they are known: see ``FeatureImage.tile_tokens``."""
        return [image.tile_tokens for image in self.images]

    @property
    def tile_hashes(self) -> list[list[bytes]]:
        """What names the rows of each of these tiles in the prefix cache."""
        return [image.tile_hashes for image in self.images]

    @property
    def num_known_tiles(self) -> list[int | None]:
        """Tiles from the first on that are here without a gap, of each image; None: all."""
        return [None if image.is_complete else len(image.tile_tokens) for image in self.images]

    @property
    def min_num_tokens(self) -> int:
        """Rows that all images will have at least."""
        return sum(image.min_num_tokens for image in self.images)

    async def wait_complete(self, timeout: float) -> None:
        """Wait until every image is here.

        Raises:
            DeadlineExceeded: nothing arrived for ``timeout`` seconds, or the tickets are no longer good; the lease has
                expired.
        """
        while await self.wait_progress(timeout):
            pass

    async def wait_progress(self, timeout: float) -> bool:
        """Wait for the next tiles; False if none are missing. Raises what ``wait_complete`` raises."""
        if self.state is LeaseState.WRITING:
            self._progress.clear()
            try:
                async with asyncio.timeout(max(0.0, min(timeout, self.expires - self._clock()))):
                    await self._progress.wait()
            except TimeoutError:
                self.expire()
        if self.state is LeaseState.EXPIRED:
            raise DeadlineExceeded("the features of an image did not arrive in time")
        return self.state is LeaseState.WRITING

    def on_rows(self) -> None:
        """Tiles of an image became ready."""
        for index, delivery in self.deliveries.items():
            if self.images[index].is_complete:
                delivery.pending.clear()
        if self.state is LeaseState.WRITING and self.is_complete:
            self._enter(LeaseState.READY)
        self._progress.set()

    def expire(self) -> None:
        """Stop waiting for what is missing. Nothing happens in any other state than WRITING."""
        if self.state is LeaseState.WRITING:
            self._end(LeaseState.EXPIRED)

    def release(self) -> None:
        """Give the memory back. Late frames meet a tombstone. Safe to call twice."""
        if self.state is not LeaseState.RELEASED:
            self._end(LeaseState.RELEASED)

    def _end(self, state: LeaseState) -> None:
        """What is being written is not wanted: only its writers hold it from now on."""
        for delivery in self.deliveries.values():
            delivery.pending.clear()
        self._enter(state)
        self._progress.set()

    def _enter(self, state: LeaseState) -> None:
        before, self.state = self.state, state
        self._on_change(self, before)


def tiles_of(header: FrameHeader) -> range:
    """Of the image, those in this frame."""
    return range(header.first_tile, header.first_tile + len(header.tokens_per_tile))
