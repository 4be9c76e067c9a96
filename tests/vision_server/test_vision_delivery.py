"""Frames in clear and sealed, without a server: what goes out, how often, and how much of it at once."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import torch

from common.service.errors import InternalError, TransportFailed
from common.transport.base import receive_frame
from protos.frame import FrameRejected, parse_header
from protos.vision_pb2 import EncodeRequest
from tests.vision_server.neighbours import TICKET, FeatureSink
from vision_server import damage
from vision_server.delivery import _MAX_SEALED, _MAX_SENDS, Delivery
from vision_server.device_jobs import EncodedGroup, Times

NUM_TILES, TOKENS, HIDDEN = 12, 16, 8
FEATURES = torch.arange(NUM_TILES * TOKENS * HIDDEN, dtype=torch.float32).view(NUM_TILES * TOKENS, HIDDEN)


@dataclass
class Courier:
    """Takes frames to a sink, when it may."""

    sink: FeatureSink = field(default_factory=FeatureSink)
    may_go: asyncio.Event = field(default_factory=asyncio.Event)
    headers: list[bytes] = field(default_factory=list)
    payloads: list[memoryview] = field(default_factory=list)
    num_on_their_way: int = 0

    async def send(self, endpoints, packed_header, payload, timeout) -> str:
        self.headers.append(packed_header)
        self.payloads.append(payload)
        self.num_on_their_way += 1
        await self.may_go.wait()
        self.num_on_their_way -= 1
        if (verdict := receive_frame(self.sink, packed_header, payload)) != "ok":
            raise FrameRejected(verdict, "by the sink")
        return "courier"


async def tile_by_tile() -> AsyncIterator[EncodedGroup]:
    for tile, rows in enumerate(FEATURES.split(TOKENS)):
        yield EncodedGroup(tile, NUM_TILES, (TOKENS,), rows, Times(0, 0, 0))


def a_request(is_sealed: bool) -> EncodeRequest:
    return EncodeRequest(request_id=secrets.token_bytes(16), ticket=TICKET, seals_features=is_sealed)


async def deliver(courier: Courier, request: EncodeRequest) -> None:
    await Delivery(courier, bytes(16)).deliver(request, "float32", tile_by_tile(), time.monotonic() + 60)


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_what_arrives_is_what_was_encoded(is_sealed):
    courier, request = Courier(), a_request(is_sealed)
    courier.may_go.set()
    await deliver(courier, request)
    assert torch.equal(courier.sink.features(request), FEATURES.view(NUM_TILES, TOKENS, HIDDEN))
    first = FEATURES[:TOKENS].numpy().tobytes()
    assert (bytes(courier.payloads[0]) == first) is not is_sealed
    seals = [parse_header(header).seal for header in courier.headers]
    assert len(set(seals)) == (NUM_TILES if is_sealed else 1)  # no nonce comes twice


@pytest.mark.parametrize(("is_sealed", "most"), [(False, NUM_TILES), (True, _MAX_SEALED)])
async def test_sealed_copies_of_an_image_are_bounded(is_sealed, most):
    courier = Courier()
    delivering = asyncio.create_task(deliver(courier, a_request(is_sealed)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert courier.num_on_their_way == len(courier.payloads) == most
    courier.may_go.set()
    await delivering
    assert len(courier.payloads) == NUM_TILES


async def test_a_sealed_frame_that_does_not_open_is_sent_again_as_it_was():
    courier, request = Courier(), a_request(is_sealed=True)
    courier.sink.refuse_payloads_with = ["seal"] * (_MAX_SENDS - 1)
    courier.may_go.set()
    await deliver(courier, request)
    assert len(courier.headers) == NUM_TILES + _MAX_SENDS - 1
    assert len(set(courier.headers)) == NUM_TILES
    assert torch.equal(courier.sink.features(request), FEATURES.view(NUM_TILES, TOKENS, HIDDEN))


async def test_one_that_never_opens_ends_the_delivery():
    courier = Courier()
    courier.sink.refuse_payloads_with = ["seal"] * _MAX_SENDS * NUM_TILES
    courier.may_go.set()
    with pytest.raises(TransportFailed, match="damaged"):
        await deliver(courier, a_request(is_sealed=True))


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bits", None), ("header", "ticket"), ("version", "version"), ("nan", "ok"), ("duplicate", "ok")],
)
async def test_what_a_failpoint_damages_is_refused_for_what_it_is(kind, reason, is_sealed):
    """Also of sealed frames: each kind gets as far as it should."""
    request = a_request(is_sealed)
    ((header, payload),) = Delivery(Courier(), bytes(16))._frames(request, "float32", await anext(tile_by_tile()))
    packed, damaged = damage._damaged(kind, header, payload, request)
    verdict = receive_frame(FeatureSink(), packed, damaged)
    assert verdict == (reason or ("seal" if is_sealed else "checksum"))


async def test_what_should_have_been_sealed_is_not_sent_again():
    """A router that does not pass on what the language server demands: no other answer is to be had here."""
    courier = Courier(FeatureSink(refuse_with="unsealed"))
    courier.may_go.set()
    with pytest.raises(InternalError, match="unsealed"):
        await deliver(courier, a_request(is_sealed=False))
    assert len(courier.headers) <= NUM_TILES
