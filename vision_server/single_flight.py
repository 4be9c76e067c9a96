"""One computation for all who want the same thing at the same time.

The first who asks starts it, whoever asks meanwhile gets the same items from the first on, and it ends when it is done
or when the last of them has left. Nobody's deadline or cancellation is anybody else's. Knows nothing of images.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import ExitStack, asynccontextmanager
from typing import Generic, TypeVar

from common.service.errors import DvdError, InternalError

log = logging.getLogger(__name__)

T = TypeVar("T")
Source = Callable[[ExitStack], AsyncIterator[T]]
"""Yields the items. What it puts on the stack is given back when the last passenger has left, not before: they may
still be busy with the items."""


class Flight(Generic[T]):
    """Items as they come, kept for those who board late."""

    def __init__(self, source: Source[T]) -> None:
        self.num_passengers = 0
        self._items: list[T] = []
        self._error: DvdError | None = None
        self._news = asyncio.Event()
        self._held = ExitStack()
        self._task = asyncio.create_task(self._run(source(self._held)))

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    async def items(self) -> AsyncIterator[T]:
        """All items, those that are still to come included. Raises DvdError."""
        num_seen = 0
        while True:
            while num_seen < len(self._items):
                yield self._items[num_seen]
                num_seen += 1
            if self._task.done() or self._error is not None:
                break
            self._news.clear()  # everything was looked at in this very moment
            await self._news.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """End what has not ended, and give everything back."""
        self._task.cancel()
        try:
            await asyncio.wait([self._task])
        finally:
            if self._task.done():
                self._held.close()
            else:  # cancelled once more, as by a deadline that passes at both ends of a call
                self._task.add_done_callback(lambda _: self._held.close())

    async def _run(self, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                self._items.append(item)
                self._news.set()
        except DvdError as error:
            self._error = error
        except Exception as error:
            log.error("unexpected failure on the way of an image", exc_info=error)
            self._error = InternalError("the image could not be encoded")
        finally:
            # ``items`` looks at the task, which is done only after this.
            asyncio.get_running_loop().call_soon(self._news.set)


class SingleFlight(Generic[T]):
    """Flights by key."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: Hashable) -> bool:
        """Whether who boards now joins others."""
        return key in self._flights and not self._flights[key].has_failed

    @asynccontextmanager
    async def board(self, key: Hashable, source: Source[T]) -> AsyncIterator[Flight[T]]:
        """Join the flight of ``key``; where there is none, or it has failed, start one."""
        if key not in self:
            self._flights[key] = Flight(source)
        flight = self._flights[key]
        flight.num_passengers += 1
        try:
            yield flight
        finally:
            flight.num_passengers -= 1
            if flight.num_passengers == 0:
                if self._flights.get(key) is flight:
                    del self._flights[key]
                await flight.close()
