"""Feature frames: what is packed is read back, what is not a frame is a ``FrameRejected``, whatever the bytes."""

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protos.frame import (
    ITEM_SIZE,
    MAC_BYTES,
    MAX_HEADER_BYTES,
    MAX_TILES,
    MIN_HEADER_BYTES,
    SEALED_VERSION,
    FrameHeader,
    FrameRejected,
    Seal,
    checksum,
    describe,
    is_signed_by,
    pack_header,
    parse_header,
    with_checksum,
)

TICKET = b"k" * 32
HEADER = FrameHeader(
    fingerprint=bytes(range(16)),
    request_id=bytes(range(16, 32)),
    image_index=3,
    attempt=1,
    first_tile=2,
    num_image_tiles=13,
    hidden_size=1024,
    dtype="bfloat16",
    tokens_per_tile=(256, 64, 256),
    payload_crc32c=0xDEADBEEF,
)
SEALED = replace(HEADER, payload_crc32c=0, seal=Seal(bytes(range(0x40, 0x4C)), bytes(range(0x50, 0x60))))
# Offsets of the fixed part, from the table in protos/frame.py.
MAGIC, VERSION, HEADER_BYTES, FIRST_TILE, NUM_TILES, NUM_IMAGE_TILES = 0, 4, 6, 46, 48, 50
HIDDEN_SIZE, DTYPE, PADDING, PAYLOAD_BYTES, TOKENS = 52, 56, 57, 60, 72


def patched(offset: int, format: str, value: int | bytes, header: FrameHeader = HEADER) -> bytes:
    data = bytearray(pack_header(header, TICKET))
    struct.pack_into(f"<{format}", data, offset, value)
    return bytes(data)


SEALS = st.builds(Seal, st.binary(min_size=12, max_size=12), st.binary(min_size=16, max_size=16))


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    tokens = draw(st.lists(st.integers(1, 0xFFFF), min_size=1, max_size=MAX_TILES))
    first_tile = draw(st.integers(0, MAX_TILES - len(tokens)))
    return FrameHeader(
        fingerprint=draw(st.binary(min_size=16, max_size=16)),
        request_id=draw(st.binary(min_size=16, max_size=16)),
        image_index=draw(st.integers(0, 2**32 - 1)),
        attempt=draw(st.integers(0, 0xFFFF)),
        first_tile=first_tile,
        num_image_tiles=draw(st.integers(first_tile + len(tokens), MAX_TILES)),
        hidden_size=draw(st.integers(1, 2**32 - 1)),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        tokens_per_tile=tuple(tokens),
        payload_crc32c=draw(st.integers(0, 2**32 - 1)),
        seal=draw(
            st.none() | st.builds(Seal, st.binary(min_size=12, max_size=12), st.binary(min_size=16, max_size=16))
        ),
    )


def check_parse(data: bytes) -> None:
    """The property: a header that packs to the same bytes again, or ``FrameRejected``; nothing else, and cheaply."""
    tracemalloc.start()
    try:
        header = parse_header(data)
    except FrameRejected as rejection:
        assert rejection.reason in {"size", "magic", "version", "dtype", "shape"}
        return
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * 1024
    assert pack_header(header, TICKET)[:-MAC_BYTES] == data[:-MAC_BYTES]


@given(headers())
def test_round_trip(header: FrameHeader):
    packed = pack_header(header, TICKET)
    assert parse_header(packed) == header
    assert parse_header(memoryview(bytearray(packed))) == header
    assert MIN_HEADER_BYTES <= len(packed) <= MAX_HEADER_BYTES
    assert is_signed_by(packed, TICKET)


@pytest.mark.parametrize("dtype, item", [("bfloat16", np.uint16), ("float32", np.float32)])
def test_the_size_and_checksum_of_a_real_payload(dtype, item):
    header = replace(HEADER, dtype=dtype, hidden_size=48, tokens_per_tile=(7, 5))
    payload = np.arange(12 * 48).astype(item).reshape(12, 48)
    header = with_checksum(header, payload.data)
    assert header.num_tokens == 12
    assert header.payload_bytes == payload.nbytes == 12 * 48 * ITEM_SIZE[dtype]
    assert header.payload_crc32c == checksum(payload.tobytes())
    payload[3, 4] += 1
    assert header.payload_crc32c != checksum(payload.data)


def test_the_layout_is_the_documented_one():
    """The wire format of version 1, byte by byte: a change here is a new version."""
    packed = pack_header(replace(HEADER, tokens_per_tile=(256, 64)), TICKET)
    assert packed[:-MAC_BYTES].hex() == (
        "44564446" "0100" "6c00" "000102030405060708090a0b0c0d0e0f" "101112131415161718191a1b1c1d1e1f"
        "03000000" "0100" "0200" "0200" "0d00" "00040000" "01" "000000" "00000a0000000000" "efbeadde" "0001" "4000"
    )  # fmt: skip


def test_the_layout_of_a_sealed_header_is_the_documented_one():
    """Version 2, byte by byte: version 1 with a seal before the MAC."""
    packed = pack_header(replace(SEALED, tokens_per_tile=(256, 64)), TICKET)
    assert packed[:-MAC_BYTES].hex() == (
        "44564446" "0200" "8800" "000102030405060708090a0b0c0d0e0f" "101112131415161718191a1b1c1d1e1f"
        "03000000" "0100" "0200" "0200" "0d00" "00040000" "01" "000000" "00000a0000000000" "00000000" "0001" "4000"
        "404142434445464748494a4b" "505152535455565758595a5b5c5d5e5f"
    )  # fmt: skip
    assert packed[: -MAC_BYTES - 28] == describe(replace(SEALED, tokens_per_tile=(256, 64)))


def test_checksum_is_crc32c():
    """Check value of CRC-32C (Castagnoli), RFC 3720 appendix B.4."""
    assert checksum(b"123456789") == 0xE3069283
    assert checksum(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize(
    "reason, data",
    [
        ("size", b""),
        ("size", bytes(MIN_HEADER_BYTES - 1)),
        ("size", bytes(MAX_HEADER_BYTES + 1)),
        ("size", pack_header(HEADER, TICKET)[:-1]),
        ("size", pack_header(HEADER, TICKET) + b"\0"),
        ("size", patched(HEADER_BYTES, "H", 0)),
        ("size", patched(NUM_TILES, "H", 2)),
        ("size", patched(NUM_TILES, "H", 0xFFFF)),
        ("size", patched(PAYLOAD_BYTES, "Q", 0)),
        ("size", patched(PAYLOAD_BYTES, "Q", 2**64 - 1)),
        ("size", patched(HIDDEN_SIZE, "I", 1025)),
        ("magic", patched(MAGIC, "4s", b"DVDX")),
        ("magic", bytes(MIN_HEADER_BYTES)),
        ("version", patched(VERSION, "H", 0)),
        ("version", patched(VERSION, "H", SEALED_VERSION + 1)),
        ("size", patched(VERSION, "H", SEALED_VERSION)),
        ("size", patched(VERSION, "H", 1, SEALED)),
        ("size", patched(NUM_TILES, "H", 17, SEALED)),
        ("size", pack_header(SEALED, TICKET)[:-28]),
        ("shape", patched(TOKENS, "H", 0, SEALED)),
        ("dtype", patched(DTYPE, "B", 0)),
        ("dtype", patched(DTYPE, "B", 3)),
        ("dtype", patched(PADDING, "3s", b"\0\0\1")),
        ("shape", patched(FIRST_TILE, "H", 11)),
        ("shape", patched(FIRST_TILE, "H", 0xFFFF)),
        ("shape", patched(NUM_IMAGE_TILES, "H", 4)),
        ("shape", patched(NUM_IMAGE_TILES, "H", MAX_TILES + 1)),
        ("shape", patched(HIDDEN_SIZE, "I", 0)),
        ("shape", patched(TOKENS, "H", 0)),
    ],
)
def test_each_reason(reason: str, data: bytes):
    with pytest.raises(FrameRejected) as rejection:
        parse_header(data)
    assert rejection.value.reason == reason


def test_a_frame_without_tiles_is_a_shape_error():
    """Built by hand, as it is shorter than any header a sender makes."""
    data = bytearray(pack_header(replace(HEADER, tokens_per_tile=(256,)), TICKET))
    struct.pack_into("<H", data, NUM_TILES, 0)
    struct.pack_into("<H", data, HEADER_BYTES, len(data))
    with pytest.raises(FrameRejected, match="size"):
        parse_header(data)


@settings(max_examples=400)
@given(st.binary(max_size=MAX_HEADER_BYTES + 8))
@example(b"DVDF")
def test_random_bytes(data: bytes):
    check_parse(data)


@settings(max_examples=400)
@given(headers(), st.data())
def test_mutated_headers(header: FrameHeader, data: st.DataObject):
    """Bytes set, cut off, inserted or repeated in a valid header."""
    packed = bytearray(pack_header(header, TICKET))
    for _ in range(data.draw(st.integers(1, 4), label="mutations")):
        at = data.draw(st.integers(0, max(0, min(len(packed) - 1, TOKENS + 8))), label="at")
        match data.draw(st.sampled_from(["set", "set", "set", "cut", "insert", "repeat"]), label="kind"):
            case "set" if packed:
                packed[at] = data.draw(st.integers(0, 255), label="value")
            case "cut":
                del packed[at : at + data.draw(st.integers(1, 600), label="length")]
            case "insert":
                packed[at:at] = data.draw(st.binary(max_size=8), label="bytes")
            case "repeat":
                packed += packed[at : at + 64]
    check_parse(bytes(packed))


@settings(max_examples=300)
@given(headers(), st.integers(0, TOKENS - 1), st.integers(0, 255))
def test_one_byte_of_the_fixed_part_changed(header: FrameHeader, at: int, value: int):
    """Keeps the lengths right most of the time, so that it gets past the first checks."""
    packed = bytearray(pack_header(header, TICKET))
    packed[at] = value
    check_parse(bytes(packed))


@pytest.mark.parametrize("header", [HEADER, SEALED], ids=["clear", "sealed"])
def test_every_bit_of_a_header_is_covered_by_the_mac(header: FrameHeader):
    packed = pack_header(header, TICKET)
    for bit in range(8 * len(packed)):
        changed = bytearray(packed)
        changed[bit // 8] ^= 1 << bit % 8
        assert not is_signed_by(changed, TICKET)


@given(st.binary(min_size=1, max_size=64))
def test_only_the_ticket_itself_signs(other: bytes):
    """HMAC pads keys with zeros, so a ticket with zeros at its end is the same key; tickets have a fixed length."""
    packed = pack_header(HEADER, other)
    assert is_signed_by(packed, TICKET) == (other.rstrip(b"\0") == TICKET)


@given(st.binary(max_size=MAC_BYTES))
def test_too_short_to_be_signed(data: bytes):
    assert not is_signed_by(data, TICKET)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_tile": (0x10000,)},
        {"tokens_per_tile": (-1,)},
        {"image_index": 2**32},
        {"hidden_size": -1},
        {"payload_crc32c": 2**32},
        {"fingerprint": bytes(15)},
        {"request_id": bytes(17)},
        {"seal": Seal(bytes(11), bytes(16))},
        {"seal": Seal(bytes(12), bytes(17))},
    ],
)
def test_what_does_not_fit_is_not_packed(change):
    with pytest.raises((struct.error, ValueError)):
        pack_header(replace(HEADER, **change), TICKET)
