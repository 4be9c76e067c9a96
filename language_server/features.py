"""Feature memory of the language server: who may write into it, what has arrived, what the engine may read.

A request reserves the space of all its missing images at once or waits in line, so that two requests never hold half
of what they need. Frames are written into memory of their own, and only a frame that passed every check is linked to
its image: a tile that is ready is never written again, and a late writer writes into memory nobody reads.

Everything but ``num_ready_tokens`` and ``rows`` belongs to the event loop. Those two are called by the engine thread
and read only what is appended in an order that keeps them right: rows first, then the count. The caller releases a
lease only after the engine has let go of its sequences.
"""

import asyncio
import hmac
import secrets
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from typing_extensions import Buffer

from common.service import metrics
from common.service.errors import DeadlineExceeded, InvalidRequest, Overloaded
from language_server.feature_image import FeatureImage, FeatureLayout, ImageKey
from protos.frame import MAX_TILES, FeatureDtypeName, FrameHeader, FrameRejected, is_signed_by

TORCH_DTYPES: Final[Mapping[FeatureDtypeName, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
MAX_TOMBSTONES: Final = 8192
TOMBSTONE_SECONDS: Final = 120.0
MAX_FINITE_SAMPLES: Final = 4096
"""Values of a frame that are looked at for NaN and infinity."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    key: bytes
    expires: float


@dataclass(eq=False, slots=True)
class Lease:
    """One request's hold on feature memory, from ``FeatureStore.reserve`` to ``release``."""

    request_id: bytes
    tickets: dict[int, _Ticket]  # by index of the images still to be delivered
    _images: list[FeatureImage]
    _store: "FeatureStore"
    _progress: asyncio.Event = field(default_factory=asyncio.Event)
    is_released: bool = False

    @property
    def missing(self) -> dict[int, bytes]:
        """Ticket of each image that must still be delivered, by image index."""
        return {index: ticket.key for index, ticket in self.tickets.items()}

    @property
    def is_complete(self) -> bool:
        return all(image.is_complete for image in self._images)

    @property
    def awaited(self) -> set[int]:
        """Indices of the images that are not complete."""
        return {index for index, image in enumerate(self._images) if not image.is_complete}

    @property
    def tile_tokens(self) -> list[list[int]]:
        """Rows of each tile of each image, as far as they are known: see ``FeatureImage.tile_tokens``."""
        return [image.tile_tokens for image in self._images]

    @property
    def rows_hashes(self) -> list[bytes]:
        """What names the rows of each image in the prefix cache."""
        return [image.rows_hash for image in self._images]

    @property
    def min_num_tokens(self) -> int:
        """Rows that all images will have at least."""
        return sum(image.min_num_tokens for image in self._images)

    async def wait_complete(self, timeout: float) -> None:
        """Wait until every image is here.

        Raises:
            DeadlineExceeded: nothing arrived for ``timeout`` seconds.
        """
        while not self.is_complete:
            self._progress.clear()
            try:
                await asyncio.wait_for(self._progress.wait(), timeout)
            except TimeoutError:
                raise DeadlineExceeded("the features of an image did not arrive in time") from None

    def release(self) -> None:
        """Give the memory back. Late frames meet a tombstone. Safe to call twice."""
        self._store.release(self)


@dataclass(eq=False, slots=True)
class _Waiter:
    request_id: bytes
    keys: Sequence[ImageKey]
    expires: float
    granted: asyncio.Future[Lease]


class FeatureStore:
    """Implements ``FrameSink`` (common/transport/base.py) for receivers and ``ImageEmbedsSource`` for the engine.

    Args:
        capacity_bytes: all features held at once, those kept for reuse included.
        max_waiting: requests that may wait for a reservation.
        on_ready: called when tiles became ready.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        layout: FeatureLayout,
        capacity_bytes: int,
        *,
        max_waiting: int = 256,
        on_ready: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self._capacity_bytes = capacity_bytes
        self._max_waiting = max_waiting
        self._on_ready = on_ready
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._leases: dict[bytes, Lease] = {}
        self._waiting: deque[_Waiter] = deque()
        self._tombstones: OrderedDict[bytes, float] = OrderedDict()
        # Complete images by key, least recently used first: in use, or kept while there is room.
        self._resident: OrderedDict[ImageKey, FeatureImage] = OrderedDict()
        self.reserved_bytes = 0  # of images in use
        self.cached_bytes = 0  # of images kept for reuse only
        self.num_awaited = 0  # images in use that are not complete: vision servers work for us

    # --- reservations (event loop)

    @property
    def free_bytes(self) -> int:
        """What a new request could reserve; cached images give way."""
        return self._capacity_bytes - self.reserved_bytes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def reserve(self, request_id: bytes, keys: Sequence[ImageKey], *, timeout: float, lifetime: float) -> Lease:
        """Space for all images that are not resident, all or nothing, first come first served.

        Waits at most ``timeout`` seconds; the tickets are good for ``lifetime`` seconds from now.

        Raises:
            InvalidRequest: more than this server has at all, a size that is no whole number of tiles, or a request id
                that is in use.
            Overloaded: too many requests wait already.
            DeadlineExceeded: no space in time.
        """
        self.check(keys)
        if request_id in self._leases or any(waiter.request_id == request_id for waiter in self._waiting):
            raise InvalidRequest("the request id is in use", param="request_id")
        expires = self._clock() + lifetime
        if not keys or (not self._waiting and self._fits(keys)):  # text never waits behind images
            return self._grant(request_id, keys, expires)
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("too many requests wait for feature memory")
        return await self._wait_in_line(_Waiter(request_id, keys, expires, asyncio.Future()), timeout)

    def check(self, keys: Sequence[ImageKey]) -> None:
        """Raises InvalidRequest for images that can never be held."""
        for index, key in enumerate(keys):
            num_tiles, rest = divmod(key.max_num_tokens, self.layout.tokens_per_tile)
            if num_tiles <= 0 or rest:
                raise InvalidRequest(
                    f"{key.max_num_tokens} tokens are no whole number of tiles", param=f"images[{index}].max_num_tokens"
                )
            if num_tiles > MAX_TILES:
                raise InvalidRequest(
                    f"an image of {num_tiles} tiles; at most {MAX_TILES} can be sent",
                    code="too_many_media_items",
                    param=f"images[{index}].max_num_tokens",
                )
        if self._num_bytes(set(keys)) > self._capacity_bytes:
            raise InvalidRequest(
                "the images need more feature memory than this server has", code="too_many_media_items"
            )

    def release(self, lease: Lease) -> None:
        """End of a request; see ``Lease.release``."""
        if lease.is_released:
            return
        lease.is_released = True
        del self._leases[lease.request_id]
        self._bury(lease.request_id)
        for image in lease._images:
            self._drop_user(image)
        self._grant_waiting()
        self._export_metrics()

    def _num_bytes(self, keys: set[ImageKey]) -> int:
        return sum(key.max_num_tokens for key in keys) * self.layout.row_bytes

    def _fits(self, keys: Sequence[ImageKey]) -> bool:
        """Whether the request's images fit beside those in use, once nothing is kept only for reuse."""
        num_bytes = 0
        for key in set(keys):
            resident = self._resident.get(key)
            if resident is None:
                num_bytes += key.max_num_tokens * self.layout.row_bytes
            elif not resident.num_users:
                num_bytes += resident.num_bytes
        return self.reserved_bytes + num_bytes <= self._capacity_bytes

    def _grant(self, request_id: bytes, keys: Sequence[ImageKey], expires: float) -> Lease:
        images: dict[ImageKey, FeatureImage] = {}
        tickets: dict[int, _Ticket] = {}
        for index, key in enumerate(keys):
            if key not in images:
                images[key] = self._resident.get(key) or FeatureImage(key, self.layout)
                if images[key].is_complete:
                    self._resident.move_to_end(key)
                    metrics.LANGUAGE_FEATURES_REUSED.inc()
                else:
                    tickets[index] = self._sign(request_id, index, images[key].num_bytes, expires)
        lease = Lease(request_id, tickets, [images[key] for key in keys], self)
        for image in lease._images:
            self._add_user(image)
        self._evict()
        self._leases[request_id] = lease
        self._export_metrics()
        return lease

    def _sign(self, request_id: bytes, image_index: int, num_bytes: int, expires: float) -> _Ticket:
        message = request_id + struct.pack("<IQd", image_index, num_bytes, expires)
        return _Ticket(hmac.digest(self._secret, message, "sha256"), expires)

    async def _wait_in_line(self, waiter: _Waiter, timeout: float) -> Lease:
        self._waiting.append(waiter)
        self._export_metrics()
        lease = None
        try:
            async with asyncio.timeout(timeout):
                lease = await waiter.granted
            return lease
        except TimeoutError:
            raise DeadlineExceeded("no feature memory became free in time") from None
        finally:
            if lease is None:
                self._leave_line(waiter)

    def _leave_line(self, waiter: _Waiter) -> None:
        """Of a waiter that gave up: out of the line, or what it was granted in that very moment goes back."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            self._grant_waiting()
            self._export_metrics()
        elif waiter.granted.done() and not waiter.granted.cancelled():
            self.release(waiter.granted.result())

    def _grant_waiting(self) -> None:
        while self._waiting and self._fits(self._waiting[0].keys):
            waiter = self._waiting.popleft()
            if not waiter.granted.cancelled():
                waiter.granted.set_result(self._grant(waiter.request_id, waiter.keys, waiter.expires))

    # --- memory

    def _add_user(self, image: FeatureImage) -> None:
        image.num_users += 1
        if image.num_users == 1:
            self.reserved_bytes += image.num_bytes
            if image.is_complete:
                self.cached_bytes -= image.num_bytes
            else:
                self.num_awaited += 1

    def _drop_user(self, image: FeatureImage) -> None:
        image.num_users -= 1
        if image.num_users:
            return
        self.reserved_bytes -= image.num_bytes
        if not image.is_complete:
            self.num_awaited -= 1
        if self._resident.get(image.key) is image:
            self.cached_bytes += image.num_bytes

    def _evict(self) -> None:
        """Drop cached images, least recently used first, until everything fits."""
        idle = [image for image in self._resident.values() if not image.num_users]
        for image in idle:
            if self.reserved_bytes + self.cached_bytes <= self._capacity_bytes:
                return
            del self._resident[image.key]
            self.cached_bytes -= image.num_bytes

    def _bury(self, request_id: bytes) -> None:
        now = self._clock()
        self._tombstones[request_id] = now + TOMBSTONE_SECONDS
        while self._tombstones:
            oldest, expires = next(iter(self._tombstones.items()))
            if expires > now and len(self._tombstones) <= MAX_TOMBSTONES:
                return
            del self._tombstones[oldest]

    def _export_metrics(self) -> None:
        is_complete = [lease.is_complete for lease in self._leases.values() if lease._images]
        metrics.TRANSFER_RESERVATIONS.labels("ready").set(sum(is_complete))
        metrics.TRANSFER_RESERVATIONS.labels("writing").set(len(is_complete) - sum(is_complete))
        metrics.TRANSFER_RESERVATIONS.labels("waiting").set(len(self._waiting))
        metrics.TRANSFER_POOL_BYTES.labels("reserved").set(self.reserved_bytes)
        metrics.TRANSFER_POOL_BYTES.labels("cached").set(self.cached_bytes)
        metrics.TRANSFER_POOL_BYTES.labels("free").set(self.free_bytes - self.cached_bytes)
        metrics.LANGUAGE_FEATURES_HELD_BYTES.set(self.reserved_bytes)

    # --- FrameSink (event loop)

    def place(self, header: FrameHeader, packed_header: Buffer, memory: Buffer | None = None) -> memoryview:
        """Memory for one frame; see ``FrameSink.place``. Nothing is allocated before the header passed every check."""
        if header.fingerprint != self.layout.fingerprint:
            raise FrameRejected("fingerprint", "features of another checkpoint")
        lease = self._find_lease(header.request_id)
        ticket = lease.tickets.get(header.image_index)
        if ticket is None or not is_signed_by(packed_header, ticket.key) or self._clock() > ticket.expires:
            raise FrameRejected("ticket", f"no valid ticket for image {header.image_index}")
        image = lease._images[header.image_index]
        self._check_attempt(header, image)
        self._check_shape(header, image)
        rows = _make_rows(header, memory)
        view = _bytes_of(rows)
        image.attempt = header.attempt
        image.pending[header] = rows, view
        self._bound_pending(image)
        return view

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        """Check a written frame and make its tiles ready; see ``FrameSink.commit``."""
        lease = self._find_lease(header.request_id)
        image = lease._images[header.image_index]
        rows, view = image.pending.get(header, (None, None))
        if rows is None or view is not memory:
            self._check_attempt(header, image)
            raise FrameRejected("stale", "another writer took its place")
        del image.pending[header]
        if payload_crc32c != header.payload_crc32c:
            raise FrameRejected("checksum", "the payload was damaged on its way")
        if not _is_finite(rows):
            raise FrameRejected("nonfinite", "NaN or infinity among the features")
        image.link(header.first_tile, torch.split(rows, list(header.tokens_per_tile)))
        if image.is_complete:
            self._settle(image)
        lease._progress.set()
        self._export_metrics()
        self._on_ready()

    def _find_lease(self, request_id: bytes) -> Lease:
        lease = self._leases.get(request_id)
        if lease is None:
            reason = "tombstone" if request_id in self._tombstones else "unknown_request"
            raise FrameRejected(reason, "no such request")
        return lease

    def _check_attempt(self, header: FrameHeader, image: FeatureImage) -> None:
        tiles = range(header.first_tile, header.first_tile + len(header.tokens_per_tile))
        if header.num_image_tiles != image.num_tiles:
            raise FrameRejected("shape", f"{header.num_image_tiles} tiles, expected {image.num_tiles}")
        if all(image.is_ready(tile) for tile in tiles):
            raise FrameRejected("duplicate", "these tiles are ready")
        if header.attempt < image.attempt:
            raise FrameRejected("stale", f"attempt {header.attempt} after {image.attempt}")

    def _check_shape(self, header: FrameHeader, image: FeatureImage) -> None:
        layout = self.layout
        if header.dtype != layout.dtype:
            raise FrameRejected("dtype", f"{header.dtype}, expected {layout.dtype}")
        if header.hidden_size != layout.hidden_size:
            raise FrameRejected("shape", f"hidden size {header.hidden_size}, expected {layout.hidden_size}")
        if not set(header.tokens_per_tile) <= set(layout.tile_sizes):
            raise FrameRejected("shape", f"tiles of {header.tokens_per_tile[:4]} tokens, expected {layout.tile_sizes}")
        if header.payload_bytes > image.num_bytes:
            raise FrameRejected("size", f"{header.payload_bytes} bytes, {image.num_bytes} reserved")

    def _bound_pending(self, image: FeatureImage) -> None:
        """Forget the oldest unfinished frames of an image beyond twice its reservation: their writers have died."""
        while sum(header.payload_bytes for header in image.pending) > 2 * image.num_bytes:
            image.pending.popitem(last=False)

    def _settle(self, image: FeatureImage) -> None:
        """A complete image takes its true size and can serve other requests."""
        image.pending.clear()
        self.num_awaited -= 1
        true_bytes = image.num_ready_tokens * self.layout.row_bytes
        self.reserved_bytes -= image.num_bytes - true_bytes
        image.num_bytes = true_bytes
        self._resident.setdefault(image.key, image)
        self._grant_waiting()

    # --- ImageEmbedsSource (engine thread)

    def num_ready_tokens(self, request_id: bytes, image_index: int) -> int:
        """Rows of an image that are here without a gap from the first on."""
        return self._leases[request_id]._images[image_index].num_ready_tokens

    def rows(self, request_id: bytes, image_index: int, start: int, stop: int) -> torch.Tensor:
        """Ready rows ``[stop - start, hidden]`` of an image, in wire dtype."""
        return self._leases[request_id]._images[image_index].rows(start, stop)


def _make_rows(header: FrameHeader, memory: Buffer | None) -> torch.Tensor:
    """``[tokens, hidden]``, in ``memory`` where that is given."""
    dtype = TORCH_DTYPES[header.dtype]
    if memory is None:
        return torch.empty(header.num_tokens, header.hidden_size, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(header.num_tokens, header.hidden_size)


def _bytes_of(rows: torch.Tensor) -> memoryview:
    """The memory of a tensor on the host, writable."""
    return rows.view(torch.uint8).numpy().data.cast("B")


def _is_finite(rows: torch.Tensor) -> bool:
    """Whether an even sample of the values is finite; a broken batch is broken everywhere."""
    values = rows.flatten()
    step = max(1, len(values) // MAX_FINITE_SAMPLES)
    return bool(values[::step].isfinite().all())
