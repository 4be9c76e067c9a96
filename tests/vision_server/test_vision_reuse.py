"""An image is encoded once: for all who ask at the same time, and for those who ask later. Whose it is, counts."""

import asyncio
from typing import Any

import grpc
import pytest
import torch

from common.service import metrics
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16
from protos.vision_pb2 import ProbeRequest
from tests.vision_server.neighbours import Neighbourhood, encoded, picture
from vision_server.encoder import VisionEncoder


class CountedTiles:
    """How many tiles came to the device; they may be held back there."""

    def __init__(self, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tiles = 0
        self._launch = encoder.launch
        monkeypatch.setattr(encoder, "launch", self)

    def __call__(self, kind: Any, parts: Any) -> Any:
        self.num_tiles += sum(map(len, parts))
        return self._launch(kind, parts)


@pytest.fixture
def count(monkeypatch):
    return lambda near: CountedTiles(near.server.encoder, monkeypatch)


async def test_the_same_image_later_comes_from_the_cache(neighbourhood, count):
    near: Neighbourhood = await neighbourhood(max_batch_tiles=2)
    counted = count(near)
    first, again = (near.request(encoded(picture(900, 900)), image_hash=bytes(32)) for _ in range(2))
    assert not (await near.encode(first)).cache_hit
    reply = await near.encode(again)
    assert reply.cache_hit and counted.num_tiles == 5
    assert list(reply.tokens_per_tile) == [256] * 5
    assert torch.equal(near.sink.features(first), near.sink.features(again))
    assert reply.timings.decode_ms == reply.timings.encode_ms == 0


async def test_equal_images_at_the_same_time_are_encoded_once(neighbourhood, count):
    near: Neighbourhood = await neighbourhood(feature_cache_bytes=0)
    counted, before = count(near), metrics.VISION_COALESCED._value.get()
    requests = [near.request(encoded(picture(900, 900)), image_hash=bytes(32)) for _ in range(6)]
    await asyncio.gather(*map(near.encode, requests))
    assert counted.num_tiles == 5
    assert metrics.VISION_COALESCED._value.get() - before == 5
    for request in requests[1:]:
        assert torch.equal(near.sink.features(request), near.sink.features(requests[0]))
    assert near.server.compute.queued_tiles == 0


@pytest.mark.parametrize("other", [{"image_hash": b"x" * 32}, {"dtype": FEATURE_DTYPE_BFLOAT16}])
async def test_another_key_or_dtype_is_another_image(neighbourhood, count, other):
    near: Neighbourhood = await neighbourhood()
    counted = count(near)
    data = encoded(picture())
    await near.encode(near.request(data, image_hash=bytes(32)))
    assert not (await near.encode(near.request(data, **({"image_hash": bytes(32)} | other)))).cache_hit
    assert counted.num_tiles == 2


async def test_what_does_not_fit_is_encoded_again(neighbourhood, count):
    near: Neighbourhood = await neighbourhood(feature_cache_bytes=256 * 56 * 4)  # one tile
    counted = count(near)
    for name in (b"a", b"b", b"a"):
        assert not (await near.encode(near.request(encoded(picture()), image_hash=name * 32))).cache_hit
    assert counted.num_tiles == 3


async def test_a_failure_is_not_remembered(neighbourhood):
    near: Neighbourhood = await neighbourhood()
    broken = near.request(encoded(picture(), "JPEG")[:300], image_hash=bytes(32))
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await near.encode(broken)
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not (await near.encode(near.request(encoded(picture()), image_hash=bytes(32)))).cache_hit


async def test_one_caller_who_leaves_takes_nobody_along(neighbourhood, count):
    near: Neighbourhood = await neighbourhood(max_batch_tiles=1)
    leaving = near.stub.Encode(near.request(encoded(picture(900, 900)), image_hash=bytes(32)), timeout=30)
    staying = asyncio.create_task(near.encode(near.request(encoded(picture(900, 900)), image_hash=bytes(32))))
    while not near.sink.frames:
        await asyncio.sleep(0.001)
    leaving.cancel()
    assert (await staying).num_tiles == 5


async def test_deliveries_from_the_cache_are_bounded_as_well(neighbourhood):
    near: Neighbourhood = await neighbourhood(max_queued_tiles=2, max_tiles_per_image=1)
    request = near.request(encoded(picture()), image_hash=bytes(32), max_tiles=1)
    await near.encode(request)
    entered = asyncio.Event()
    go = asyncio.Event()
    send = near.server._servicer._delivery._couriers.send

    async def held(*arguments: Any) -> str:
        entered.set()
        await go.wait()
        return await send(*arguments)

    near.server._servicer._delivery._couriers = type("Held", (), {"send": staticmethod(held)})()
    again = [near.request(request.image, image_hash=bytes(32), max_tiles=1) for _ in range(3)]
    calls = [asyncio.create_task(near.encode(call)) for call in again[:2]]
    await entered.wait()
    await asyncio.sleep(0.05)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.encode(again[2])
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    go.set()
    assert [(await call).cache_hit for call in calls] == [True, True]


async def test_videos_that_are_only_measured_are_bounded_as_well(neighbourhood):
    near: Neighbourhood = await neighbourhood(max_queued_tiles=2, max_tiles_per_image=1)
    places = [near.server.compute.admit(is_encoded=True) for _ in range(2)]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.stub.Probe(ProbeRequest(video=b"no video"), timeout=30)
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    near.server.compute.release(places[0])
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.stub.Probe(ProbeRequest(video=b"no video"), timeout=30)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
