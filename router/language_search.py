"""Which language server gets a request, and which the next when that one is lost.

A request that has been on a lost server is one of many, all of which want another place in the same moment: it waits a
while for room, where a request that only begins is refused at once; both wait for servers that were there just now.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from common.service.errors import Unavailable
from router.fleet import Fleet
from router.workers import LanguageWorker

MAX_ATTEMPTS: Final = 3
"""A request is tried again twice (RELIABILITY.md section 4)."""
PATIENCE_SECONDS: Final = 10.0
"""A server that is restarted loads its model in this time or not much later; a client hears nothing meanwhile."""


class LanguageSearch:
    """The servers one request has been on. Belongs to the request's task."""

    def __init__(self, fleet: Fleet, prefix: bytes | None = None) -> None:
        self._fleet = fleet
        self._prefix = prefix
        self._failed: set[str] = set()  # addresses; whoever comes back there is as good as new
        self._full: set[str] = set()  # had no room a moment ago
        self._num_failures = 0
        self.has_lost_one = False  # a language server failed the request, not one of those who work for it
        self._give_up_at: float | None = None  # loop time; None: there is nothing to wait for

    @contextmanager
    def watch(self) -> Iterator[None]:
        """That something is unavailable inside means the language server itself, not one of those who work for it."""
        try:
            yield
        except Unavailable:
            self.has_lost_one = True
            self._give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS
            raise

    def failed(self, language: LanguageWorker) -> None:
        """The request could not be done there."""
        self._failed.add(language.address)
        self._num_failures += 1

    def may_wait_for(self, language: LanguageWorker) -> bool:
        """Told that it has no room: whether the request is to be tried again, because it was on a lost server."""
        self._full.add(language.address)
        return self.has_lost_one

    async def next(self, request_id: bytes) -> LanguageWorker | None:
        """A server to try. None: enough have failed, or there is none, and will be none soon."""
        if self._num_failures == MAX_ATTEMPTS:
            return None
        while (language := self._pick(request_id)) is None and await self._has_changed():
            pass
        return language

    def _pick(self, request_id: bytes) -> LanguageWorker | None:
        return self._fleet.pick_language(request_id, exclude=self._failed | self._full, prefix=self._prefix)

    async def _has_changed(self) -> bool:
        """Wait for news of any server. False: no more patience."""
        if self._give_up_at is None and not self._failed and self._fleet.may_have("language"):
            self._give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS  # all of them restart just now
        if self._give_up_at is None:
            return False
        self._failed &= {worker.address for worker in self._fleet.language if worker.is_usable}
        try:
            async with asyncio.timeout_at(self._give_up_at):
                await self._fleet.wait_changed()
        except TimeoutError:
            return False
        self._full.clear()
        return True
