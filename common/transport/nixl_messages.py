"""What the two ends of a connection over NIXL say to each other, as bodies of ``records``. All of it is little-endian.

HELLO    sender    magic ``DVDNIXL1``, address and size of the memory it exposes, metadata of its agent
WELCOME  receiver  nothing
FRAME    sender    number, offset in the exposed memory, payload bytes, packed frame header
VERDICT  receiver  number of the frame, ``ok`` or the reason of a rejection
"""

import struct
from dataclasses import dataclass
from typing import Any, Final

from common.transport.records import Kind, Malformed
from protos.frame import MAX_HEADER_BYTES

_MAGIC: Final = b"DVDNIXL1"
_HELLO: Final = struct.Struct("<8sQQ")
_FRAME: Final = struct.Struct("<QQQ")
_VERDICT: Final = struct.Struct("<Q")
_MAX_VERDICT_BYTES: Final = 32
_MAX_METADATA_BYTES: Final = 64 * 2**10
"""Some 300 bytes over TCP, a few KiB with several RDMA devices."""

FROM_SENDER: Final = {Kind.HELLO: _HELLO.size + _MAX_METADATA_BYTES, Kind.FRAME: _FRAME.size + MAX_HEADER_BYTES}
FROM_RECEIVER: Final = {Kind.WELCOME: 0, Kind.VERDICT: _VERDICT.size + _MAX_VERDICT_BYTES}
"""The records that each end sends, with their longest bodies in bytes."""


@dataclass(frozen=True, slots=True)
class Hello:
    """``parse`` raises Malformed for what no sender of ours says."""

    address: int
    num_bytes: int
    metadata: bytes

    def pack(self) -> bytes:
        return _HELLO.pack(_MAGIC, self.address, self.num_bytes) + self.metadata

    @classmethod
    def parse(cls, body: bytes) -> "Hello":
        magic, address, num_bytes = _unpack(_HELLO, body)
        if magic != _MAGIC:
            raise Malformed("not a sender of ours")
        return cls(address, num_bytes, body[_HELLO.size :])


@dataclass(frozen=True, slots=True)
class Frame:
    """``parse`` raises Malformed for what no sender of ours says."""

    number: int
    offset: int
    payload_bytes: int
    packed_header: bytes

    def pack(self) -> bytes:
        return _FRAME.pack(self.number, self.offset, self.payload_bytes) + self.packed_header

    @classmethod
    def parse(cls, body: bytes) -> "Frame":
        number, offset, payload_bytes = _unpack(_FRAME, body)
        return cls(number, offset, payload_bytes, body[_FRAME.size :])


def pack_verdict(number: int, verdict: str) -> bytes:
    return _VERDICT.pack(number) + verdict.encode()[:_MAX_VERDICT_BYTES]


def parse_verdict(body: bytes) -> tuple[int, str]:
    """Number and verdict. Raises Malformed."""
    (number,) = _unpack(_VERDICT, body)
    return number, body[_VERDICT.size :].decode("ascii", "replace")


def _unpack(layout: struct.Struct, body: bytes) -> tuple[Any, ...]:
    if len(body) < layout.size:
        raise Malformed(f"a record of {len(body)} bytes where {layout.size} are due")
    return layout.unpack_from(body)
