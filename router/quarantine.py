"""Content that kills servers: remembered by hash, tried alone, and refused once two servers died with it.

All content that was on a server when it died is suspect, most of it by accident. A suspect is tried again with no other
suspect on the same server (``Trial``), so the second death names the culprit, and whoever survives is cleared.
Belongs to the event loop.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from common.service import metrics
from common.service.errors import InvalidRequest
from router.workers import ServerLost

MAX_DEATHS: Final = 2
MAX_ENTRIES: Final = 4096
KEEP_SECONDS: Final = 900.0
"""A death is remembered for so long: software is mended, and content may have been blamed wrongly."""


@dataclass(slots=True)
class _Entry:
    deaths: set[bytes] = field(default_factory=set)
    last_at: float = 0.0


class Quarantine:
    """Remembers which content was there when servers died. Keys are hashes of content, made by the caller."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the oldest death first
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        """Number of keys that are refused."""
        return sum(len(entry.deaths) >= MAX_DEATHS for entry in self._entries.values())

    def check(self, key: bytes) -> None:
        """Raises InvalidRequest ``request_quarantined``, which no client repeats, if two servers died with this."""
        self._forget_old()
        entry = self._entries.get(key)
        if entry is not None and len(entry.deaths) >= MAX_DEATHS:
            metrics.QUARANTINED_REQUESTS.inc()
            raise InvalidRequest(
                "servers failed repeatedly while they worked on this content; it is refused for now",
                code="request_quarantined",
            )

    @property
    def has_suspects(self) -> bool:
        """Whether there is anything to know of any content."""
        self._forget_old()
        return bool(self._entries)

    def is_suspect(self, key: bytes) -> bool:
        """A server died with it."""
        self._forget_old()
        return key in self._entries

    def died_with(self, keys: Iterable[bytes], death: bytes) -> None:
        """A server died while it had these.

        Args:
            death: names the process that died; the same death counts once for a key, however often it is told.
        """
        now = self._clock()
        for key in keys:
            entry = self._entries.setdefault(key, _Entry())
            entry.deaths.add(death)
            entry.last_at = now
            self._entries.move_to_end(key)
        while len(self._entries) > MAX_ENTRIES:
            self._entries.popitem(last=False)
        self._export()

    def survived(self, key: bytes) -> None:
        """A server did it and lives: it was there by accident."""
        if self._entries.pop(key, None) is not None:
            self._export()

    def forgive(self, death: bytes) -> None:
        """The process had not died, only the connection to it."""
        for key, entry in list(self._entries.items()):
            entry.deaths.discard(death)
            if not entry.deaths:
                del self._entries[key]
        self._export()

    def trial(self, key: Callable[[], bytes], server: str) -> "Trial":
        """One attempt at content on a server (its address); ``key`` is asked for only where it matters."""
        return Trial(self, key, server)

    def _turn(self, server: str) -> asyncio.Lock:
        turn = self._turns.get(server)
        if turn is None:
            turn = self._turns[server] = asyncio.Lock()
        return turn

    def _forget_old(self) -> None:
        horizon = self._clock() - KEEP_SECONDS
        while self._entries and next(iter(self._entries.values())).last_at < horizon:
            self._entries.popitem(last=False)
            self._export()

    def _export(self) -> None:
        metrics.QUARANTINE_ENTRIES.set(len(self))


class Trial:
    """Use as an async context manager around the attempt: a suspect waits until no other is on the server.

    Entering raises InvalidRequest if the content is refused. ``ServerLost`` inside tells of a death, an end without an
    error that the content is harmless.
    """

    def __init__(self, quarantine: Quarantine, key: Callable[[], bytes], server: str) -> None:
        self._quarantine = quarantine
        self._key = key
        self._server = server
        self._turn: asyncio.Lock | None = None  # while held
        self._has_passed = False

    def passed(self) -> None:
        """The content has done all the harm it could; the next suspect may come. Safe to call again."""
        if not self._has_passed:
            self._has_passed = True
            if self._quarantine.has_suspects:
                self._quarantine.survived(self._key())
            self._release()

    async def __aenter__(self) -> "Trial":
        if self._quarantine.has_suspects:
            key = self._key()
            self._quarantine.check(key)
            if self._quarantine.is_suspect(key):
                turn = self._quarantine._turn(self._server)
                await turn.acquire()
                self._turn = turn
                self._check_again(key)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.passed()
        elif isinstance(error, ServerLost) and error.is_death and not self._has_passed:
            self._quarantine.died_with([self._key()], error.death)
        self._release()

    def _check_again(self, key: bytes) -> None:
        """Another request with the same content may have had its turn."""
        try:
            self._quarantine.check(key)
        except InvalidRequest:
            self._release()
            raise

    def _release(self) -> None:
        if self._turn is not None:
            self._turn.release()
            self._turn = None
