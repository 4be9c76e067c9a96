"""Whose turn it is: requests with images go to the servers a few at a time, as many as keep the vision servers busy.

What is beyond that waits here, in order of arrival. Inside the servers it would gain nothing, as they do no more than
they can, and it would slow down what is under way, text above all: they would hold its state, share their cores with
its connections and look through longer queues.
"""

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """For the event loop only.

    Args:
        max_tiles: that may be under way now, between a turn and the first token; 0: not known, no bound.
    """

    def __init__(self, max_tiles: Callable[[], int]) -> None:
        self._max_tiles = max_tiles
        self._num_tiles = 0  # under way
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def take(self, num_tiles: int) -> "Turn":
        """Wait for a turn. What has no tiles has it at once; what has more than all that may be under way, when nothing
        else is."""
        if num_tiles and (self._waiting or not self._fits(num_tiles)):
            await self._wait(num_tiles)
        else:
            self._num_tiles += num_tiles
        return Turn(self, num_tiles)

    async def _wait(self, num_tiles: int) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = num_tiles, granted
        self._waiting.append(entry)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._waiting.remove(entry)
                self.grant()  # who is behind may fit
            else:
                self._give_back(num_tiles)
            raise

    def _fits(self, num_tiles: int) -> bool:
        max_tiles = self._max_tiles()
        return not self._num_tiles or not max_tiles or self._num_tiles + num_tiles <= max_tiles

    def grant(self) -> None:
        """Give turns to those for whom there is room now."""
        while self._waiting and self._fits(self._waiting[0][0]):
            num_tiles, granted = self._waiting.popleft()
            if not granted.done():
                self._num_tiles += num_tiles
                granted.set_result(None)

    def _give_back(self, num_tiles: int) -> None:
        self._num_tiles -= num_tiles
        self.grant()


class Turn:
    """That of one request. Use as a context manager."""

    def __init__(self, turns: Turns, num_tiles: int) -> None:
        self._turns = turns
        self._num_tiles = num_tiles

    def is_over(self) -> None:
        """The servers have read its images; safe to call again."""
        num_tiles, self._num_tiles = self._num_tiles, 0
        if num_tiles:
            self._turns._give_back(num_tiles)

    def __enter__(self) -> "Turn":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over()
