"""A tiny checkpoint, and a vision server in this process with its neighbours."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

from common.service import rpc
from common.transport.registry import make_receiver
from protos.vision_pb2_grpc import VisionStub
from tests.checkpoints import VISION_300M, RandomCheckpoint, make_checkpoint
from tests.vision_server.neighbours import FeatureSink, Neighbourhood
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> RandomCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="github", vision=VISION_300M)


@pytest.fixture
async def neighbourhood(checkpoint, tmp_path):
    """Call it with transports and settings; everything it started is closed afterwards."""
    closers: list[Callable[[], Awaitable[Any]]] = []

    async def start(*transports: str, **settings: Any) -> Neighbourhood:
        sink = FeatureSink()
        receivers = [make_receiver(name, "127.0.0.1:0") for name in transports or ("zmq",)]
        endpoints = [await receiver.start(sink) for receiver in receivers]
        closers.extend(receiver.close for receiver in receivers)
        defaults: dict[str, Any] = {
            "model": checkpoint.path,
            "listen": "127.0.0.1:0",
            "metrics_listen": None,
            "dtype": "float32",
            "decode_workers": 1,
        }
        server = VisionServer(VisionSettings(**(defaults | settings)))
        await server.start()
        closers.append(server.close)
        await server.load()
        channel = rpc.make_channel(server.address)
        closers.append(channel.close)
        return Neighbourhood(server, VisionStub(channel), endpoints, sink)

    yield start
    for close in reversed(closers):
        await close()
