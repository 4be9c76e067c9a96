"""The body of a streamed answer on its way to a client: begun once, written in order, kept alive on demand.

Knows nothing of what the events say.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from router.api import sse
from router.api.exchange import Exchange
from router.api.patience import Patience


class EventStream:
    """Of one exchange.

    Args:
        slow_reader_timeout: seconds the client may leave unread what was written.
        keep_alive_interval: seconds of silence after which a comment is sent; 0: never.
    """

    def __init__(
        self,
        exchange: Exchange,
        headers: Mapping[str, str],
        *,
        slow_reader_timeout: float,
        keep_alive_interval: float,
    ) -> None:
        self._exchange = exchange
        self._headers = {**sse.HEADERS, **headers}
        self._patience = Patience(slow_reader_timeout)
        self._keep_alive_interval = keep_alive_interval
        self._has_begun = False
        self._written_at = time.monotonic()
        self._writing = asyncio.Lock()  # several prompts, and comments, are written at the same time

    async def write(self, data: bytes, *, more_body: bool = True) -> None:
        """Send a part; status and headers go before the first one.

        Raises:
            Cancelled: the client does not read. The server's buffer is small: who fills it stops us here, and is
                dropped after a while.
        """
        async with self._writing:
            if not self._has_begun:
                await self._begin()
            message = {"type": "http.response.body", "body": data, "more_body": more_body}
            await self._patience.wait(self._exchange.send(message))
            self._written_at = time.monotonic()
        if not more_body:
            self._patience.close()

    async def _begin(self) -> None:
        self._has_begun = True
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._exchange.send({"type": "http.response.start", "status": 200, "headers": raw})

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Comments go out while this is open. The first one may be the first part of all: whatever fails behind it can
        only be told as an event."""
        if not self._keep_alive_interval:
            yield
            return
        task = asyncio.create_task(self._keep_alive())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # a client that does not read fails the next event, too

    async def _keep_alive(self) -> None:
        while True:
            silence = time.monotonic() - self._written_at
            if silence >= self._keep_alive_interval:
                await self.write(sse.KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_interval - silence)
