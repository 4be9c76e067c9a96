"""All three servers in this process, features over TCP, and somebody who listens there."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from typing_extensions import Buffer

from common.service import metrics
from common.transport.base import FeatureReceiver, FrameSink, Lend
from common.transport.registry import make_receiver
from deploy.settings import NANO, model_directory
from language_server.server import LanguageServer
from language_server.settings import LanguageSettings
from protos.frame import FrameHeader
from protos.status_pb2 import Endpoint
from router.server import RouterServer
from router.settings import RouterSettings
from tests.common.transport.fakes import Relay
from tests.end_to_end.conftest import user
from tests.router.conftest import serving
from vision_server.server import VisionServer
from vision_server.settings import VisionSettings

MODEL = model_directory(NANO)
QUESTION, ANSWER = "Which number do you see?", "The number is 7059."
PICTURE = base64.b64encode((MODEL / "images" / "number.png").read_bytes()).decode()
SERVER: dict[str, Any] = {
    "model": MODEL,
    "listen": "127.0.0.1:0",
    "metrics_listen": None,
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
}


@dataclass
class Understood:
    """A ``FrameSink`` that notes what the one behind it has accepted."""

    sink: FrameSink
    payloads: list[bytes] = field(default_factory=list)

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        return self.sink.place(header, packed_header, lend)

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        self.sink.commit(header, memory, payload_crc32c)
        self.payloads.append(bytes(memory))


class Overheard:
    """A ``FeatureReceiver`` over TCP behind a relay, which keeps all that passes."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._receiver: FeatureReceiver = make_receiver("tcp", "127.0.0.1:0")
        self.relay: Relay | None = None
        self.understood: Understood | None = None

    async def start(self, sink: FrameSink) -> Endpoint:
        self.understood = Understood(sink)
        self.relay = Relay(await self._receiver.start(self.understood), self._directory)
        self.relay.keeps = True
        return await self.relay.start()

    async def close(self) -> None:
        assert self.relay is not None
        await self.relay.close()
        await self._receiver.close()

    @property
    def heard(self) -> bytes:
        assert self.relay is not None
        return b"".join(self.relay.forwarded)

    @property
    def said(self) -> bytes:
        """Of the one frame there was."""
        assert self.understood is not None
        (payload,) = self.understood.payloads
        return payload


@dataclass
class System:
    feature_plane: Overheard
    url: str

    async def answer(self) -> str:
        messages = [user(QUESTION, f"data:image/png;base64,{PICTURE}")]
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            response = await http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0})
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["message"]["content"]
        return text


@asynccontextmanager
async def running(directory: str, seals: bool) -> AsyncIterator[System]:
    async with AsyncExitStack() as stack:
        vision = VisionServer(VisionSettings(**SERVER, decode_workers=1, transports=("tcp",)))
        feature_plane = Overheard(directory)
        language = LanguageServer(LanguageSettings(**SERVER, encrypt_features=seals), receivers=[feature_plane])
        for server in (vision, language):
            await server.start()
            stack.push_async_callback(server.close)
            await server.load()
        servers: dict[str, Any] = {"vision": [vision.address], "language": [language.address]}
        router = RouterServer(RouterSettings(port=0, **servers))
        await stack.enter_async_context(router.running())
        url = await stack.enter_async_context(serving(router))
        async with asyncio.timeout(60):
            while not router.fleet.is_ready:
                await router.fleet.wait_changed()
        yield System(feature_plane, url)


async def test_who_listens_reads_features_in_clear(tmp_path):
    """What makes the next test mean something."""
    async with running(str(tmp_path), seals=False) as system:
        assert await system.answer() == ANSWER
        assert system.feature_plane.said in system.feature_plane.heard


async def test_who_listens_reads_nothing_of_sealed_ones_and_the_answer_is_the_same(tmp_path):
    async with running(str(tmp_path), seals=True) as system:
        assert await system.answer() == ANSWER
        heard, said = system.feature_plane.heard, system.feature_plane.said
        assert len(heard) > len(said)
        assert not any(said[start : start + 16] in heard for start in range(0, len(said), 1024))


async def test_a_request_survives_a_sealed_frame_that_was_changed_on_its_way(tmp_path):
    refused = metrics.TRANSFER_FRAMES_REJECTED.labels("tcp", "receive", "seal")
    before = refused._value.get()
    async with running(str(tmp_path), seals=True) as system:
        assert system.feature_plane.relay is not None
        system.feature_plane.relay.flip_a_bit_after(4096)  # behind greeting and header
        assert await system.answer() == ANSWER
    assert refused._value.get() == before + 1
