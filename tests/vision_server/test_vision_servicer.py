"""A real server, real sockets and a receiver in memory: right features, or a status; never a hang, never a leak."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

from common.service.errors import from_grpc
from protos.frame import ITEM_SIZE
from protos.status_pb2 import (
    FEATURE_DTYPE_BFLOAT16,
    FEATURE_DTYPE_UNSPECIFIED,
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    Endpoint,
    WatchStatusRequest,
)
from protos.vision_pb2 import EncodeRequest, TilingOptions
from tests import reference
from tests.vision_server.neighbours import Neighbourhood, encoded, picture
from vision_server import delivery
from vision_server.encoder import Kind
from vision_server.host_link import Pending


def expected_features(checkpoint, image, max_tiles=12):
    with torch.no_grad():
        return checkpoint.reference().get_image_features(reference.pixel_values([image], hi=max_tiles)).pooler_output


async def failure_of(call) -> tuple[grpc.StatusCode, str, str]:
    """Status, our code and the message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    error = from_grpc(failure.value)
    return failure.value.code(), error.code, error.message


@pytest.fixture
def hold_device(monkeypatch) -> Iterator[Callable[..., tuple[threading.Event, threading.Event]]]:
    """Keep whatever comes to the device there, after the first ``free`` batches; returns (it has come, let it go)."""
    came, go = threading.Event(), threading.Event()

    def hold(near: Neighbourhood, free: int = 0) -> tuple[threading.Event, threading.Event]:
        launch, calls = near.server.encoder.launch, itertools.count()

        def held(kind: Kind, parts: Any) -> Pending[Any]:
            if next(calls) >= free:
                came.set()
                assert go.wait(60)
            return launch(kind, parts)

        monkeypatch.setattr(near.server.encoder, "launch", held)
        return came, go

    yield hold
    go.set()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("transport", ["zmq", "grpc"])
async def test_many_images_at_once_equal_transformers(neighbourhood, checkpoint, transport):
    near = await neighbourhood(transport, max_batch_tiles=4)
    sizes = [(448, 448), (900, 450), (300, 1000), (700, 700), (900, 900), (3, 2)]
    images = [picture(*size, seed=number) for number, size in enumerate(sizes)]
    data = [encoded(image, kind) for image, kind in zip(images, ["PNG", "BMP"] * 3, strict=True)]
    requests = [near.request(item, image_index=number, max_tiles=6) for number, item in enumerate(data)]
    replies = await asyncio.gather(*map(near.encode, requests))
    for image, request, reply in zip(images, requests, replies, strict=True):
        features = near.sink.features(request)
        expected = expected_features(checkpoint, image, 6)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        assert reply.num_tiles == len(expected)
        assert list(reply.tokens_per_tile) == [256] * len(expected)
        assert reply.feature_bytes == expected.nbytes
        assert reply.transport == transport
    assert {header.num_image_tiles for header in near.sink.frames} == {reply.num_tiles for reply in replies}


async def test_timings_are_told(neighbourhood):
    near = await neighbourhood()
    reply = await near.encode(near.request(encoded(picture(900, 900))))
    assert all(value > 0 for value in (reply.timings.decode_ms, reply.timings.encode_ms, reply.timings.transfer_ms))
    assert reply.timings.queue_ms >= 0
    assert not reply.cache_hit


async def test_each_group_tells_its_way(neighbourhood):
    near = await neighbourhood(max_batch_tiles=2)
    data = encoded(picture(900, 900))
    reply = await near.encode(near.request(data, image_hash=bytes(32)))
    assert [(group.first_tile, group.num_tiles) for group in reply.groups] == [(0, 2), (2, 2), (4, 1)]
    for group in reply.groups:
        assert 0 < group.queued_ms <= group.started_ms < group.ended_ms <= group.sent_ms < group.acknowledged_ms
    again = await near.encode(near.request(data, image_hash=bytes(32)))
    assert again.cache_hit
    assert {(group.queued_ms, group.started_ms, group.ended_ms) for group in again.groups} == {(0, 0, 0)}


async def test_features_travel_in_the_dtype_asked_for(neighbourhood, checkpoint):
    near = await neighbourhood()
    request = near.request(encoded(picture()), dtype=FEATURE_DTYPE_BFLOAT16)
    reply = await near.encode(request)
    features = near.sink.features(request)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected_features(checkpoint, picture()), rtol=0.01, atol=1e-4)
    assert reply.feature_bytes == 256 * 56 * ITEM_SIZE["bfloat16"]


async def test_frames_leave_before_the_last_tile_is_encoded(neighbourhood, hold_device):
    near = await neighbourhood(max_batch_tiles=2)
    _, go = hold_device(near, free=1)
    call = asyncio.create_task(near.encode(near.request(encoded(picture(900, 900)))))
    await until(lambda: near.sink.frames)
    assert not call.done()
    assert [(header.first_tile, len(header.tokens_per_tile)) for header in near.sink.frames] == [(0, 2)]
    go.set()
    assert (await call).num_tiles == 5


async def test_large_groups_are_cut_into_frames(neighbourhood, checkpoint, monkeypatch):
    monkeypatch.setattr(delivery, "_FRAME_BYTES", 2 * 256 * 56 * 4)
    near = await neighbourhood(max_batch_tiles=8)
    request = near.request(encoded(picture(900, 900)))
    await near.encode(request)
    assert sorted(len(header.tokens_per_tile) for header in near.sink.frames) == [1, 2, 2]
    torch.testing.assert_close(
        near.sink.features(request), expected_features(checkpoint, picture(900, 900)), atol=1e-5, rtol=0
    )


async def test_a_lost_transport_is_replaced_by_the_next(neighbourhood):
    near = await neighbourhood("grpc")
    nobody = Endpoint(transport="zmq", address="tcp://127.0.0.1:1")
    reply = await near.encode(near.request(encoded(picture()), deliver_to=[nobody, *near.endpoints]))
    assert reply.transport == "grpc"


async def test_no_way_to_deliver_is_unavailable(neighbourhood):
    near = await neighbourhood("grpc", transports=("zmq",))
    status, _, _ = await failure_of(near.encode(near.request(encoded(picture()))))
    assert status == grpc.StatusCode.UNAVAILABLE
    assert near.server.compute.queued_tiles == 0


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("tombstone", grpc.StatusCode.CANCELLED),
        ("unknown_request", grpc.StatusCode.CANCELLED),
        ("stale", grpc.StatusCode.CANCELLED),
        ("checksum", grpc.StatusCode.UNAVAILABLE),
        ("shape", grpc.StatusCode.INTERNAL),
    ],
)
async def test_a_refused_frame_ends_the_call(neighbourhood, reason, status):
    near = await neighbourhood()
    near.sink.refuse_with = reason
    assert (await failure_of(near.encode(near.request(encoded(picture(900, 900))))))[0] == status
    near.sink.refuse_with = None
    assert (await near.encode(near.request(encoded(picture())))).num_tiles == 1


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "request_id": {"request_id": b"short"},
    "ticket": {"ticket": b""},
    "mm_hash": {"mm_hash": bytes(31)},
    "image_hash": {"image_hash": bytes(31)},
    "deliver_to": {"deliver_to": []},
    "dtype": {"dtype": FEATURE_DTYPE_UNSPECIFIED},
    "attempt": {"attempt": 2**16},
    "tiling": {"tiling": TilingOptions(min_dynamic_patch=1, max_dynamic_patch=41)},
}


@pytest.mark.parametrize("field", BAD_FIELDS)
async def test_bad_fields_are_named(neighbourhood, field):
    near = await neighbourhood()
    request = near.request(encoded(picture()), **BAD_FIELDS[field])
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.encode(request)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert from_grpc(failure.value).param == field


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 12), (5, 4)])
async def test_tile_budgets_must_be_in_order(neighbourhood, low, high):
    near = await neighbourhood()
    tiling = TilingOptions(min_dynamic_patch=low, max_dynamic_patch=high)
    status, code, _ = await failure_of(near.encode(near.request(encoded(picture()), tiling=tiling)))
    assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_value")


async def test_bad_images_are_refused_and_leave_nothing(neighbourhood):
    near = await neighbourhood(max_pixels=1_000_000)
    whole = encoded(picture(300, 300), "JPEG")
    bad = [b"", b"GIF89a", b"no image at all", whole[: len(whole) // 2], encoded(picture(1001, 1000))]
    for data in bad:
        status, code, message = await failure_of(near.encode(near.request(data)))
        assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_image")
        assert "0x" not in message and "/" not in message
    assert near.server.compute.queued_tiles == 0
    assert near.sink.frames == []
    assert (await near.encode(near.request(whole))).num_tiles == 1


async def test_more_than_the_queue_holds_is_refused_at_once(neighbourhood, hold_device):
    near = await neighbourhood(max_queued_tiles=7, max_tiles_per_image=6, max_batch_tiles=1)
    came, go = hold_device(near)
    first = asyncio.create_task(near.encode(near.request(encoded(picture(900, 900)), max_tiles=4)))  # 5 tiles
    await asyncio.to_thread(came.wait, 30)
    status, code, _ = await failure_of(near.encode(near.request(encoded(picture(900, 900)), max_tiles=4)))
    assert (status, code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    second = asyncio.create_task(near.encode(near.request(encoded(picture()), max_tiles=4)))  # 1 tile still fits
    await until(lambda: near.server.compute.queued_tiles == 5)
    go.set()
    assert [(await call).num_tiles for call in (first, second)] == [5, 1]


async def test_cancelling_the_call_drops_its_tiles_at_once(neighbourhood, hold_device):
    near = await neighbourhood(max_batch_tiles=1)
    came, go = hold_device(near)
    call = near.stub.Encode(near.request(encoded(picture(900, 900))), timeout=30)
    waiting = asyncio.ensure_future(call)
    await asyncio.to_thread(came.wait, 30)
    assert near.server.compute.queued_tiles == 4
    call.cancel()
    await asyncio.wait([waiting])
    await until(lambda: near.server.compute.queued_tiles == 0)
    go.set()
    await until(lambda: near.server.compute.running_tiles == 0)
    assert near.sink.frames == []
    assert near.server.compute.num_running == 0
    assert (await near.encode(near.request(encoded(picture())))).num_tiles == 1


async def test_the_deadline_ends_the_call_and_frees_its_tiles(neighbourhood, hold_device):
    near = await neighbourhood(max_batch_tiles=1)
    _, go = hold_device(near)
    status, _, _ = await failure_of(near.encode(near.request(encoded(picture(900, 900))), timeout=0.5))
    assert status == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: near.server.compute.queued_tiles == 0)
    go.set()


async def test_a_call_without_a_deadline_gets_one(neighbourhood, hold_device):
    near = await neighbourhood(encode_timeout=0.2)
    _, go = hold_device(near)
    status, code, _ = await failure_of(near.encode(near.request(encoded(picture())), timeout=None))
    assert (status, code) == (grpc.StatusCode.DEADLINE_EXCEEDED, "timeout")
    go.set()


async def test_draining_finishes_what_was_admitted_and_takes_nothing_new(neighbourhood, hold_device):
    near = await neighbourhood()
    came, go = hold_device(near)
    call = asyncio.create_task(near.encode(near.request(encoded(picture()))))
    await asyncio.to_thread(came.wait, 30)
    draining = asyncio.create_task(near.server.drain())
    await until(lambda: near.server.board.state == WORKER_STATE_DRAINING)
    status, code, _ = await failure_of(near.encode(near.request(encoded(picture()))))
    assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "draining")
    assert not draining.done()
    go.set()
    assert (await call).num_tiles == 1
    await draining


async def test_draining_ends_when_its_time_is_up(neighbourhood, hold_device):
    near = await neighbourhood(shutdown_timeout=0.1)
    came, go = hold_device(near)
    call = asyncio.create_task(near.encode(near.request(encoded(picture()))))
    await asyncio.to_thread(came.wait, 30)
    await near.server.drain()
    assert not call.done()
    go.set()
    await call


async def test_routers_hear_of_state_and_load(neighbourhood, hold_device):
    near = await neighbourhood(max_batch_tiles=1, served_model_name="tiny", name="left")
    came, go = hold_device(near)
    call = asyncio.create_task(near.encode(near.request(encoded(picture(900, 900)))))
    await asyncio.to_thread(came.wait, 30)
    stream = near.stub.WatchStatus(WatchStatusRequest(router_id="r"))
    status = await stream.read()
    assert (status.name, status.state, status.model.model) == ("left", WORKER_STATE_READY, "tiny")
    assert (status.vision.queued_tiles, status.vision.running_tiles, status.vision.max_queued_tiles) == (4, 1, 512)
    assert (status.model.tokens_per_tile, status.model.image_size, status.model.max_dynamic_patch) == (256, 448, 12)
    assert len(status.fingerprint) == len(status.incarnation) == 16
    go.set()
    await call
    stream.cancel()


async def test_an_empty_request_is_a_status(neighbourhood):
    near = await neighbourhood()
    status, _, _ = await failure_of(near.encode(EncodeRequest()))
    assert status == grpc.StatusCode.INVALID_ARGUMENT
