"""An image of which only some tiles are wanted here: the right ones, with their own numbers, and no others."""

import asyncio
from itertools import pairwise

import grpc
import pytest
import torch

from common.service.errors import from_grpc
from protos.vision_pb2 import EncodeRequest
from tests import reference
from tests.vision_server.neighbours import Neighbourhood, encoded, picture
from tests.vision_server.videos import film

LARGE = picture(1000, 1400)  # 2 x 3 tiles of at most 6, and a thumbnail


def expected_features(checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.reference().get_image_features(reference.pixel_values([LARGE], hi=6)).pooler_output


@pytest.mark.parametrize("bounds", [(0, 3, 7), (0, 1, 2, 6, 7), (0, 4, 5, 7)])
async def test_parts_make_up_the_image(neighbourhood, checkpoint, bounds):
    near: Neighbourhood = await neighbourhood(max_batch_tiles=2)
    whole = near.request(encoded(LARGE), max_tiles=6)
    requests = []
    for first, stop in pairwise(bounds):
        request = EncodeRequest()
        request.CopyFrom(whole)
        request.first_tile = first
        request.num_tiles = 0 if stop == 7 else stop - first
        requests.append(request)
    replies = await asyncio.gather(*map(near.encode, requests))
    sizes = [stop - first for first, stop in pairwise(bounds)]
    assert [reply.num_tiles for reply in replies] == sizes
    assert [list(reply.tokens_per_tile) for reply in replies] == [[256] * size for size in sizes]
    assert {header.num_image_tiles for header in near.sink.frames} == {7}
    torch.testing.assert_close(near.sink.features(whole), expected_features(checkpoint), atol=1e-5, rtol=0)


async def test_parts_are_remembered_apart(neighbourhood):
    near: Neighbourhood = await neighbourhood()
    same = {"image_hash": bytes(32), "max_tiles": 6}
    parts = [{"first_tile": 0, "num_tiles": 2}, {"first_tile": 2}, {}]
    for part in parts:
        assert not (await near.encode(near.request(encoded(LARGE), **same, **part))).cache_hit
    for part, size in zip(parts, (2, 5, 7), strict=True):
        reply = await near.encode(near.request(encoded(LARGE), **same, **part))
        assert (reply.cache_hit, reply.num_tiles) == (True, size)


async def test_frames_of_a_video_can_be_divided(neighbourhood):
    near: Neighbourhood = await neighbourhood()
    data = film(num_frames=12)
    whole, part = near.request(data), near.request(data, first_tile=3, num_tiles=2)
    for request in (whole, part):
        request.tiling.num_frames = 6
        await near.encode(request)
    tiles = near.sink.tiles_by_number(part)
    assert list(tiles) == [3, 4]
    for number, tile in tiles.items():
        torch.testing.assert_close(tile, near.sink.tiles(whole)[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "part", [{"first_tile": 5}, {"first_tile": 4, "num_tiles": 2}, {"num_tiles": 6}, {"first_tile": 13}]
)
async def test_tiles_that_the_image_has_not_are_refused(neighbourhood, part):
    near: Neighbourhood = await neighbourhood()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await near.encode(near.request(encoded(picture(900, 900)), **part))  # 5 tiles of 13 that were possible
    error = from_grpc(failure.value)
    assert (failure.value.code(), error.code) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_value")
    assert near.server.compute.queued_tiles == 0
