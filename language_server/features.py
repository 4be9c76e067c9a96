"""Feature memory of the language server: who may write into it, what has arrived, what the engine may read.

A request reserves the space of all its missing images at once or waits in line, so that two requests never hold half
of what they need. Frames are written into memory of their own, and only a frame that passed every check is linked to
its image: a tile that is ready is never written again, and a late writer writes into memory nobody reads.

Requests for one image share its space while it is on its way, and whatever comes for one of them serves all. Each has
a ticket of its own, because the others may be cancelled, and the encoding that was asked for in their name with them.

Everything but ``num_ready_tokens`` and ``rows`` belongs to the event loop. Those two are called by the engine thread
and read only what is appended in an order that keeps them right: rows first, then the count. The caller releases a
lease only after the engine has let go of its sequences.
"""

import asyncio
import hmac
import secrets
import struct
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from typing_extensions import Buffer

from common.service import metrics
from common.service.errors import DeadlineExceeded, InvalidRequest, Overloaded
from common.transport.base import Lend
from language_server.feature_image import ComputedImage, FeatureImage, FeatureLayout, ImageKey
from language_server.reservation import Delivery, Lease, LeaseState, tiles_of
from protos.frame import MAX_TILES, FeatureDtypeName, FrameHeader, FrameRejected, is_signed_by
from protos.seal import open_payload

TORCH_DTYPES: Final[Mapping[FeatureDtypeName, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
MAX_TOMBSTONES: Final = 8192
TOMBSTONE_SECONDS: Final = 120.0
MAX_REMEMBERED_SIZES: Final = 8192
"""Images of which it is known what became of their tiles, after they themselves were dropped."""
NOTHING_COMPUTED: Final[Mapping[int, Sequence[int]]] = {}
MAX_FINITE_SAMPLES: Final = 4096
"""Values of a frame that are looked at for NaN and infinity."""


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
        seals_features: whether only sealed frames are taken.
        max_waiting: requests that may wait for a reservation.
        on_ready: called when tiles became ready.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        layout: FeatureLayout,
        capacity_bytes: int,
        *,
        seals_features: bool = False,
        max_waiting: int = 256,
        on_ready: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.seals_features = seals_features
        self._capacity_bytes = capacity_bytes
        self._max_waiting = max_waiting
        self._on_ready = on_ready
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._leases: dict[bytes, Lease] = {}
        self._waiting: deque[_Waiter] = deque()
        self._tombstones: OrderedDict[bytes, float] = OrderedDict()
        # In use, or complete and kept while there is room; least recently used first.
        self._images: OrderedDict[ImageKey, FeatureImage] = OrderedDict()
        self._sizes: OrderedDict[ImageKey, Sequence[int]] = OrderedDict()  # where tiles can have several
        self._num_leases: Counter[LeaseState] = Counter()  # of those that have reserved anything
        self.reserved_bytes = 0  # of images in use
        self.cached_bytes = 0  # of images kept for reuse only
        self.num_awaited = 0  # images in use that are not complete: vision servers work for us
        self._export_metrics()

    # --- reservations (event loop)

    @property
    def free_bytes(self) -> int:
        """What a new request could reserve; cached images give way."""
        return self._capacity_bytes - self.reserved_bytes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has(self, key: ImageKey) -> bool:
        """Whether the image is here, complete."""
        image = self._images.get(key)
        return image is not None and image.is_complete

    def known_tiles(self, key: ImageKey) -> Sequence[int] | None:
        """Rows of each tile, where that is known without the image: always, or of images that were here before."""
        if self.layout.is_flash:
            return self._sizes.get(key)
        return [self.layout.tokens_per_tile] * self.layout.num_tiles(key.max_num_tokens)

    def try_reserve(
        self,
        request_id: bytes,
        keys: Sequence[ImageKey],
        *,
        lifetime: float,
        computed: Mapping[int, Sequence[int]] = NOTHING_COMPUTED,
    ) -> Lease | None:
        """Space for all images that are not resident, if no request waits for any; None: it has to wait in line.

        Args:
            lifetime: seconds from now for which the tickets are good.
            computed: rows of each tile of the images, by index, that need no space because their KV is held.

        Raises:
            InvalidRequest: see ``reserve``.
        """
        self._check_new(request_id, keys)
        needed = [key for index, key in enumerate(keys) if index not in computed]
        if needed and (self._waiting or not self._fits(needed)):  # text never waits behind images
            return None
        return self._grant(request_id, keys, self._clock() + lifetime, computed)

    async def reserve(self, request_id: bytes, keys: Sequence[ImageKey], *, timeout: float, lifetime: float) -> Lease:
        """Space for all images that are not resident, all or nothing, first come first served.

        Waits at most ``timeout`` seconds; the tickets are good for ``lifetime`` seconds from now.

        Raises:
            InvalidRequest: more than this server has at all, a size that is no whole number of tiles, or a request id
                that is in use.
            Overloaded: too many requests wait already.
            DeadlineExceeded: no space in time.
        """
        if (lease := self.try_reserve(request_id, keys, lifetime=lifetime)) is not None:
            return lease
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("too many requests wait for feature memory")
        expires = self._clock() + lifetime
        return await self._wait_in_line(_Waiter(request_id, keys, expires, asyncio.Future()), timeout)

    def _check_new(self, request_id: bytes, keys: Sequence[ImageKey]) -> None:
        self.check(keys)
        if request_id in self._leases or any(waiter.request_id == request_id for waiter in self._waiting):
            raise InvalidRequest("the request id is in use", param="request_id")

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

    def _num_bytes(self, keys: set[ImageKey]) -> int:
        return sum(key.max_num_tokens for key in keys) * self.layout.row_bytes

    def _fits(self, keys: Sequence[ImageKey]) -> bool:
        """Whether the request's images fit beside those in use, once nothing is kept only for reuse."""
        num_bytes = 0
        for key in set(keys):
            image = self._images.get(key)
            if image is None:
                num_bytes += key.max_num_tokens * self.layout.row_bytes
            elif not image.users:
                num_bytes += image.num_bytes
        return self.reserved_bytes + num_bytes <= self._capacity_bytes

    def _grant(
        self,
        request_id: bytes,
        keys: Sequence[ImageKey],
        expires: float,
        computed: Mapping[int, Sequence[int]] = NOTHING_COMPUTED,
    ) -> Lease:
        images: list[FeatureImage] = []
        deliveries: dict[int, Delivery] = {}
        for index, key in enumerate(keys):
            if index in computed:
                images.append(ComputedImage(key, self.layout, computed[index]))
                metrics.LANGUAGE_FEATURES_REUSED.labels("kv").inc()
                continue
            is_new = self._images.get(key) not in images
            if key not in self._images:
                self._images[key] = FeatureImage(key, self.layout)
            image = self._images[key]
            images.append(image)
            if is_new and image.is_complete:
                self._images.move_to_end(key)
                metrics.LANGUAGE_FEATURES_REUSED.labels("features").inc()
            elif is_new:
                ticket = self._sign(request_id, index, image.num_bytes, expires)
                deliveries[index] = Delivery(ticket, [0] * image.num_tiles)
        lease = Lease(request_id, images, deliveries, expires, self._on_lease_change, self._clock)
        for image in set(images):
            self._add_user(image, lease)
        self._evict()
        self._leases[request_id] = lease
        self._num_leases[lease.state] += lease.is_reservation
        self._export_metrics()
        return lease

    def _sign(self, request_id: bytes, image_index: int, num_bytes: int, expires: float) -> bytes:
        message = request_id + struct.pack("<IQd", image_index, num_bytes, expires)
        return hmac.digest(self._secret, message, "sha256")

    def _on_lease_change(self, lease: Lease, before: LeaseState) -> None:
        self._num_leases[before] -= lease.is_reservation
        self._num_leases[lease.state] += lease.is_reservation
        if lease.state is LeaseState.EXPIRED:
            metrics.TRANSFER_RESERVATIONS_EXPIRED.inc()
        elif lease.state is LeaseState.RELEASED:
            self._take_back(lease)
        self._export_metrics()

    def _take_back(self, lease: Lease) -> None:
        del self._leases[lease.request_id]
        self._bury(lease.request_id)
        for image in set(lease.images):
            self._drop_user(image, lease)
        self._grant_waiting()

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
            waiter.granted.result().release()

    def _grant_waiting(self) -> None:
        while self._waiting and self._fits(self._waiting[0].keys):
            waiter = self._waiting.popleft()
            if not waiter.granted.cancelled():
                waiter.granted.set_result(self._grant(waiter.request_id, waiter.keys, waiter.expires))

    # --- memory

    def _add_user(self, image: FeatureImage, lease: Lease) -> None:
        if not image.users:
            self.reserved_bytes += image.num_bytes
            if image.is_complete:
                self.cached_bytes -= image.num_bytes
            else:
                self.num_awaited += 1
        image.users.add(lease)

    def _drop_user(self, image: FeatureImage, lease: Lease) -> None:
        image.users.remove(lease)
        if image.users:
            return
        self.reserved_bytes -= image.num_bytes
        if image.is_complete:
            self.cached_bytes += image.num_bytes
        else:
            self.num_awaited -= 1
            del self._images[image.key]

    def _evict(self) -> None:
        """Drop cached images, least recently used first, until everything fits."""
        if self.reserved_bytes + self.cached_bytes <= self._capacity_bytes:
            return
        for image in [image for image in self._images.values() if not image.users]:
            if self.reserved_bytes + self.cached_bytes <= self._capacity_bytes:
                return
            del self._images[image.key]
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
        metrics.TRANSFER_RESERVATIONS.labels("waiting").set(len(self._waiting))
        for state in (LeaseState.WRITING, LeaseState.READY, LeaseState.EXPIRED):
            metrics.TRANSFER_RESERVATIONS.labels(state.value).set(self._num_leases[state])
        metrics.TRANSFER_POOL_BYTES.labels("reserved").set(self.reserved_bytes)
        metrics.TRANSFER_POOL_BYTES.labels("cached").set(self.cached_bytes)
        metrics.TRANSFER_POOL_BYTES.labels("free").set(self.free_bytes - self.cached_bytes)
        metrics.LANGUAGE_FEATURES_HELD_BYTES.set(self.reserved_bytes)

    # --- FrameSink (event loop)

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        """Memory for one frame; see ``FrameSink.place``. Nothing is allocated before the header passed every check."""
        if header.fingerprint != self.layout.fingerprint:
            raise FrameRejected("fingerprint", "features of another checkpoint")
        lease = self._find_lease(header.request_id)
        image, delivery = _find_delivery(lease, header)
        if not is_signed_by(packed_header, delivery.ticket) or self._clock() > lease.expires:
            raise FrameRejected("ticket", f"no valid ticket for image {header.image_index}")
        if self.seals_features and header.seal is None:
            raise FrameRejected("unsealed", "features travel sealed or not at all")
        self._check_attempt(header, image, delivery)
        self._check_shape(header, image)
        rows = _make_rows(header, None if lend is None else lend())
        view = _bytes_of(rows)
        delivery.begin(header, rows, view)
        delivery.bound(2 * image.num_bytes)
        return view

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        """Check a written frame and make its tiles ready; see ``FrameSink.commit``."""
        lease = self._find_lease(header.request_id)
        image, delivery = _find_delivery(lease, header)
        rows, view = delivery.pending.get(header, (None, None))
        if rows is None or view is not memory:
            self._check_attempt(header, image, delivery)
            raise FrameRejected("stale", "another writer took its place")
        del delivery.pending[header]
        _check_wanted(header, image)
        if header.seal is not None:
            open_payload(header, memory, delivery.ticket)
        elif payload_crc32c != header.payload_crc32c:
            raise FrameRejected("checksum", "the payload was damaged on its way")
        if not _is_finite(rows):
            raise FrameRejected("nonfinite", "NaN or infinity among the features")
        was_complete = image.is_complete
        image.link(header.first_tile, torch.split(rows, list(header.tokens_per_tile)))
        if image.is_complete and not was_complete:
            self._settle(image)
        for user in image.users:
            user.on_rows()
        self._grant_waiting()
        self._export_metrics()
        self._on_ready()

    def _find_lease(self, request_id: bytes) -> Lease:
        lease = self._leases.get(request_id)
        if lease is None:
            reason = "tombstone" if request_id in self._tombstones else "unknown_request"
            raise FrameRejected(reason, "no such request")
        if lease.state is LeaseState.EXPIRED:
            raise FrameRejected("tombstone", "the request waits no longer")
        return lease

    def _check_attempt(self, header: FrameHeader, image: FeatureImage, delivery: Delivery) -> None:
        tiles = tiles_of(header)
        if header.num_image_tiles != image.num_tiles:
            raise FrameRejected("shape", f"{header.num_image_tiles} tiles, expected {image.num_tiles}")
        _check_wanted(header, image)
        if header.attempt < (highest := delivery.highest_attempt(tiles)):
            raise FrameRejected("stale", f"attempt {header.attempt} after {highest}")

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

    def _settle(self, image: FeatureImage) -> None:
        """A complete image takes its true size."""
        self.num_awaited -= 1
        true_bytes = image.num_ready_tokens * self.layout.row_bytes
        self.reserved_bytes -= image.num_bytes - true_bytes
        image.num_bytes = true_bytes
        self._images.move_to_end(image.key)
        if self.layout.is_flash:
            self._sizes[image.key] = image.tile_tokens
            self._sizes.move_to_end(image.key)
            if len(self._sizes) > MAX_REMEMBERED_SIZES:
                self._sizes.popitem(last=False)

    # --- ImageEmbedsSource (engine thread)

    def num_ready_tokens(self, request_id: bytes, image_index: int) -> int:
        """Rows of an image that are here without a gap from the first on."""
        return self._leases[request_id].images[image_index].num_ready_tokens

    def rows(self, request_id: bytes, image_index: int, start: int, stop: int) -> torch.Tensor:
        """Ready rows ``[stop - start, hidden]`` of an image, in wire dtype."""
        return self._leases[request_id].images[image_index].rows(start, stop)


def _find_delivery(lease: Lease, header: FrameHeader) -> tuple[FeatureImage, Delivery]:
    delivery = lease.deliveries.get(header.image_index)
    if delivery is None:
        raise FrameRejected("ticket", f"image {header.image_index} was not asked for")
    return lease.images[header.image_index], delivery


def _check_wanted(header: FrameHeader, image: FeatureImage) -> None:
    if all(image.is_ready(tile) for tile in tiles_of(header)):
        raise FrameRejected("duplicate", "these tiles are ready")


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
