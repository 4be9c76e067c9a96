"""Feature frame <-> bytes: one group of tiles of one image on its way from a vision server to a language server.

A frame is a little-endian header followed by raw row-major ``[tokens, hidden_size]`` features. Layout of the header:

    ======  ====  =====================================================
    offset  size  field
    ======  ====  =====================================================
    0       4     magic ``DVDF``
    4       2     version: 1 in clear, 2 sealed
    6       2     header length in bytes, tile list, seal and MAC included
    8       16    model fingerprint
    24      16    request id
    40      4     image index in the request
    44      2     attempt
    46      2     first tile of this frame
    48      2     number of tiles in this frame
    50      2     number of tiles of the whole image, thumbnail included
    52      4     hidden size
    56      1     dtype: 1 bfloat16, 2 float32
    57      3     zero
    60      8     payload bytes
    68      4     CRC32C of the payload; 0 if sealed: the tag says more
    72      2 n   tokens of each tile in this frame
    72+2n   28    only if sealed (``seal.py``): nonce 12, tag 16
    then    32    HMAC-SHA256 over all bytes before it, keyed by the ticket
    ======  ====  =====================================================

Knows nothing of sockets, reservations, tensors or ciphers. Nothing here allocates by a size read from the wire.
"""

import hmac
import struct
from dataclasses import dataclass, replace
from typing import Final, Literal

from awscrt.checksums import crc32c
from typing_extensions import Buffer

MAGIC: Final = b"DVDF"
VERSION: Final = 1
SEALED_VERSION: Final = 2
"""Of a frame that nobody on its way can read: a peer that cannot open it refuses it by its version."""
ID_BYTES: Final = 16
MAC_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
MAX_TILES: Final = 256
"""Tiles in one image, far above the 41 of a 4K image; bounds the header."""

FeatureDtypeName = Literal["bfloat16", "float32"]
ITEM_SIZE: Final[dict[FeatureDtypeName, int]] = {"bfloat16": 2, "float32": 4}

_FIXED = struct.Struct("<4sHH16s16sIHHHHIB3sQI")
_DTYPE_TO_CODE: Final[dict[FeatureDtypeName, int]] = {"bfloat16": 1, "float32": 2}
_CODE_TO_DTYPE: Final = {code: name for name, code in _DTYPE_TO_CODE.items()}

MIN_HEADER_BYTES: Final = _FIXED.size + 2 + MAC_BYTES
MAX_HEADER_BYTES: Final = _FIXED.size + 2 * MAX_TILES + NONCE_BYTES + TAG_BYTES + MAC_BYTES


class FrameRejected(ValueError):
    """A frame that must not reach the model. ``reason`` is a label of ``dvd_transfer_frames_rejected_total``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Seal:
    """What opens a sealed payload, beside the ticket; see ``seal.py``."""

    nonce: bytes
    tag: bytes


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says about its payload ``[sum(tokens_per_tile), hidden_size]``."""

    fingerprint: bytes
    request_id: bytes
    image_index: int
    attempt: int
    first_tile: int
    num_image_tiles: int
    hidden_size: int
    dtype: FeatureDtypeName
    tokens_per_tile: tuple[int, ...]
    payload_crc32c: int
    seal: Seal | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_per_tile)

    @property
    def payload_bytes(self) -> int:
        return self.num_tokens * self.hidden_size * ITEM_SIZE[self.dtype]


def checksum(payload: Buffer, before: int = 0) -> int:
    """CRC32C of the payload, as the header carries it; ``before``: that of what comes before this piece of it."""
    return int(crc32c(payload, before))


def with_checksum(header: FrameHeader, payload: Buffer) -> FrameHeader:
    """The same header, carrying the checksum of ``payload``."""
    return replace(header, payload_crc32c=checksum(payload))


def pack_header(header: FrameHeader, ticket: bytes) -> bytes:
    """Serialise and sign a header. ``ticket`` is the 32-byte key from ``Admitted``.

    Raises:
        ValueError: an id or a seal of another length; padded or cut it would be that of something else.
        struct.error: a number that its field cannot hold.
    """
    signed = describe(header)
    if header.seal is not None:
        if len(header.seal.nonce) != NONCE_BYTES or len(header.seal.tag) != TAG_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes, a tag {TAG_BYTES}")
        signed += header.seal.nonce + header.seal.tag
    return signed + hmac.digest(ticket, signed, "sha256")


def describe(header: FrameHeader) -> bytes:
    """What a packed header begins with: all of it up to the seal, which is made for exactly these bytes.

    Raises:
        ValueError, struct.error: see ``pack_header``.
    """
    if len(header.fingerprint) != ID_BYTES or len(header.request_id) != ID_BYTES:
        raise ValueError(f"fingerprint and request id have {ID_BYTES} bytes")
    num_tiles = len(header.tokens_per_tile)
    fixed = _FIXED.pack(
        MAGIC,
        VERSION if header.seal is None else SEALED_VERSION,
        _header_bytes(num_tiles, header.seal is not None),
        header.fingerprint,
        header.request_id,
        header.image_index,
        header.attempt,
        header.first_tile,
        num_tiles,
        header.num_image_tiles,
        header.hidden_size,
        _DTYPE_TO_CODE[header.dtype],
        bytes(3),
        header.payload_bytes,
        header.payload_crc32c,
    )
    return fixed + struct.pack(f"<{num_tiles}H", *header.tokens_per_tile)


def parse_header(data: Buffer) -> FrameHeader:
    """Read a header and check everything that needs no knowledge of the receiver.

    Raises:
        FrameRejected: with reason ``size``, ``magic``, ``version``, ``dtype`` or ``shape``.
    """
    view = memoryview(data).cast("B")
    if not MIN_HEADER_BYTES <= len(view) <= MAX_HEADER_BYTES:
        raise FrameRejected("size", f"header of {len(view)} bytes")
    (
        magic, version, header_bytes, fingerprint, request_id, image_index, attempt, first_tile,
        num_tiles, num_image_tiles, hidden_size, dtype_code, padding, payload_bytes, payload_crc32c,
    ) = _FIXED.unpack_from(view)  # fmt: skip
    if magic != MAGIC:
        raise FrameRejected("magic", repr(magic))
    if version not in (VERSION, SEALED_VERSION):
        raise FrameRejected("version", f"{version}, this side speaks {VERSION} and {SEALED_VERSION}")
    is_sealed = version == SEALED_VERSION
    if header_bytes != len(view) or header_bytes != _header_bytes(num_tiles, is_sealed):
        raise FrameRejected("size", f"header says {header_bytes} bytes, {num_tiles} tiles, has {len(view)} bytes")
    if dtype_code not in _CODE_TO_DTYPE or padding != bytes(3):
        raise FrameRejected("dtype", f"code {dtype_code}")
    if num_tiles == 0 or first_tile + num_tiles > num_image_tiles or num_image_tiles > MAX_TILES:
        raise FrameRejected("shape", f"tiles {first_tile}+{num_tiles} of {num_image_tiles}")
    header = FrameHeader(
        fingerprint=fingerprint,
        request_id=request_id,
        image_index=image_index,
        attempt=attempt,
        first_tile=first_tile,
        num_image_tiles=num_image_tiles,
        hidden_size=hidden_size,
        dtype=_CODE_TO_DTYPE[dtype_code],
        tokens_per_tile=struct.unpack_from(f"<{num_tiles}H", view, _FIXED.size),
        payload_crc32c=payload_crc32c,
        seal=_parse_seal(view[_FIXED.size + 2 * num_tiles : -MAC_BYTES]) if is_sealed else None,
    )
    if 0 in header.tokens_per_tile or hidden_size == 0:
        raise FrameRejected("shape", "a tile without tokens or a hidden size of zero")
    if header.payload_bytes != payload_bytes:
        raise FrameRejected("size", f"payload of {payload_bytes} bytes, shape needs {header.payload_bytes}")
    return header


def _header_bytes(num_tiles: int, is_sealed: bool) -> int:
    return _FIXED.size + 2 * num_tiles + (NONCE_BYTES + TAG_BYTES if is_sealed else 0) + MAC_BYTES


def _parse_seal(view: memoryview) -> Seal:
    return Seal(bytes(view[:NONCE_BYTES]), bytes(view[NONCE_BYTES:]))


def is_signed_by(data: Buffer, ticket: bytes) -> bool:
    """Whether the MAC at the end of a packed header was made with ``ticket`` (constant time)."""
    view = memoryview(data).cast("B")
    return hmac.compare_digest(hmac.digest(ticket, view[:-MAC_BYTES], "sha256"), view[-MAC_BYTES:])
