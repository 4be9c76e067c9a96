"""Encoded groups -> signed frames -> the language server that waits for them. Only what must be sealed is copied.

Knows nothing of images or devices.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from typing_extensions import Buffer

from common.service import failpoints
from common.service.errors import Cancelled, DvdError, InternalError, TransportFailed
from protos.frame import MAX_TILES, FeatureDtypeName, FrameHeader, FrameRejected
from protos.seal import pack_frame
from protos.status_pb2 import Endpoint
from protos.vision_pb2 import EncodeRequest
from vision_server import damage
from vision_server.device_jobs import EncodedGroup

_FRAME_BYTES: Final = 4 * 2**20
"""Aim for the payload of one frame: small enough to overlap with prefill, large enough that headers cost nothing."""
_MAX_SENDS: Final = 4
"""Of a frame that is damaged on its way: cheaper than encoding its image again elsewhere."""
_MAX_SEALED: Final = 8
"""Sealed frames of one image that are on their way at once: each is a copy in memory, and time of the loop to make."""
_DAMAGED: Final = {"checksum", "seal"}
_ENDED_AT_RECEIVER: Final = {"tombstone", "unknown_request", "stale"}


class FrameCourier(Protocol):
    """What delivery needs of ``common.transport.select.SenderPool``."""

    async def send(self, endpoints: Sequence[Endpoint], packed_header: bytes, payload: Buffer, timeout: float) -> str:
        """Deliver one frame by the first way that works; returns the transport used."""
        ...


@dataclass(slots=True)
class Sending:
    """The frames of one group on their way, in ``time.monotonic`` seconds."""

    started: float = field(default_factory=time.monotonic)
    acknowledged: float = 0.0  # the last frame so far


@dataclass(slots=True)
class Delivered:
    """What has been handed out so far."""

    tokens_per_tile: list[int] = field(default_factory=list)
    num_bytes: int = 0
    transport: str = ""
    sendings: list[Sending] = field(default_factory=list)  # one for each group


class Delivery:
    """Sends frames.

    Args:
        couriers: delivers frames; not owned.
        fingerprint: of the checkpoint, carried by every frame.
    """

    def __init__(self, couriers: FrameCourier, fingerprint: bytes) -> None:
        self._couriers = couriers
        self._fingerprint = fingerprint

    async def deliver(
        self, request: EncodeRequest, dtype: FeatureDtypeName, groups: AsyncIterator[EncodedGroup], deadline: float
    ) -> Delivered:
        """Send each group the moment it is there; returns once every frame is acknowledged.

        Args:
            deadline: on the monotonic clock; a frame gets what is left when it is there.

        Raises:
            Cancelled: the language server no longer waits.
            TransportFailed: no way to it works.
            InternalError: it refused a frame.
            DvdError: what ``groups`` raised.
        """
        delivered = Delivered()
        room = asyncio.Semaphore(_MAX_SEALED if request.seals_features else MAX_TILES)
        sends: list[asyncio.Task[str]] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                async for group in groups:
                    delivered.tokens_per_tile += group.tokens_per_tile
                    delivered.num_bytes += group.num_bytes
                    delivered.sendings.append(sending := Sending())
                    for header, payload in self._frames(request, dtype, group):
                        sends.append(tasks.create_task(self._send(request, header, payload, deadline, room, sending)))
        except ExceptionGroup as failures:
            ours = failures.subgroup(DvdError) or failures  # what failed first tells why, not what failed with it
            raise ours.exceptions[0] from None
        delivered.transport = sends[-1].result()
        return delivered

    async def _send(
        self,
        request: EncodeRequest,
        header: FrameHeader,
        payload: memoryview,
        deadline: float,
        room: asyncio.Semaphore,
        sending: Sending,
    ) -> str:
        async with room:
            transport = await self._send_now(request, header, payload, deadline)
        sending.acknowledged = time.monotonic()
        return transport

    async def _send_now(self, request: EncodeRequest, header: FrameHeader, payload: memoryview, deadline: float) -> str:
        packed, packed_payload = pack_frame(header, payload, request.ticket, is_sealed=request.seals_features)
        for attempts_left in reversed(range(_MAX_SENDS)):
            timeout = max(0.0, deadline - time.monotonic())
            try:
                if failpoints.ARE_ON:
                    await damage.send_first(self._couriers, request, header, payload, timeout)
                return await self._couriers.send(request.deliver_to, packed, packed_payload, timeout)
            except FrameRejected as rejection:
                if rejection.reason not in _DAMAGED or not attempts_left:
                    raise _refused(rejection.reason) from None
        raise AssertionError("the last attempt returns or raises")

    def _frames(
        self, request: EncodeRequest, dtype: FeatureDtypeName, group: EncodedGroup
    ) -> Iterator[tuple[FrameHeader, memoryview]]:
        """Cut a group between tiles into frames of some 4 MiB. Payloads are views, nothing is copied."""
        hidden_size = group.features.shape[-1]
        first_tile = group.first_tile
        first_row = 0
        for tokens in _cut(group.tokens_per_tile, _FRAME_BYTES // (hidden_size * group.features.itemsize)):
            header = FrameHeader(
                fingerprint=self._fingerprint,
                request_id=request.request_id,
                image_index=request.image_index,
                attempt=request.attempt,
                first_tile=first_tile,
                num_image_tiles=group.num_image_tiles,
                hidden_size=hidden_size,
                dtype=dtype,
                tokens_per_tile=tokens,
                payload_crc32c=0,
            )
            yield header, bytes_of(group.features[first_row : first_row + sum(tokens)])
            first_tile += len(tokens)
            first_row += sum(tokens)


def _cut(tokens_per_tile: Sequence[int], max_tokens: int) -> Iterator[tuple[int, ...]]:
    """Neighbouring tiles together, as long as they have at most ``max_tokens``; at least one."""
    part: list[int] = []
    for tokens in tokens_per_tile:
        if part and sum(part) + tokens > max_tokens:
            yield tuple(part)
            part = []
        part.append(tokens)
    yield tuple(part)


def bytes_of(features: torch.Tensor) -> memoryview:
    """The features as they lie in memory; numpy knows no bfloat16, so the view goes through bytes."""
    return features.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _refused(reason: str) -> DvdError:
    """What a refusal by the language server means to the caller of ``Encode``."""
    if reason in _ENDED_AT_RECEIVER:
        return Cancelled("the language server no longer waits for this image")
    if reason in _DAMAGED:
        return TransportFailed("features were damaged on their way")
    return InternalError(f"the language server refused the features: {reason[:64]}")
