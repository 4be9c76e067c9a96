"""Whatever a router sends: an answer or a status of ours, and the next request is served. See the language server's."""

import os
import random

import grpc
import pytest

from common.service.errors import InternalError, from_grpc, was_raised_by_us
from protos.status_pb2 import FEATURE_DTYPE_FLOAT32
from protos.vision_pb2 import (
    FEATURE_KIND_PROJECTED,
    EncodeRequest,
    ExtractRequest,
    ProbeRequest,
    ScoreRequest,
    TilingOptions,
)
from tests.fuzz.messages import mutated
from tests.vision_server.neighbours import TICKET, encoded, picture
from tests.vision_server.videos import film

SEED = 7
NUM_CALLS = 10 * int(os.environ.get("FUZZ_SECONDS", "60"))
TILING = TilingOptions(min_dynamic_patch=1, max_dynamic_patch=2, use_thumbnail=True)
PATIENCE = 30


def must_be_ours(error: grpc.aio.AioRpcError, request) -> None:
    assert was_raised_by_us(error), (error, request)
    assert not isinstance(from_grpc(error), InternalError), (error, request)
    assert len(error.details() or "") <= 512


@pytest.mark.timeout(600)
async def test_all_calls(neighbourhood):
    near = await neighbourhood("zmq", "grpc")
    rng, image = random.Random(SEED), encoded(picture(40, 30))
    good = [
        near.request(image, max_tiles=2),
        near.request(image, max_tiles=2, vir={}),
        ExtractRequest(image=image, tiling=TILING, dtype=FEATURE_DTYPE_FLOAT32, kind=FEATURE_KIND_PROJECTED),
        ScoreRequest(image=image, image_hash=bytes(32), tiling=TILING),
        ProbeRequest(video=film(3)),
    ]
    calls = {
        EncodeRequest: near.stub.Encode,
        ExtractRequest: near.stub.Extract,
        ScoreRequest: near.stub.Score,
        ProbeRequest: near.stub.Probe,
    }
    refused = 0
    for _ in range(NUM_CALLS):
        request = mutated(rng.choice(good), rng)
        if isinstance(request, EncodeRequest) and len(request.request_id) == 16:
            request.request_id = rng.randbytes(16)  # the receiver of this test takes a tile once
            request.ticket = TICKET if len(request.ticket) == len(TICKET) else request.ticket  # refused there if wrong
        call = calls[type(request)](request, timeout=PATIENCE)
        try:
            if isinstance(request, ExtractRequest):
                async for _ in call:
                    pass
            else:
                await call
        except grpc.aio.AioRpcError as error:
            must_be_ours(error, request)
            refused += 1
    assert NUM_CALLS / 10 < refused < NUM_CALLS
    assert (await near.encode(near.request(image, max_tiles=1))).num_tiles == 1
