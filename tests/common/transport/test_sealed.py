"""Sealed frames over every transport: none of them knows, and nothing but what was sealed arrives."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from common.service import metrics
from protos.frame import MAC_BYTES, NONCE_BYTES, TAG_BYTES, FrameRejected, pack_header, parse_header
from tests.common.transport.conftest import STREAMS, Wire
from tests.common.transport.fakes import MIB, MIB_TOKENS, TICKET, MemorySink, Relay, key, make_frame, sealed_frame

SECONDS = 20.0


def num_refused(wire: Wire, reason: str) -> float:
    return metrics.TRANSFER_FRAMES_REJECTED.labels(wire.transport, "receive", reason)._value.get()


def with_a_bit_flipped(data, at: int) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    changed[at] ^= 1
    return changed.tobytes()


async def test_sealed_frames_of_all_sizes_arrive_and_say_what_they_said(wire: Wire):
    """Small ones are copied on their way, large ones are opened in the memory that the transport lends."""
    sink = MemorySink(seals=True)
    sender = wire.sender(await wire.receiver(sink))
    sizes = (1, 16, 600, 1024, MIB_TOKENS, 5 * MIB_TOKENS)
    frames = [sealed_frame(number=number, num_tokens=size) for number, size in enumerate(sizes)]
    await asyncio.gather(*(sender.send(packed, payload, SECONDS) for _, packed, payload, _ in frames))
    assert sink.ready == {key(header): said for header, _, _, said in frames}


async def test_whatever_was_changed_on_the_way_is_refused_and_counted(wire: Wire):
    sink = MemorySink(seals=True)
    sender = wire.sender(await wire.receiver(sink))
    header, packed, payload, said = sealed_frame(num_tokens=MIB_TOKENS)
    _, another, other_payload, _ = sealed_frame(num_tokens=MIB_TOKENS)
    in_clear = make_frame(num_tokens=MIB_TOKENS)
    others = sealed_frame(num_tokens=MIB_TOKENS, ticket=b"x" * 32)
    seal_at = len(packed) - MAC_BYTES - NONCE_BYTES - TAG_BYTES
    for reason, (header_sent, payload_sent) in (
        ("seal", (packed, with_a_bit_flipped(payload, MIB // 2))),
        ("seal", (packed, other_payload)),
        ("seal", (another, payload)),
        ("ticket", (with_a_bit_flipped(packed, 44), payload)),  # its attempt
        ("ticket", (with_a_bit_flipped(packed, seal_at), payload)),  # nonce
        ("ticket", (with_a_bit_flipped(packed, seal_at + NONCE_BYTES), payload)),  # tag
        ("ticket", others[1:3]),  # of another image
        ("size", (packed[:4] + b"\1" + packed[5:], payload)),  # "it is in clear"
        ("unsealed", in_clear[1:3]),
    ):
        before = num_refused(wire, reason)
        with pytest.raises(FrameRejected) as rejection:
            await sender.send(header_sent, payload_sent, SECONDS)
        assert rejection.value.reason == reason
        assert num_refused(wire, reason) == before + 1
        assert sink.ready == {}
    await sender.send(packed, payload, SECONDS)  # neither frame nor connection is the worse for it
    assert sink.ready == {key(header): said}


async def test_who_holds_the_ticket_cannot_give_one_seal_to_two_headers(wire: Wire):
    """Signed as it must be, but not what was sealed: a payload belongs to its tile and its attempt."""
    sink = MemorySink(seals=True)
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload, _ = sealed_frame(num_tokens=MIB_TOKENS)
    _, elsewhere, _, _ = sealed_frame(number=1, num_tokens=MIB_TOKENS)
    seal = parse_header(packed).seal
    moved = replace(parse_header(elsewhere), seal=seal)
    with pytest.raises(FrameRejected, match="seal"):
        await sender.send(pack_header(moved, TICKET), payload, SECONDS)
    assert sink.ready == {}


async def test_a_replay_is_a_duplicate(wire: Wire):
    sink = MemorySink(seals=True)
    sender = wire.sender(await wire.receiver(sink))
    header, packed, payload, said = sealed_frame(num_tokens=MIB_TOKENS)
    for _ in range(3):
        await sender.send(packed, payload, SECONDS)
    assert (sink.ready, sink.num_placed) == ({key(header): said}, 3)


@pytest.mark.parametrize("wire", STREAMS, indirect=True)
async def test_what_passes_is_not_what_is_said(wire: Wire):
    """A listener on the way, and then a bad cable."""
    sink = MemorySink(seals=True)
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint)
    _, packed, payload, said = sealed_frame(number=1, num_tokens=MIB_TOKENS)
    if isinstance(relay, Relay):
        relay.keeps = True
        await sender.send(packed, payload, SECONDS)
        heard = b"".join(relay.forwarded)
        assert bytes(payload[-64:]) in heard  # what was listened to is the right thing
        assert said[:16] not in heard
    else:
        await sender.send(packed, payload, SECONDS)
    assert list(sink.ready.values()) == [said]

    _, packed, payload, said = sealed_frame(number=2, num_tokens=MIB_TOKENS)
    relay.flip_a_bit_after(MIB // 2)
    with pytest.raises(FrameRejected, match="seal"):
        await sender.send(packed, payload, SECONDS)
    await sender.send(packed, payload, SECONDS)
    assert list(sink.ready.values())[1:] == [said]
