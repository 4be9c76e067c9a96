"""The servers behind the router: one client each, what they say of themselves, and which of them may be used.

Knows nothing of HTTP, images or prompts. Foreign errors (gRPC) become ours here. A server is used while its
``WatchStatus`` stream speaks, says READY and names the checkpoint that this router serves.
"""

import abc
import asyncio
import logging
import random
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Literal, TypeVar, cast

import grpc
import grpc.aio

from common.service import metrics
from common.service.errors import Cancelled, DvdError, Unavailable, from_grpc
from common.service.rpc import make_channel
from protos.language_pb2 import GenerateEvent, GenerateRequest
from protos.language_pb2_grpc import LanguageStub
from protos.status_pb2 import (
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    WORKER_STATE_STARTING,
    ModelInfo,
    WatchStatusRequest,
    WorkerStatus,
)
from protos.vision_pb2 import EncodeReply, EncodeRequest
from protos.vision_pb2_grpc import VisionStub
from router import policy

log = logging.getLogger(__name__)

Tier = Literal["vision", "language"]
WorkerT = TypeVar("WorkerT", bound="Worker")

HEARTBEAT_TIMEOUT_SECONDS: Final = 3.0
"""A worker sends a status every second; without any for this long it is ejected (RELIABILITY.md section 4)."""
_HEARTBEAT_SLICES: Final = 6
_FIRST_BACKOFF_SECONDS: Final = 0.1
_MAX_BACKOFF_SECONDS: Final = 2.0

_STATE_NAMES: Final = {
    WORKER_STATE_STARTING: "starting",
    WORKER_STATE_READY: "ready",
    WORKER_STATE_DRAINING: "draining",
}


class Worker(abc.ABC):
    """One server: its channel, its last status, and the calls this router has open on it."""

    tier: ClassVar[Tier]

    def __init__(self, address: str) -> None:
        self.address = address
        self.status: WorkerStatus | None = None  # None while there is no live status stream
        self.load = 0  # outstanding tiles (vision) or sequences (language) of this router
        self.is_refused = False  # serves another checkpoint
        self._channel = make_channel(address)
        self._stub = self._make_stub(self._channel)
        self._calls: set[grpc.aio.Call] = set()

    @property
    def name(self) -> str:
        return self.status.name if self.status is not None and self.status.name else self.address

    @property
    def is_usable(self) -> bool:
        return self.status is not None and self.status.state == WORKER_STATE_READY and not self.is_refused

    @property
    def state_name(self) -> str:
        if self.status is None:
            return "lost"
        return "refused" if self.is_refused else _STATE_NAMES.get(self.status.state, "starting")

    @property
    def total_load(self) -> int:
        """This router's outstanding work, or what the server reports if others gave it more."""
        return max(self.load, self._reported_load())

    async def follow_status(self) -> AsyncIterator[WorkerStatus]:
        """Statuses until the stream ends. Raises Unavailable when it breaks or falls silent."""
        call = self._stub.WatchStatus(WatchStatusRequest(router_id="router"))
        try:
            while True:
                status = await _read_within(call, HEARTBEAT_TIMEOUT_SECONDS)
                if status is grpc.aio.EOF:
                    raise Unavailable("the status stream was closed", code="closed")
                yield status
        except grpc.aio.AioRpcError:
            raise Unavailable("the status stream broke", code="reset") from None
        except TimeoutError:
            raise Unavailable("no status for too long", code="heartbeat") from None
        finally:
            call.cancel()

    def cancel_calls(self) -> None:
        """The server is lost: end its calls now instead of at their deadlines. Their owners see Unavailable."""
        for call in list(self._calls):
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()

    @abc.abstractmethod
    def _make_stub(self, channel: grpc.aio.Channel) -> Any:
        """The tier's gRPC stub."""

    @abc.abstractmethod
    def _reported_load(self) -> int:
        """Tiles or sequences the server itself last said it has."""

    @contextmanager
    def _open(self, call: grpc.aio.Call, cost: int) -> Iterator[None]:
        """Own a call: count its cost, translate its errors, end it in any case."""
        self._calls.add(call)
        self.load += cost
        outcome = "ok"
        try:
            with translated_errors():
                yield
        except DvdError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            call.cancel()
            self._calls.discard(call)
            self.load -= cost
            metrics.DISPATCH.labels(self.tier, self.name, outcome).inc()


class VisionWorker(Worker):
    """A vision server."""

    tier = "vision"

    async def encode(self, request: EncodeRequest, num_tiles: int, timeout: float) -> EncodeReply:
        """Encode one image and have its features delivered. Cancelling drops it. Raises DvdError."""
        call = self._stub.Encode(request, timeout=timeout)
        with self._open(call, num_tiles):
            reply: EncodeReply = await call
            return reply

    def _make_stub(self, channel: grpc.aio.Channel) -> VisionStub:
        return VisionStub(channel)  # type: ignore[no-untyped-call]

    def _reported_load(self) -> int:
        return 0 if self.status is None else self.status.vision.queued_tiles + self.status.vision.running_tiles


class LanguageWorker(Worker):
    """A language server."""

    tier = "language"

    @contextmanager
    def generate(self, request: GenerateRequest, timeout: float) -> Iterator[AsyncIterator[GenerateEvent]]:
        """An open Generate call; leaving the block ends it on the server too. Iterating raises DvdError."""
        call = self._stub.Generate(request, timeout=timeout)
        with self._open(call, request.sampling.n):
            yield _Events(call)

    def _make_stub(self, channel: grpc.aio.Channel) -> LanguageStub:
        return LanguageStub(channel)  # type: ignore[no-untyped-call]

    def _reported_load(self) -> int:
        return 0 if self.status is None else self.status.language.num_running + self.status.language.num_waiting


async def _read_within(call: Any, seconds: float) -> Any:
    """The next message. Raises TimeoutError after ``seconds`` of silence.

    Waits in slices: when this process itself was stopped for a while (a loaded machine, a suspended one), the timer of
    one slice runs out at once, but the messages that came meanwhile are read in the next. No peer is blamed for it.
    """
    reading = asyncio.ensure_future(call.read())
    try:
        for _ in range(_HEARTBEAT_SLICES):
            await asyncio.wait({reading}, timeout=seconds / _HEARTBEAT_SLICES)
            if reading.done():
                return reading.result()
        raise TimeoutError
    finally:
        reading.cancel()


class Fleet:
    """All servers of this router. Belongs to the event loop; ``start`` it there and ``close`` it there."""

    def __init__(self, vision: Sequence[str], language: Sequence[str]) -> None:
        self.vision = [VisionWorker(address) for address in vision]
        self.language = [LanguageWorker(address) for address in language]
        self.fingerprint: bytes | None = None
        self.model: ModelInfo | None = None  # last known, so that /v1/models answers without any server
        self._watchers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    @property
    def workers(self) -> list[Worker]:
        return [*self.vision, *self.language]

    @property
    def is_ready(self) -> bool:
        """At least one vision and one language server are warm."""
        return self.has_vision and self.has_language

    @property
    def has_vision(self) -> bool:
        return any(worker.is_usable for worker in self.vision)

    @property
    def has_language(self) -> bool:
        return any(worker.is_usable for worker in self.language)

    def start(self) -> None:
        """Follow every server's status until ``close``."""
        self._watchers = [asyncio.create_task(self._watch(worker)) for worker in self.workers]
        for task in self._watchers:
            task.add_done_callback(_log_death)
        self._count_states()

    async def close(self) -> None:
        """Stop following and hang up."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self.workers))

    async def wait_ready(self) -> None:
        """Return once ``is_ready`` holds; the caller sets the deadline."""
        while not self.is_ready:
            await self.wait_changed()

    async def wait_changed(self) -> None:
        """Return at the next status message or loss of any server."""
        await self._changed.wait()

    def pick_language(self, request_id: bytes, exclude: Collection[str] = ()) -> LanguageWorker | None:
        """A usable language server not named in ``exclude``, the least loaded."""
        candidates = _usable(self.language, exclude)
        chosen = policy.pick_language(request_id, {name: worker.total_load for name, worker in candidates.items()})
        return None if chosen is None else candidates[chosen]

    def pick_vision(self, mm_hash: bytes, exclude: Collection[str] = ()) -> VisionWorker | None:
        """A usable vision server not named in ``exclude``, the one on which equal images meet."""
        candidates = _usable(self.vision, exclude)
        loads = {name: worker.total_load for name, worker in candidates.items()}
        chosen = policy.pick_vision(mm_hash, loads)
        return None if chosen is None else candidates[chosen]

    async def _watch(self, worker: Worker) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            try:
                async for status in worker.follow_status():
                    backoff = _FIRST_BACKOFF_SECONDS
                    self._update(worker, status)
            except Unavailable as error:
                self._lose(worker, error.code)
            await asyncio.sleep(random.uniform(backoff / 2, backoff))
            backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    def _update(self, worker: Worker, status: WorkerStatus) -> None:
        before = worker.state_name
        worker.status = status
        self._compare_fingerprints()
        if worker.state_name != before:
            log.info("%s server %s (%s) is %s", worker.tier, worker.name, worker.address, worker.state_name)
        self._notify()

    def _lose(self, worker: Worker, reason: str) -> None:
        if worker.status is not None:
            log.warning("%s server %s (%s) is lost: %s", worker.tier, worker.name, worker.address, reason)
            metrics.SERVER_EJECTIONS.labels(worker.tier, worker.name, reason).inc()
        worker.status = None
        worker.is_refused = False
        worker.cancel_calls()
        self._compare_fingerprints()
        self._notify()

    def _compare_fingerprints(self) -> None:
        """Refuse servers of another checkpoint, and remember what the accepted ones serve."""
        known = [worker for worker in self.workers if worker.status is not None]
        elected = policy.elect_fingerprint(self.fingerprint, [_fingerprint(worker) for worker in known])
        self.fingerprint = elected if elected is not None else self.fingerprint
        for worker in known:
            is_refused = _fingerprint(worker) != self.fingerprint
            if is_refused and not worker.is_refused:
                log.error(
                    "%s server %s (%s) serves another checkpoint: fingerprint %s, expected %s; it gets no work",
                    *(worker.tier, worker.name, worker.address, _fingerprint(worker).hex(), (elected or b"").hex()),
                )
                metrics.SERVER_EJECTIONS.labels(worker.tier, worker.name, "fingerprint").inc()
            worker.is_refused = is_refused
        infos = [w.status.model for w in self.language if w.status is not None and not w.is_refused]
        if infos:
            # A request must fit on whichever server it is sent to.
            self.model = min(infos, key=lambda info: info.max_model_len)

    def _notify(self) -> None:
        self._count_states()
        # Wakes every waiter; the next one waits on a fresh event.
        self._changed.set()
        self._changed = asyncio.Event()

    def _count_states(self) -> None:
        tiers: dict[Tier, Sequence[Worker]] = {"vision": self.vision, "language": self.language}
        for tier, workers in tiers.items():
            names = [worker.state_name for worker in workers]
            for state in ("starting", "ready", "draining", "refused", "lost"):
                metrics.SERVERS.labels(tier, state).set(names.count(state))


@contextmanager
def translated_errors() -> Iterator[None]:
    """Seam: errors of gRPC become ours.

    A call that somebody else cancelled, because its server is lost, raises CancelledError in its owner although the
    owner was not cancelled; that one becomes Unavailable. A cancelled owner stays cancelled.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        ours = from_grpc(error)
        raise (_lost() if isinstance(ours, Cancelled) else ours) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _lost() from None


class _Events:
    """The events of one Generate call."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[GenerateEvent]:
        return self

    async def __anext__(self) -> GenerateEvent:
        with translated_errors():
            event = await self._call.read()
        if event is grpc.aio.EOF:
            raise StopAsyncIteration
        return cast(GenerateEvent, event)


def _lost() -> Unavailable:
    return Unavailable("a server of ours was lost")


def _usable(workers: Sequence[WorkerT], exclude: Collection[str]) -> dict[str, WorkerT]:
    return {worker.address: worker for worker in workers if worker.is_usable and worker.address not in exclude}


def _fingerprint(worker: Worker) -> bytes:
    return b"" if worker.status is None else worker.status.fingerprint


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("a status watcher died", exc_info=task.exception())
