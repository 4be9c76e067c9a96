"""Sealed payloads: what was sealed opens, where it lies; anything else is a ``FrameRejected``."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.frame import FrameHeader, FrameRejected, Seal, checksum, describe, is_signed_by, parse_header
from protos.seal import open_payload, pack_frame
from tests.protos.test_frame import HEADER, TICKET


def a_frame(num_tokens: int = 5, hidden_size: int = 12, **changes) -> tuple[FrameHeader, memoryview]:
    header = replace(HEADER, tokens_per_tile=(num_tokens,), hidden_size=hidden_size, **changes)
    return header, np.arange(header.payload_bytes, dtype=np.uint8).data


def sealed(header: FrameHeader, payload: memoryview, ticket: bytes = TICKET) -> tuple[FrameHeader, memoryview]:
    """What a receiver has of it."""
    packed, ciphertext = pack_frame(header, payload, ticket, is_sealed=True)
    assert is_signed_by(packed, ticket)
    return parse_header(packed), ciphertext


def refused(header: FrameHeader, payload: memoryview, ticket: bytes = TICKET) -> bool:
    with pytest.raises(FrameRejected) as rejection:
        open_payload(header, np.frombuffer(payload, np.uint8).copy().data, ticket)
    return rejection.value.reason == "seal"


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 33), st.binary(min_size=32, max_size=32))
def test_what_was_sealed_opens_where_it_lies(num_tokens: int, hidden_size: int, ticket: bytes):
    header, payload = a_frame(num_tokens, hidden_size)
    before = bytes(payload)
    received, memory = sealed(header, payload, ticket)
    assert len(memory) == len(payload) == received.payload_bytes
    assert bytes(payload) == before  # others may still need it
    assert replace(received, seal=None) == replace(header, payload_crc32c=0)
    open_payload(received, memory, ticket)
    assert memory == payload


def test_it_is_plain_aes_gcm_with_the_header_as_associated_data():
    """Opened by another interface of the library; the key is HKDF-Expand of the ticket (RFC 5869)."""
    header, payload = a_frame()
    received, ciphertext = sealed(header, payload)
    assert received.seal is not None
    key = HKDFExpand(SHA256(), 32, b"DvD feature seal, AES-256-GCM").derive(TICKET)
    data = bytes(ciphertext) + received.seal.tag
    assert AESGCM(key).decrypt(received.seal.nonce, data, describe(received)) == bytes(payload)


def test_one_frame_sealed_by_two_servers_has_two_nonces():
    """They do not know of each other: with the same nonce, the difference of what they send would be readable."""
    header, payload = a_frame()
    seals = [sealed(header, payload) for _ in range(100)]
    assert len({each.seal.nonce for each, _ in seals if each.seal is not None}) == 100
    assert len({bytes(ciphertext) for _, ciphertext in seals}) == 100


def test_whatever_was_changed_is_noticed():
    header, ciphertext = sealed(*a_frame())
    assert header.seal is not None
    nonce, tag = header.seal.nonce, header.seal.tag
    other, other_ciphertext = sealed(*a_frame())
    assert refused(replace(header, seal=Seal(bytes(12), tag)), ciphertext)
    assert refused(replace(header, seal=Seal(nonce, bytes(16))), ciphertext)
    assert refused(replace(header, attempt=header.attempt + 1), ciphertext)
    assert refused(replace(header, first_tile=0), ciphertext)
    assert refused(replace(header, request_id=bytes(16)), ciphertext)
    assert refused(header, other_ciphertext)
    assert refused(other, ciphertext)
    assert refused(header, ciphertext, b"x" * 32)
    for at in (0, len(ciphertext) // 2, len(ciphertext) - 1):
        changed = bytearray(ciphertext)
        changed[at] ^= 1
        assert refused(header, memoryview(changed))


def test_a_frame_in_clear_is_as_it_was():
    header, payload = a_frame()
    packed, same = pack_frame(header, payload, TICKET, is_sealed=False)
    assert same is payload
    assert parse_header(packed) == replace(header, payload_crc32c=checksum(payload))
