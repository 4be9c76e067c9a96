"""Load on one HTTP server at the least cost to whoever makes it: the same bytes over and over, on kept connections.

For servers that cost so little that ``benchmarks.client`` would be what is measured. Knows that an answer is chunked
events; reads nothing in them. Times are seconds of ``time.perf_counter``.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

from common.service.errors import Unavailable

_OK: Final = b"HTTP/1.1 200 "
_FIRST: Final = b"data: "
_END: Final = b"0\r\n\r\n"
"""An event ends with an empty line, so no chunk of one looks like the last."""
_ANSWER_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. ``first_token``, ``whole``: seconds from sending to its first and its last event."""

    first_token: float
    whole: float
    data: bytes


def post(url: str, body: bytes) -> bytes:
    """What goes over the wire."""
    parts = urlsplit(url)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    head = f"POST {target} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """Carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []
        self._sent_at = 0.0
        self._first_at: float | None = None
        self._answer: asyncio.Future[Answer] | None = None

    async def ask(self, request: bytes) -> Answer:
        """Send ``request`` and wait for the end of its answer.

        Raises:
            Unavailable: the connection broke, or the answer is no stream.
            TimeoutError: no end within half a minute.
        """
        if self._transport is None:
            raise Unavailable("the server has hung up")
        self._pieces, self._first_at = [], None
        self._answer = asyncio.get_running_loop().create_future()
        self._sent_at = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(_ANSWER_SECONDS):
            return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail("the server has hung up")

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._pieces.append(data)
        if self._first_at is None:
            so_far = b"".join(self._pieces)
            if not so_far.startswith(_OK[: len(so_far)]):
                return self._fail(f"the server answered {so_far[:200].decode(errors='replace')}")
            if _FIRST not in so_far:
                return
            self._first_at = now
        if self._answer is not None and not self._answer.done() and self._is_complete():
            first_token, whole = self._first_at - self._sent_at, now - self._sent_at
            self._answer.set_result(Answer(first_token, whole, b"".join(self._pieces)))

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def _is_complete(self) -> bool:
        last = self._pieces[-1]
        tail = last if len(last) >= len(_END) else b"".join(self._pieces[-len(_END) :])
        return tail.endswith(_END)

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Unavailable(why))


@asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[list[Connection]]:
    """``count`` of them, open."""
    parts = urlsplit(url)
    assert parts.hostname is not None  # ours
    opened: list[Connection] = []
    loop = asyncio.get_running_loop()
    try:
        for _ in range(count):
            _, connection = await loop.create_connection(Connection, parts.hostname, parts.port or 80)
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def closed_loop(url: str, body: bytes, num_at_once: int, seconds: float) -> float:
    """Answers per second: each connection asks again as soon as it has its answer. Raises as ``Connection.ask``."""
    request = post(url, body)
    async with connections(url, num_at_once) as opened:
        began_at = time.perf_counter()
        ends_at = began_at + seconds
        counts = await asyncio.gather(*(_ask_until(ends_at, connection, request) for connection in opened))
        return sum(counts) / (time.perf_counter() - began_at)


async def _ask_until(ends_at: float, connection: Connection, request: bytes) -> int:
    count = 0
    while time.perf_counter() < ends_at:
        await connection.ask(request)
        count += 1
    return count


async def fixed_rate(url: str, body: bytes, per_second: float, seconds: float) -> list[Answer]:
    """Answers to requests at even distances, on two connections in turns. Raises likewise.

    At a low rate each finds a connection free; one that does not waits unsent, and its time begins when it is sent.
    """
    request = post(url, body)
    async with connections(url, 2) as opened:
        free: asyncio.Queue[Connection] = asyncio.Queue()
        for connection in opened:
            free.put_nowait(connection)
        began_at = time.perf_counter()
        asking = []
        for index in range(max(1, round(seconds * per_second))):
            await asyncio.sleep(max(0.0, began_at + index / per_second - time.perf_counter()))
            asking.append(asyncio.create_task(_ask_on(free, request)))
        return await asyncio.gather(*asking)


async def _ask_on(free: asyncio.Queue[Connection], request: bytes) -> Answer:
    connection = await free.get()
    try:
        return await connection.ask(request)
    finally:
        free.put_nowait(connection)
