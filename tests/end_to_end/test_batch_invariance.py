"""With ``--batch-invariant``, features are the same bits divided and undivided, whatever a tile is encoded with."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from common.service import rpc
from common.transport.registry import make_receiver
from deploy.colocated import DeviceTurn, LocalTransport
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16
from protos.vision_pb2_grpc import VisionStub
from tests.checkpoints import VISION_6B, VISION_300M, make_checkpoint
from tests.vision_server.neighbours import FeatureSink, Neighbourhood, encoded, picture
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

SIZES = [(448, 448), (900, 900), (900, 450), (1344, 1344)]


@asynccontextmanager
async def serving(path, *, is_divided: bool, **options) -> AsyncIterator[Neighbourhood]:
    """A vision server that delivers over ZMQ, or in its own process as the colocated server does."""
    sink, local = FeatureSink(), LocalTransport()
    receiver = make_receiver("zmq", "127.0.0.1:0") if is_divided else local
    endpoint = await receiver.start(sink)
    settings = VisionSettings(
        model=path, listen="127.0.0.1:0", metrics_listen=None, dtype="bfloat16", batch_invariant=True, **options
    )
    server = VisionServer(settings) if is_divided else VisionServer(settings, courier=local, turn=DeviceTurn())
    await server.start()
    channel = rpc.make_channel(server.address)
    try:
        await server.load()
        yield Neighbourhood(server, VisionStub(channel), [endpoint], sink)
    finally:
        await channel.close()
        assert await server.close()
        await receiver.close()


@pytest.mark.parametrize("shape", [VISION_300M, VISION_6B], ids=["300M", "6B"])
async def test_divided_and_undivided_features_are_the_same_bits(tmp_path, shape):
    make_checkpoint(tmp_path, layout="github", vision=shape)
    images = [encoded(picture(*size, seed=number)) for number, size in enumerate(SIZES)]
    async with (
        serving(tmp_path, is_divided=True, max_batch_tiles=4) as divided,
        serving(tmp_path, is_divided=False, max_batch_tiles=3) as undivided,
    ):
        at_once = [divided.request(image, dtype=FEATURE_DTYPE_BFLOAT16) for image in images]
        await asyncio.gather(*map(divided.encode, at_once))
        for image, request in zip(images, at_once, strict=True):
            alone = undivided.request(image, dtype=FEATURE_DTYPE_BFLOAT16)
            await undivided.encode(alone)
            assert torch.equal(divided.sink.features(request), undivided.sink.features(alone))
