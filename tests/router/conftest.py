"""A real router behind a real socket, with fake servers behind real gRPC."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

from common.service.keys import Keys
from protos.status_pb2 import ModelInfo
from router.__main__ import HttpServer, _listen, http_config
from router.fetch.fetcher import MediaFetcher
from router.server import RouterServer
from router.settings import RouterSettings
from tests.router.fakes import MODEL, FakeLanguage, FakeVision
from tests.router.origins import Authority, Origin, serving_origin

CHAT = "/v1/chat/completions"


class System:
    """One router and its servers."""

    def __init__(
        self, router: RouterServer, url: str, languages: list[FakeLanguage], visions: list[FakeVision]
    ) -> None:
        self.router = router
        self.url = url
        self.languages = languages
        self.visions = visions
        self.http = httpx.AsyncClient(base_url=url, timeout=20)

    @property
    def language(self) -> FakeLanguage:
        return self.languages[0]

    @property
    def vision(self) -> FakeVision:
        return self.visions[0]

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.http.post(CHAT, json={"messages": [user("hello")], **body})

    async def until(self, condition: Any) -> None:
        """Wait for what the fleet's statuses bring about."""
        async with asyncio.timeout(15):
            while not condition():
                await self.router.fleet.wait_changed()

    async def until_idle(self) -> None:
        """Wait until the router holds nothing any more."""
        async with asyncio.timeout(10):
            while self.router.admission.num_running or self.router.admission.held_bytes:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_system(
    num_language: int = 1,
    num_vision: int = 1,
    wait: bool = True,
    start_workers: bool = True,
    model: ModelInfo = MODEL,
    fetcher: MediaFetcher | None = None,
    **options: Any,
) -> AsyncIterator[System]:
    async with AsyncExitStack() as stack:
        languages = [FakeLanguage(f"language-{i}") for i in range(num_language)]
        visions = [FakeVision(languages, f"vision-{i}") for i in range(num_vision)]
        for worker in [*languages, *visions]:
            worker.model = model
            worker.keys = Keys.given(options.get("keys"), "vision" if isinstance(worker, FakeVision) else "language")
            await worker.start()
            stack.push_async_callback(worker.stop)
        servers = {
            "vision": [worker.address for worker in visions],
            "language": [worker.address for worker in languages],
        }
        settings = RouterSettings(port=0, **{**servers, **options})
        if not start_workers:
            for worker in [*languages, *visions]:
                await worker.stop()
        router = RouterServer(settings, fetcher)
        await stack.enter_async_context(router.running())
        url = await stack.enter_async_context(serving(router))
        system = System(router, url, languages, visions)
        stack.push_async_callback(system.http.aclose)
        if wait and start_workers:
            await system.until(lambda: router.fleet.is_ready)
            await system.until(lambda: all(worker.status is not None for worker in router.fleet.workers))
        yield system


@asynccontextmanager
async def serving(router: RouterServer) -> AsyncIterator[str]:
    """The router behind uvicorn, as its main program does it, on a free port."""
    listener = _listen(router.settings)
    http = HttpServer(http_config(router, router.settings))
    task = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        http.should_exit = True
        await task


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with running_system() as running:
        yield running


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def origin(authority: Authority) -> AsyncIterator[Origin]:
    async with serving_origin(authority) as running:
        yield running


def png(color: str = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def user(*parts: Any) -> dict[str, Any]:
    """A user message: strings are text, bytes are images, anything else is a part as it is."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    return {"role": "user", "content": [_part(part) for part in parts]}


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, bytes):
        return {"type": "image_url", "image_url": {"url": data_url(part)}}
    return part


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, after checking what every error must have."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-should-retry"] in ("true", "false")
    assert response.headers["x-request-id"]
    assert len(body["error"]["message"]) <= 512
    return body["error"]
