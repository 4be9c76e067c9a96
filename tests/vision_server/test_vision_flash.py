"""A real server with a Flash checkpoint: routes and features are those of the published code, whatever the scope."""

import asyncio
from typing import Any

import grpc
import pytest
import torch

from common.service import metrics
from common.service.errors import from_grpc
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16
from protos.vision_pb2 import (
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    VIR_SCOPE_REQUEST,
    ScoreRequest,
    TilingOptions,
    VirOptions,
)
from tests import reference
from tests.checkpoints import VISION_300M, RandomCheckpoint, make_checkpoint
from tests.flash import ABSOLUTE_THRESHOLD, RELATIVE_THRESHOLD, Routed
from tests.vision_server.neighbours import Neighbourhood, encoded, picture

TILING = TilingOptions(min_dynamic_patch=1, max_dynamic_patch=12, use_thumbnail=True)
SIZES = [(900, 900), (448, 448), (900, 450)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> RandomCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("flash"), layout="github", vision=VISION_300M, flash=True)


def pictures() -> list[Any]:
    return [picture(*size, seed=number) for number, size in enumerate(SIZES)]


def vir(mode=VIR_MODE_AUTO, scope=VIR_SCOPE_IMAGE, **values: Any) -> VirOptions:
    thresholds = {"relative_threshold": RELATIVE_THRESHOLD, "absolute_threshold": ABSOLUTE_THRESHOLD}
    return VirOptions(mode=mode, scope=scope, **(thresholds | values))


def routed(checkpoint: RandomCheckpoint, images: list[Any]) -> Routed:
    """All tiles of ``images`` in one call of the published code."""
    assert checkpoint.flash is not None
    model = checkpoint.reference().model
    with torch.no_grad():
        patches = model.vision_tower(reference.pixel_values(images)).last_hidden_state[:, 1:]
        return checkpoint.flash.route(patches, model.multi_modal_projector)


def assert_equal(tiles: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [len(tile) for tile in tiles] == [len(tile) for tile in expected]
    torch.testing.assert_close(torch.cat(tiles), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_batch_tiles", [1, 3, 16])
async def test_scope_image(neighbourhood, checkpoint, max_batch_tiles):
    near: Neighbourhood = await neighbourhood(max_batch_tiles=max_batch_tiles)
    requests = [near.request(encoded(image), vir=vir()) for image in pictures()]
    replies = await asyncio.gather(*map(near.encode, requests))
    for image, request, reply in zip(pictures(), requests, replies, strict=True):
        expected = routed(checkpoint, [image]).features
        assert_equal(near.sink.tiles(request), expected)
        assert list(reply.tokens_per_tile) == [len(tile) for tile in expected]
        assert reply.feature_bytes == sum(tile.nbytes for tile in expected)
    assert {64, 256} == {count for reply in replies for count in reply.tokens_per_tile}


async def test_scope_request_over_several_images(neighbourhood, checkpoint):
    near: Neighbourhood = await neighbourhood()
    images = pictures()
    requests = [near.request(encoded(image), image_index=index) for index, image in enumerate(images)]
    scores = []
    for request in requests:
        call = ScoreRequest(image=request.image, image_hash=request.image_hash, tiling=request.tiling)
        scores += list((await near.stub.Score(call, timeout=30)).scores)
    expected = routed(checkpoint, images)
    torch.testing.assert_close(torch.tensor(scores), expected.scores, atol=1e-5, rtol=0)
    for request in requests:
        request.vir.CopyFrom(vir(scope=VIR_SCOPE_REQUEST, request_scores=scores))
    replies = await asyncio.gather(*map(near.encode, requests))
    assert all(reply.cache_hit for reply in replies)  # what was computed for the scores
    assert_equal([tile for request in requests for tile in near.sink.tiles(request)], expected.features)


async def test_what_was_seen_for_scores_serves_every_dtype(neighbourhood):
    near: Neighbourhood = await neighbourhood(dtype="bfloat16")
    request = near.request(encoded(picture(900, 900)), vir=vir(), dtype=FEATURE_DTYPE_BFLOAT16)
    await near.stub.Score(
        ScoreRequest(image=request.image, image_hash=request.image_hash, tiling=request.tiling), timeout=30
    )
    assert (await near.encode(request)).cache_hit
    assert {tile.dtype for tile in near.sink.tiles(request)} == {torch.bfloat16}


async def test_scores_are_exact_on_the_wire(neighbourhood):
    """In bfloat16, too: a comparison on another server must come out the same."""
    near: Neighbourhood = await neighbourhood(dtype="bfloat16")
    call = ScoreRequest(image=encoded(picture(900, 900)), image_hash=bytes(32), tiling=TILING)
    scores = torch.tensor(list((await near.stub.Score(call, timeout=30)).scores))
    assert len(scores) == 5
    assert torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (vir(VIR_MODE_OFF), [256] * 5),
        (vir(VIR_MODE_FORCE64), [64] * 5),
        (vir(scope=VIR_SCOPE_ABSOLUTE, absolute_threshold=0.0), [64] * 5),
        (vir(scope=VIR_SCOPE_ABSOLUTE, absolute_threshold=1.0), [256] * 5),
        (vir(relative_threshold=1.0), [256] * 5),
    ],
)
async def test_a_request_may_decide_otherwise(neighbourhood, options, expected):
    near: Neighbourhood = await neighbourhood()
    request = near.request(encoded(picture(900, 900)), vir=options)
    assert list((await near.encode(request)).tokens_per_tile) == expected
    assert [len(tile) for tile in near.sink.tiles(request)] == expected


async def test_frames_leave_early_where_a_tile_is_decided_alone(neighbourhood):
    near: Neighbourhood = await neighbourhood(max_batch_tiles=1)
    await near.encode(near.request(encoded(picture(900, 900)), vir=vir(scope=VIR_SCOPE_ABSOLUTE)))
    assert [header.first_tile for header in near.sink.frames] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [vir(scope=VIR_SCOPE_ABSOLUTE), vir(VIR_MODE_FORCE64)])
async def test_an_image_is_divided_where_a_tile_is_decided_alone(neighbourhood, options):
    near: Neighbourhood = await neighbourhood()
    whole = near.request(encoded(picture(900, 900)), vir=options)
    part = near.request(encoded(picture(900, 900)), vir=options, first_tile=1, num_tiles=3)
    replies = [await near.encode(request) for request in (whole, part)]
    assert list(replies[1].tokens_per_tile) == list(replies[0].tokens_per_tile)[1:4]
    tiles = near.sink.tiles_by_number(part)
    assert list(tiles) == [1, 2, 3]
    assert_equal(list(tiles.values()), near.sink.tiles(whole)[1:4])


async def test_an_image_whose_tiles_are_compared_is_not_divided(neighbourhood):
    near: Neighbourhood = await neighbourhood()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.encode(near.request(encoded(picture(900, 900)), vir=vir(), first_tile=1))
    assert from_grpc(failure.value).param == "first_tile"


async def test_another_mode_of_a_cached_image_runs_no_tower(neighbourhood, monkeypatch):
    near: Neighbourhood = await neighbourhood()
    data, same = encoded(picture(900, 900)), bytes(32)
    await near.encode(near.request(data, vir=vir(VIR_MODE_OFF), image_hash=same))
    monkeypatch.setattr(near.server.encoder, "launch", None)
    request = near.request(data, vir=vir(VIR_MODE_FORCE64), image_hash=same)
    assert (await near.encode(request)).cache_hit
    assert [len(tile) for tile in near.sink.tiles(request)] == [64] * 5


async def test_tiles_are_counted_by_their_tokens(neighbourhood):
    near: Neighbourhood = await neighbourhood()
    counters = [metrics.VISION_TILES.labels(count) for count in ("64", "256")]
    before = [counter._value.get() for counter in counters]
    reply = await near.encode(near.request(encoded(picture(900, 900)), vir=vir()))
    counts = [list(reply.tokens_per_tile).count(tokens) for tokens in (64, 256)]
    assert [counter._value.get() - start for counter, start in zip(counters, before, strict=True)] == counts


BAD_OPTIONS = {
    "vir.mode": VirOptions(),
    "vir.scope": VirOptions(mode=VIR_MODE_AUTO),
    "vir.relative_threshold": vir(relative_threshold=float("nan")),
    "vir.absolute_threshold": vir(absolute_threshold=1.5),
    "vir.request_scores": vir(scope=VIR_SCOPE_REQUEST),
}


@pytest.mark.parametrize("field", BAD_OPTIONS)
async def test_bad_options_are_named(neighbourhood, field):
    near: Neighbourhood = await neighbourhood()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.encode(near.request(encoded(picture()), vir=BAD_OPTIONS[field]))
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert from_grpc(failure.value).param == field


async def test_scores_that_are_not_finite_are_bad_options(neighbourhood):
    near: Neighbourhood = await neighbourhood()
    options = vir(scope=VIR_SCOPE_REQUEST, request_scores=[0.5, float("inf")])
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.encode(near.request(encoded(picture()), vir=options))
    assert from_grpc(failure.value).param == "vir.request_scores"
