"""How long a client may leave its answer unread.

A timeout of its own for every token of every stream would cost more than the token: one timer for each stream looks,
when it runs out, since when the stream has been waiting.
"""

import asyncio
from collections.abc import Awaitable

from common.service import metrics
from common.service.errors import Cancelled


class Patience:
    """With one client. Belongs to the task that sends to it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None
        self._is_out = False

    async def wait(self, sending: Awaitable[None]) -> None:
        """Until it is sent. Raises Cancelled when the client does not read for too long."""
        self._waiting_since = self._loop.time()
        self._task = asyncio.current_task()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)
        try:
            await sending
        except asyncio.CancelledError:
            if not self._is_out or self._task is None or self._task.uncancel() > 0:
                raise
            metrics.SLOW_READERS_DROPPED.inc()
            raise Cancelled("the client does not read") from None
        finally:
            self._waiting_since = None

    def close(self) -> None:
        """Nothing more is sent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._waiting_since is None or self._task is None:
            return  # who sends again begins to wait anew
        waited = self._loop.time() - self._waiting_since
        if waited >= self._seconds:
            self._is_out = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)
