"""The vision server as a feature extractor: what anybody may ask over the wire is what transformers computes, tile by
tile; or a status, and nothing is left behind."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch

from common.service import rpc
from common.service.errors import from_grpc
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16, FEATURE_DTYPE_FLOAT32, FEATURE_DTYPE_UNSPECIFIED
from protos.vision_pb2 import (
    FEATURE_KIND_LAST_HIDDEN_STATE,
    FEATURE_KIND_PROJECTED,
    FEATURE_KIND_UNSPECIFIED,
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    VIR_SCOPE_REQUEST,
    VIR_SCOPE_UNSPECIFIED,
    ExtractReply,
    ExtractRequest,
    TilingOptions,
    VirOptions,
)
from protos.vision_pb2_grpc import VisionStub
from tests import reference
from tests.checkpoints import VISION_300M, RandomCheckpoint, make_checkpoint
from tests.flash import ABSOLUTE_THRESHOLD, RELATIVE_THRESHOLD, shuffled
from tests.vision_server.neighbours import FeatureSink, Neighbourhood, encoded, picture
from vision_server.host_link import Pending
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

# Servers are shared: they take longer to start than any test.
pytestmark = pytest.mark.asyncio(loop_scope="module")

TILING = TilingOptions(min_dynamic_patch=1, max_dynamic_patch=12, use_thumbnail=True)
LARGE = picture(1800, 1300)  # 4 x 3 tiles and a thumbnail
TORCH_DTYPE = {FEATURE_DTYPE_FLOAT32: torch.float32, FEATURE_DTYPE_BFLOAT16: torch.bfloat16}


def make_request(image: bytes, **values: Any) -> ExtractRequest:
    defaults: dict[str, Any] = {"tiling": TILING, "dtype": FEATURE_DTYPE_FLOAT32, "kind": FEATURE_KIND_PROJECTED}
    return ExtractRequest(image=image, **(defaults | values))


def vir(mode=VIR_MODE_AUTO, scope=VIR_SCOPE_IMAGE, **values: Any) -> VirOptions:
    thresholds = {"relative_threshold": RELATIVE_THRESHOLD, "absolute_threshold": ABSOLUTE_THRESHOLD}
    return VirOptions(mode=mode, scope=scope, **(thresholds | values))


async def replies_to(near: Neighbourhood, request: ExtractRequest, timeout: float | None = 30) -> list[ExtractReply]:
    return [reply async for reply in near.stub.Extract(request, timeout=timeout)]


async def tiles_of(near: Neighbourhood, request: ExtractRequest) -> list[torch.Tensor]:
    """``[tokens, hidden]`` of each tile; fails if messages are out of order, or do not say what they hold."""
    tiles: list[torch.Tensor] = []
    replies = await replies_to(near, request)
    for reply in replies:
        assert reply.first_tile == len(tiles)
        values = torch.frombuffer(bytearray(reply.features), dtype=TORCH_DTYPE[request.dtype])
        tiles += values.view(sum(reply.tokens_per_tile), reply.hidden_size).split(list(reply.tokens_per_tile))
    assert {reply.num_image_tiles for reply in replies} == {len(tiles)}
    return tiles


async def failure_of(near: Neighbourhood, request: ExtractRequest, timeout: float | None = 30) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await replies_to(near, request, timeout)
    return failure.value


@pytest.fixture(scope="module")
def flash(tmp_path_factory) -> RandomCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("flash"), layout="github", vision=VISION_300M, flash=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start(checkpoint):
    """Call it with settings; everything it started is closed in the end."""
    closers: list[Callable[[], Awaitable[Any]]] = []

    async def start(**settings: Any) -> Neighbourhood:
        fixed = {"listen": "127.0.0.1:0", "metrics_listen": None, "dtype": "float32", "decode_workers": 1}
        server = VisionServer(VisionSettings(**({"model": checkpoint.path} | fixed | settings)))
        closers.append(server.close)
        await server.start()
        await server.load()
        channel = rpc.make_channel(server.address)
        closers.append(channel.close)
        return Neighbourhood(server, VisionStub(channel), [], FeatureSink())

    yield start
    for close in reversed(closers):
        await close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def near(start) -> Neighbourhood:
    return await start(max_batch_tiles=2, max_pixels=3_000_000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def near_flash(start, flash) -> Neighbourhood:
    return await start(model=flash.path, max_batch_tiles=3)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def near_small(start) -> Neighbourhood:
    """A tile at a time, room for one large image, and half a second for a caller who sets no deadline."""
    return await start(max_batch_tiles=1, max_queued_tiles=14, max_tiles_per_image=13, encode_timeout=0.5)


@pytest.fixture
def hold_device(monkeypatch) -> Iterator[Callable[..., tuple[threading.Event, threading.Event]]]:
    """Keep what comes to the device there, after the first ``free`` batches; returns (it has come, let it go)."""
    came, go = threading.Event(), threading.Event()

    def hold(near: Neighbourhood, free: int = 0) -> tuple[threading.Event, threading.Event]:
        launch, free_passes = near.server.encoder.launch, iter(range(free))

        def held(*arguments: Any) -> Pending[Any]:
            if next(free_passes, None) is None:
                came.set()
                assert go.wait(60)
            return launch(*arguments)

        monkeypatch.setattr(near.server.encoder, "launch", held)
        return came, go

    yield hold
    go.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


# --- what comes back


async def test_projected_features_equal_transformers(near, checkpoint):
    images = [picture(), picture(900, 450, seed=1), picture(3, 2, seed=2)]
    found = await asyncio.gather(*(tiles_of(near, make_request(encoded(image))) for image in images))
    for image, tiles in zip(images, found, strict=True):
        with torch.no_grad():
            expected = checkpoint.reference().get_image_features(reference.pixel_values([image])).pooler_output
        torch.testing.assert_close(torch.stack(tiles), expected, atol=1e-5, rtol=0)


async def test_hidden_states_equal_transformers(near, checkpoint):
    image = picture(900, 450)
    tiles = await tiles_of(near, make_request(encoded(image), kind=FEATURE_KIND_LAST_HIDDEN_STATE))
    with torch.no_grad():
        expected = checkpoint.reference().model.vision_tower(reference.pixel_values([image])).last_hidden_state
    assert expected.shape == (3, 1025, 48)
    torch.testing.assert_close(torch.stack(tiles), expected, atol=1e-5, rtol=1e-5)


async def test_a_large_image_comes_in_many_messages(near, checkpoint):
    replies = await replies_to(near, make_request(encoded(LARGE), kind=FEATURE_KIND_LAST_HIDDEN_STATE))
    assert [reply.first_tile for reply in replies] == list(range(13))
    assert {tuple(reply.tokens_per_tile) for reply in replies} == {(1025,)}
    assert {len(reply.features) for reply in replies} == {1025 * 48 * 4}


async def test_tiles_come_before_the_last_is_encoded(near, hold_device):
    _, go = hold_device(near, free=1)
    replies = aiter(near.stub.Extract(make_request(encoded(LARGE)), timeout=30))
    assert [(await anext(replies)).first_tile for _ in range(2)] == [0, 1]
    assert near.server.compute.queued_tiles > 0
    go.set()
    assert [reply.first_tile async for reply in replies] == list(range(2, 13))


@pytest.mark.parametrize("kind", [FEATURE_KIND_PROJECTED, FEATURE_KIND_LAST_HIDDEN_STATE])
async def test_bfloat16_is_rounded_at_the_end(near, kind):
    request = make_request(encoded(picture()), kind=kind)
    (exact,) = await tiles_of(near, request)
    request.dtype = FEATURE_DTYPE_BFLOAT16
    (rounded,) = await tiles_of(near, request)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


async def test_the_tiling_is_the_callers(near):
    counts = []
    for low, high, thumbnail in [(1, 1, True), (1, 4, True), (1, 4, False), (4, 6, True)]:
        tiling = TilingOptions(min_dynamic_patch=low, max_dynamic_patch=high, use_thumbnail=thumbnail)
        counts.append(len(await replies_to(near, make_request(encoded(picture(900, 900)), tiling=tiling))))
    assert counts == [1, 5, 4, 5]


async def test_an_image_is_turned_only_where_that_is_asked_for(near):
    exif = picture().getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    tiling = TilingOptions()
    tiling.CopyFrom(TILING)
    tiling.exif_orientation = True
    lying, upright = encoded(picture(900, 450), exif=exif), encoded(picture(900, 450).rotate(-90, expand=True))
    plain = await tiles_of(near, make_request(lying))
    turned = await tiles_of(near, make_request(lying, tiling=tiling))
    assert all(map(torch.equal, turned, await tiles_of(near, make_request(upright))))
    assert all(map(torch.equal, plain, await tiles_of(near, make_request(encoded(picture(900, 450))))))


# --- Flash


async def test_flash_tiles_are_those_of_the_published_code(near_flash, flash):
    image, model = picture(900, 900), flash.reference().model
    assert flash.flash is not None
    with torch.no_grad():
        patches = model.vision_tower(reference.pixel_values([image])).last_hidden_state[:, 1:]
        routed = flash.flash.route(patches, model.multi_modal_projector)
        long, short = model.multi_modal_projector(shuffled(patches, 2)), flash.flash.mlp2(shuffled(patches, 4))
        one_by_one = [short[i] if score >= 0.5 else long[i] for i, score in enumerate(routed.scores)]
    expected = {
        "off": (vir(VIR_MODE_OFF), list(long)),
        "force64": (vir(VIR_MODE_FORCE64), list(short)),
        "image": (vir(), routed.features),
        "request": (vir(scope=VIR_SCOPE_REQUEST, request_scores=routed.scores.tolist()), routed.features),
        "absolute": (vir(scope=VIR_SCOPE_ABSOLUTE, absolute_threshold=0.5), one_by_one),
    }
    assert {64, 256} == {len(tile) for tile in routed.features}
    for name, (options, tiles) in expected.items():
        found = await tiles_of(near_flash, make_request(encoded(image), vir=options))
        assert [len(tile) for tile in found] == [len(tile) for tile in tiles], name
        torch.testing.assert_close(torch.cat(found), torch.cat(tiles), atol=1e-5, rtol=1e-5, msg=name)


async def test_hidden_states_of_a_flash_tower_need_no_options(near_flash, flash):
    (tile,) = await tiles_of(near_flash, make_request(encoded(picture()), kind=FEATURE_KIND_LAST_HIDDEN_STATE))
    with torch.no_grad():
        expected = flash.reference().model.vision_tower(reference.pixel_values([picture()])).last_hidden_state[0]
    torch.testing.assert_close(tile, expected, atol=1e-5, rtol=1e-5)


# --- what is refused


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "kind": {"kind": FEATURE_KIND_UNSPECIFIED},
    "dtype": {"dtype": FEATURE_DTYPE_UNSPECIFIED},
    "image": {"image": b""},
    "tiling": {"tiling": TilingOptions(min_dynamic_patch=1, max_dynamic_patch=41)},
    "vir": {"vir": vir()},
}


@pytest.mark.parametrize("field", BAD_FIELDS)
async def test_bad_fields_are_named(near, field):
    values = {"image": encoded(picture())} | BAD_FIELDS[field]
    failure = await failure_of(near, make_request(**values))
    assert (failure.code(), from_grpc(failure).param) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_bad_options_of_a_flash_model_are_named(near_flash, flash):
    for field, options in {
        "vir.mode": None,
        "vir.scope": vir(scope=VIR_SCOPE_UNSPECIFIED),
        "vir.relative_threshold": vir(relative_threshold=1.5),
        "vir.absolute_threshold": vir(absolute_threshold=float("nan")),
        "vir.request_scores": vir(scope=VIR_SCOPE_REQUEST),
    }.items():
        failure = await failure_of(near_flash, make_request(encoded(picture()), vir=options))
        assert (failure.code(), from_grpc(failure).param) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_bad_images_are_refused_and_leave_nothing(near):
    whole = encoded(picture(300, 300), "JPEG")
    for data in [b"no image at all", whole[: len(whole) // 2], encoded(picture(2001, 1500))]:
        failure = await failure_of(near, make_request(data))
        error = from_grpc(failure)
        assert (failure.code(), error.code) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_image")
        assert "0x" not in error.message and "/" not in error.message
    assert near.server.compute.queued_tiles == 0
    assert len(await replies_to(near, make_request(whole))) == 1


async def test_a_full_server_says_so(near_small, hold_device):
    came, go = hold_device(near_small)
    first = asyncio.create_task(replies_to(near_small, make_request(encoded(LARGE))))
    await asyncio.to_thread(came.wait, 30)
    failure = await failure_of(near_small, make_request(encoded(LARGE)))
    assert (failure.code(), from_grpc(failure).code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    go.set()
    assert len(await first) == 13


async def test_a_draining_server_finishes_and_takes_nothing_new(start, hold_device):
    near = await start()
    came, go = hold_device(near)
    running = asyncio.create_task(replies_to(near, make_request(encoded(picture()))))
    await asyncio.to_thread(came.wait, 30)
    draining = asyncio.create_task(near.server.drain())
    await asyncio.sleep(0)
    failure = await failure_of(near, make_request(encoded(picture())))
    assert (failure.code(), from_grpc(failure).code) == (grpc.StatusCode.UNAVAILABLE, "draining")
    go.set()
    assert len(await running) == 1
    await draining


# --- callers who leave


@pytest.mark.parametrize("free", [0, 1], ids=["before the first message", "between two"])
async def test_cancelling_drops_what_is_not_encoded(near_small, hold_device, free):
    came, go = hold_device(near_small, free)
    call = near_small.stub.Extract(make_request(encoded(LARGE)), timeout=30)
    reading = asyncio.create_task(call.read())
    await asyncio.to_thread(came.wait, 30)
    if free:
        assert (await reading).first_tile == 0
    assert near_small.server.compute.queued_tiles == 13 - 1 - free
    call.cancel()
    await asyncio.wait([reading])
    await until(lambda: near_small.server.compute.queued_tiles == 0)
    go.set()
    await until(lambda: near_small.server.compute.running_tiles == 0)
    assert near_small.server.compute.num_running == 0
    assert len(await replies_to(near_small, make_request(encoded(picture())))) == 1


@pytest.mark.parametrize("timeout", [0.2, None], ids=["the caller's", "the server's"])
async def test_a_deadline_ends_the_call_and_frees_its_tiles(near_small, hold_device, timeout):
    _, go = hold_device(near_small)
    failure = await failure_of(near_small, make_request(encoded(LARGE)), timeout)
    assert failure.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: near_small.server.compute.queued_tiles == 0)
    go.set()


async def test_a_reader_who_stops_reading_holds_up_nobody_else(near):
    idle = near.stub.Extract(make_request(encoded(LARGE), kind=FEATURE_KIND_LAST_HIDDEN_STATE), timeout=30)
    await idle.read()
    assert len(await replies_to(near, make_request(encoded(picture())))) == 1
    idle.cancel()
    await until(lambda: near.server.compute.num_running == 0)


async def test_who_leaves_with_messages_on_their_way_keeps_nothing(near):
    """The handler stands at a message that the connection does not take any more: nothing wakes it but the end."""
    call = near.stub.Extract(make_request(encoded(LARGE), kind=FEATURE_KIND_LAST_HIDDEN_STATE), timeout=30)
    await call.read()
    await until(lambda: near.server.compute.num_running == 0)  # all is encoded, and most of it not sent
    call.cancel()
    async with asyncio.timeout(10):
        await near.server._servicer.drained()
    await until(lambda: near.server.compute._batcher.held_tiles == 0)  # what encoded it ends a moment later
