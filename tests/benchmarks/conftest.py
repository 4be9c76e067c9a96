"""A server of the chat API that misbehaves as its requests tell it to, and samples made by hand."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks.arrivals import ClosedLoop
from benchmarks.plan import Phase, Source
from benchmarks.samples import Failure, PhaseResult, Sample
from benchmarks.workload import Workload, fixed

DEADLINE = 20.0
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **more}


def sse(*events: Any) -> bytes:
    """Events as they come over the wire; bytes stay as they are."""
    return b"".join(each if isinstance(each, bytes) else b"data: %b\n\n" % json.dumps(each).encode() for each in events)


DONE = b"data: [DONE]\n\n"
ROLE = chunk({"role": "assistant", "content": ""})
USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 300,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 16, "multimodal_tokens": {"image": 256}},
    },
    "metrics": {"dvd": {"images": 1, "tiles": 1, "encode_ms": 5.0, "prefill_ms": 8.0, "feature_wait_ms": None}},
}
GOOD = (ROLE, chunk({"content": "a"}), chunk({"content": ""}), chunk({}, "length"), USAGE, DONE)
ERROR = {"error": {"message": "a server of ours is gone", "type": "server_error", "code": "worker_unavailable"}}


class MisbehavingServer:
    """Real HTTP on a port of its own. ``behaviour`` of a body says what becomes of it; by default all is well."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.num_open = self.most_open = 0
        self.released = asyncio.Event()
        """What requests with the behaviour ``held`` wait for before they end."""

    def release_held(self) -> None:
        """Those that are held now end; who comes next is held again."""
        self.released.set()
        self.released.clear()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next(
                    (int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-le")), 0
                )
                body = await reader.readexactly(length)
                self.headers.append(head)
                if head.startswith("GET"):
                    await self._plain(writer, 200, {"data": [{"id": "misbehaving"}]})
                elif not await self._chat(writer, json.loads(body)):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has hung up
        finally:
            writer.close()

    async def _chat(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        """Whether the connection can be used again."""
        self.bodies.append(body)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await getattr(self, f"_{body.get('behaviour', 'good')}")(writer)
        finally:
            self.num_open -= 1

    async def _good(self, writer: asyncio.StreamWriter) -> bool:
        return await self._stream(writer, *GOOD)

    async def _overloaded(self, writer: asyncio.StreamWriter) -> bool:
        return await self._plain(writer, 503, {"error": {"message": "come later", "code": "overloaded"}})

    async def _gateway(self, writer: asyncio.StreamWriter) -> bool:
        return await self._plain(writer, 502, "Bad Gateway")

    async def _error_event(self, writer: asyncio.StreamWriter) -> bool:
        return await self._stream(writer, *GOOD[:3], b"event: error\n", ERROR, DONE)

    async def _bare_error(self, writer: asyncio.StreamWriter) -> bool:
        return await self._stream(writer, *GOOD[:3], ERROR, DONE)

    async def _no_finish(self, writer: asyncio.StreamWriter) -> bool:
        return await self._stream(writer, *GOOD[:3], DONE)

    async def _aborted(self, writer: asyncio.StreamWriter) -> bool:
        return await self._stream(writer, *GOOD[:3], chunk({}, "abort"), DONE)

    async def _not_json(self, writer: asyncio.StreamWriter) -> bool:
        return await self._stream(writer, ROLE, b"data: {'content'}\n\n", DONE)

    async def _cut(self, writer: asyncio.StreamWriter) -> bool:
        """In the middle of the answer, without a word."""
        self._begin(writer, *GOOD[:3])
        await writer.drain()
        return False

    async def _hang_up(self, writer: asyncio.StreamWriter) -> bool:
        """Before anything is said."""
        return False

    async def _silent(self, writer: asyncio.StreamWriter) -> bool:
        self._begin(writer, *GOOD[:3])
        await asyncio.wait_for(self.released.wait(), DEADLINE)
        return False

    async def _held(self, writer: asyncio.StreamWriter) -> bool:
        self._begin(writer, ROLE, chunk({"content": "a"}))
        async with asyncio.timeout(DEADLINE):  # a wait_for would wait in a task that starts later
            await self.released.wait()
        return await self._end(writer, *GOOD[2:])

    async def _stream(self, writer: asyncio.StreamWriter, *events: Any) -> bool:
        self._begin(writer)
        return await self._end(writer, *events)

    def _begin(self, writer: asyncio.StreamWriter, *events: Any) -> None:
        writer.write(HEAD)
        self._write(writer, *events)

    async def _end(self, writer: asyncio.StreamWriter, *events: Any) -> bool:
        self._write(writer, *events)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _write(self, writer: asyncio.StreamWriter, *events: Any) -> None:
        if data := sse(*events):
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def _plain(self, writer: asyncio.StreamWriter, status: int, content: Any) -> bool:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        await writer.drain()
        return True


@pytest.fixture
async def server() -> AsyncIterator[MisbehavingServer]:
    misbehaving = MisbehavingServer()
    listening = await asyncio.start_server(misbehaving, "127.0.0.1", 0)
    misbehaving.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening:
        yield misbehaving
        misbehaving.released.set()


TEXT = Workload(text_only_share=1.0, input_tokens=fixed(16), output_tokens=fixed(2))


def sample(
    sent_at: float,
    ttft: float = 0.1,
    gaps: tuple[float, ...] = (0.02, 0.02),
    failure: Failure | None = None,
    source: str = "text",
    **more: Any,
) -> Sample:
    """A request that was due when it was sent; seconds."""
    first_at = sent_at + ttft
    values = {"scheduled_at": sent_at, "prompt_tokens": 10, "output_tokens": 1 + len(gaps), "num_images": 0, **more}
    return Sample(
        source=source,
        max_tokens=1 + len(gaps),
        sent_at=sent_at,
        first_at=first_at,
        ended_at=first_at + sum(gaps),
        gaps=list(gaps),
        failure=failure,
        **values,
    )


def phase_result(*samples: Sample, opened_at: float = 0.0, closed_at: float = 10.0) -> PhaseResult:
    """A phase with one source for each name among the samples."""
    names = dict.fromkeys(each.source for each in samples) or {"text": None}
    sources = tuple(Source(name, ClosedLoop(1), TEXT) for name in names)
    phase = Phase("load", sources, duration=closed_at - opened_at)
    return PhaseResult(phase, opened_at, closed_at, list(samples))
