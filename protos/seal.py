"""Sealed feature frames: whoever reads the wire learns how large they are and where they belong, not what they say.

AES-256-GCM over the payload, with the header up to the seal as associated data; the layout is in ``frame.py``. The key
comes from the image's ticket, which travels on the control channel only: who may sign a frame may seal it, and nothing
needs to be stored or handed out beside the ticket. The nonce is random, because several servers may send frames of one
image at the same time, under one key and without knowing of each other. In its life a ticket sees a few thousand
frames at most, so that two of them have the same nonce with a chance of less than 2^-70.

A frame that is sent again is sent as it was sealed. Knows nothing of sockets, reservations or tensors.
"""

import hmac
import os
from dataclasses import replace
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from protos.frame import NONCE_BYTES, TAG_BYTES, FrameHeader, FrameRejected, Seal, describe, pack_header, with_checksum

_KEY_INFO: Final = b"DvD feature seal, AES-256-GCM\x01"
"""No header begins like this, so that a key is never the MAC of one."""


def pack_frame(header: FrameHeader, payload: memoryview, ticket: bytes, *, is_sealed: bool) -> tuple[bytes, memoryview]:
    """Header and payload as they go out, with the checksum, or the seal, that the payload needs.

    Sealed, the payload is in memory of its own, else it is what was given. Raises what ``pack_header`` raises.
    """
    if is_sealed:
        return _seal(header, payload, ticket)
    return pack_header(with_checksum(header, payload), ticket), payload


def open_payload(header: FrameHeader, payload: memoryview, ticket: bytes) -> None:
    """Decrypt ``payload`` where it lies. After a failure there is anything in it.

    Raises:
        FrameRejected: reason ``seal``: it was damaged or changed on its way, or was sealed for another header.
    """
    assert header.seal is not None
    decryptor = Cipher(AES(_key(ticket)), GCM(header.seal.nonce, header.seal.tag)).decryptor()
    decryptor.authenticate_additional_data(describe(header))
    decryptor.update_into(payload, payload)
    try:
        decryptor.finalize()
    except InvalidTag:
        raise FrameRejected("seal", "the payload does not open") from None


def _seal(header: FrameHeader, payload: memoryview, ticket: bytes) -> tuple[bytes, memoryview]:
    nonce = os.urandom(NONCE_BYTES)
    header = replace(header, payload_crc32c=0, seal=Seal(nonce, bytes(TAG_BYTES)))
    encryptor = Cipher(AES(_key(ticket)), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(describe(header))
    sealed = np.empty(len(payload), np.uint8).data
    encryptor.update_into(payload, sealed)
    encryptor.finalize()
    return pack_header(replace(header, seal=Seal(nonce, encryptor.tag)), ticket), sealed


def _key(ticket: bytes) -> bytes:
    """HKDF-Expand (RFC 5869) to one block: a ticket is a random key already."""
    return hmac.digest(ticket, _KEY_INFO, "sha256")
