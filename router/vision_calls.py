"""One piece of work for the vision tier, given to one server after another until one has done it.

Every call to a vision server goes through here. All of them are idempotent: what a lost server had begun may be done
again elsewhere, and what a slow one does may be done by two at once. The language server takes what comes first.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from common.service import failpoints, metrics
from common.service.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from protos.vision_pb2 import EncodeReply
from router.fleet import Fleet
from router.workers import REFUSALS, ServerLost, VisionWorker

log = logging.getLogger(__name__)

MAX_VISION_ATTEMPTS: Final = 3
_FIRST_PAUSE_SECONDS: Final = 0.01
"""Before work is repeated that a living server failed at: up to so long, and up to twice as long each time."""
_IDLE_SHARE: Final = 2
"""A peer is idle enough for a second attempt if the slow server has so many times its load."""

ReplyT = TypeVar("ReplyT")
_Failure = Unavailable | Overloaded | InternalError


async def call_vision(
    fleet: Fleet,
    image_hash: bytes,
    call: Callable[[VisionWorker, int], Awaitable[ReplyT]],
    *,
    param: str,
    prefer: str | None = None,
    num_tiles: int = 1,
    is_hedged: bool = False,
) -> ReplyT:
    """What ``call`` returns on the first vision server that does it; a lost, full, slow or failing one is replaced.

    Args:
        image_hash: calls for one image meet on one server, where that is not overloaded; and it is quarantined by it.
        call: given a server and the number of attempts before, starting with 0.
        param: where the medium stands in the request; bad input is told with it, and not tried again.
        prefer: address of the server to try first.
        num_tiles: of the work.
        is_hedged: whether two servers may work on it at once.

    Raises:
        InvalidRequest: the medium cannot be used, or is quarantined.
        Unavailable, Overloaded, InternalError: nobody did it; what the last one said.
        DeadlineExceeded: the time is used up.
    """
    fleet.note_request("vision")
    try:
        return await _Work(fleet, image_hash, call, param, prefer, num_tiles, is_hedged).run()
    except InvalidRequest as error:
        raise InvalidRequest(error.message, code=error.code, param=param) from None
    except Unavailable as error:
        raise Unavailable(error.message) from None  # why is ours to know


class _Work(Generic[ReplyT]):
    def __init__(
        self,
        fleet: Fleet,
        image_hash: bytes,
        call: Callable[[VisionWorker, int], Awaitable[ReplyT]],
        param: str,
        prefer: str | None,
        num_tiles: int,
        is_hedged: bool,
    ) -> None:
        self._fleet = fleet
        self._image_hash = image_hash
        self._call = call
        self._param = param
        self._prefer = prefer
        self._num_tiles = num_tiles
        self._is_hedged = is_hedged
        self._num_attempts = 0
        self._failures: list[_Failure] = []
        self._tried: set[str] = set()  # addresses of all that failed or were lost
        self._refused: set[str] = set()  # of those among them that live

    async def run(self) -> ReplyT:
        """Server after server."""
        while True:
            vision = await self._next()
            try:
                return await self._on(vision)
            except (Unavailable, Overloaded, InternalError) as error:
                if error not in self._failures:  # of the first of two attempts at once
                    self._note(vision, error)

    async def _next(self) -> VisionWorker:
        """A server to try. Raises the last failure when enough have failed, or there is no other."""
        failure = self._failures[-1] if self._failures else None
        if failure is not None and len(self._failures) >= MAX_VISION_ATTEMPTS:
            raise failure
        vision = await self._fleet.find_vision(
            self._image_hash, self._tried, self._refused, self._prefer, self._num_tiles
        )
        if vision is None:
            raise failure or _not_ready()
        if failure is not None:
            await self._check_may_retry(failure)
        return vision

    async def _check_may_retry(self, failure: _Failure) -> None:
        if not self._fleet.may_retry("vision", failure):
            raise failure
        metrics.DISPATCH_RETRIES.labels("vision", failure.code).inc()
        if not isinstance(failure, ServerLost):
            await asyncio.sleep(random.uniform(0, _FIRST_PAUSE_SECONDS * 2 ** len(self._failures)))

    def _note(self, vision: VisionWorker, error: _Failure) -> None:
        log.warning("%s was not served by %s: %s", self._param, vision.name, error.code)
        self._failures.append(error)
        self._tried.add(vision.address)
        if not isinstance(error, ServerLost) and error.code not in REFUSALS:
            self._refused.add(vision.address)

    # --- one server

    async def _on(self, vision: VisionWorker) -> ReplyT:
        if self._fleet.quarantine.is_suspect(self._image_hash):
            return await self._attempt(vision)
        return await self._on_or_on_peer(vision)

    async def _attempt(self, vision: VisionWorker, begins: Callable[[], None] = lambda: None) -> ReplyT:
        async with self._fleet.quarantine.trial(lambda: self._image_hash, vision.address):
            if not vision.is_usable:  # any more, after others had their turn
                raise ServerLost("closed", vision.incarnation)
            attempt, self._num_attempts = self._num_attempts, self._num_attempts + 1
            started_at = time.monotonic()
            if failpoints.ARE_ON:
                await failpoints.reach("router.dispatch", self._image_hash)
            begins()
            reply = await self._call(vision, attempt)
        if isinstance(reply, EncodeReply):
            self._fleet.observe_encode(vision, self._num_tiles, time.monotonic() - started_at, reply)
        return reply

    # --- two at once

    async def _on_or_on_peer(self, vision: VisionWorker) -> ReplyT:
        """One attempt, and another on an idle peer if that takes longer than nearly all others did."""
        patience = self._fleet.encode_times.patience(self._num_tiles) if self._is_hedged else None
        if patience is None or len(self._fleet.vision) < 2:
            return await self._attempt(vision)
        with vision.expecting(self._num_tiles) as begins:
            first = asyncio.create_task(self._attempt(vision, begins))
            return await self._first_or_second(first, vision, patience)

    async def _first_or_second(self, first: asyncio.Task[ReplyT], vision: VisionWorker, patience: float) -> ReplyT:
        started_at = time.monotonic()
        attempts = {first: vision}
        try:
            await asyncio.wait(attempts, timeout=patience)
            if not first.done() and (peer := self._idle_peer(vision)) is not None:
                second = asyncio.create_task(self._attempt(peer))
                attempts[second] = peer
                reply = await self._first_of(attempts)
                self._count_hedge(first, second, time.monotonic() - started_at)
                return reply
            return await first
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    def _idle_peer(self, vision: VisionWorker) -> VisionWorker | None:
        peer = self._fleet.pick_vision(self._image_hash, self._tried | {vision.address}, None, self._num_tiles)
        if peer is None or peer.circuit.state != "closed" or peer.total_load * _IDLE_SHARE > vision.total_load:
            metrics.HEDGES.labels("no_peer").inc()
            return None
        if not self._fleet.budgets["vision"].try_hedge(time.monotonic()):
            metrics.HEDGES.labels("no_budget").inc()
            metrics.RETRY_BUDGET_EXHAUSTED.labels("vision").inc()
            return None
        return peer

    async def _first_of(self, attempts: dict[asyncio.Task[ReplyT], VisionWorker]) -> ReplyT:
        """The first reply. Raises the last failure if there is none; all are noted."""
        waiting = set(attempts)
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failed = {attempt: error for attempt in done if (error := attempt.exception()) is not None}
            if succeeded := done - failed.keys():
                return succeeded.pop().result()
            for attempt, error in failed.items():
                if not isinstance(error, _Failure):
                    raise error
                self._note(attempts[attempt], error)
            if not waiting:
                raise self._failures[-1]

    def _count_hedge(self, first: asyncio.Task[ReplyT], second: asyncio.Task[ReplyT], seconds: float) -> None:
        has_won = second.done() and second.exception() is None and not (first.done() and first.exception() is None)
        metrics.HEDGES.labels("won" if has_won else "lost").inc()
        if first.done() and second.done():
            metrics.LATE_RESULTS.labels("duplicate").inc()
        elif not first.done():
            # It would have taken longer than this; to leave it out would make the tier look faster than it is.
            self._fleet.encode_times.observe(self._num_tiles, seconds)


def _not_ready() -> Overloaded:
    return Overloaded("the servers are not ready yet", code="not_ready", retry_after=1.0)
