"""What the failpoint ``vision.deliver`` does to frames (test builds only): a sender that is broken, or a bad wire.

Each kind is sent before the frame itself, and what the receiver says to it counts; so a frame that is refused is not
sent at all, and one that is taken is followed by its duplicate.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from common.service import failpoints
from common.service.errors import ConfigError
from protos.frame import FrameHeader
from protos.seal import pack_frame
from protos.vision_pb2 import EncodeRequest

if TYPE_CHECKING:
    from vision_server.delivery import FrameCourier

_VERSION_AT: Final = 4  # its low byte
_VERSION_TO_COME: Final = 99
_NAN_BYTE: Final = 0xFF  # all bits set is not a number in every width


async def send_first(
    couriers: "FrameCourier", request: EncodeRequest, header: FrameHeader, payload: memoryview, timeout: float
) -> None:
    """Pass the failpoint, and send what it says. Raises what ``FrameCourier.send`` raises."""
    kind = await failpoints.reach("vision.deliver")
    if kind:
        packed, damaged = _damaged(kind, header, payload, request)
        await couriers.send(request.deliver_to, packed, damaged, timeout)


def _damaged(kind: str, header: FrameHeader, payload: memoryview, request: EncodeRequest) -> tuple[bytes, memoryview]:
    """Header and payload as they go out: ``bits``, ``header`` (flipped on the wire), ``version``
    (of a build to come), ``shape``, ``nan`` or ``duplicate``. Raises ConfigError for another kind."""
    if kind == "shape":
        header = replace(header, hidden_size=header.hidden_size // 2)
        payload = payload[: len(payload) // 2]
    if kind == "nan":
        payload = np.full(len(payload), _NAN_BYTE, np.uint8).data
    packed, payload = pack_frame(header, payload, request.ticket, is_sealed=request.seals_features)
    if kind == "header":
        packed = packed[:-1] + bytes([packed[-1] ^ 1])
    if kind == "version":
        packed = packed[:_VERSION_AT] + bytes([_VERSION_TO_COME]) + packed[_VERSION_AT + 1 :]
    if kind == "bits":
        flipped = np.frombuffer(payload, np.uint8).copy()
        flipped[len(flipped) // 2] ^= 1
        payload = flipped.data
    if kind not in ("bits", "header", "version", "shape", "nan", "duplicate"):
        raise ConfigError(f"{failpoints.VARIABLE}: vision.deliver cannot corrupt({kind[:16]})")
    return packed, payload
