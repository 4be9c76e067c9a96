"""One server behind the router: its client, what it says of itself, and the calls this router has open on it.

Knows nothing of HTTP, images or prompts, nor of the other servers (``router.fleet``). Foreign errors (gRPC) become
ours here. A server may be used while its ``WatchStatus`` stream speaks, says READY and names the right checkpoint.
"""

import abc
import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Literal, cast

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
    WatchStatusRequest,
    WorkerStatus,
)
from protos.vision_pb2 import EncodeReply, EncodeRequest, ProbeReply, ProbeRequest, ScoreReply, ScoreRequest
from protos.vision_pb2_grpc import VisionStub

Tier = Literal["vision", "language"]

HEARTBEAT_TIMEOUT_SECONDS: Final = 3.0
"""A worker sends a status every second; without any for this long it is ejected (RELIABILITY.md section 4)."""
_HEARTBEAT_SLICES: Final = 6
_MAX_REASON_CHARS: Final = 160
# What gRPC says, in the middle of much else, and what an operator reads.
_REASONS: Final = {
    "Connection refused": "connection refused",
    "No route to host": "no route to host",
    "Network is unreachable": "network is unreachable",
    "No such file or directory": "no such socket",
    "Permission denied": "permission denied",
    "Connection reset": "connection reset",
    "Socket closed": "connection closed",
    "errors resolving": "its name has no address",
}

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
        self.name = address  # the configured one, once it has told us
        self.status: WorkerStatus | None = None  # None while there is no live status stream
        self.load = 0  # outstanding tiles (vision) or sequences (language) of this router
        self.is_refused = False  # serves another checkpoint
        self.is_leaving = False  # no longer among our servers: finishes what it has
        self.stands_in = False  # it leaves, but none of those who replace it is ready yet
        self._incarnation = b""
        self._costs: dict[grpc.aio.Call, int] = {}  # of the open calls; 0 once they are lost
        self._idle = asyncio.Event()
        self._idle.set()
        self._channel = make_channel(address)
        self._stub = self._make_stub(self._channel)

    @property
    def is_usable(self) -> bool:
        is_ready = self.status is not None and self.status.state == WORKER_STATE_READY
        return is_ready and not self.is_refused and (not self.is_leaving or self.stands_in)

    @property
    def state_name(self) -> str:
        if self.is_leaving:
            return "leaving"
        if self.status is None:
            return "lost"
        return "refused" if self.is_refused else _STATE_NAMES.get(self.status.state, "starting")

    @property
    def num_calls(self) -> int:
        """Calls whose owners have not come to their end."""
        return len(self._costs)

    @property
    def total_load(self) -> int:
        """This router's outstanding work, or what the server reports if others gave it more."""
        return max(self.load, self._reported_load())

    async def follow_status(self) -> AsyncIterator[WorkerStatus]:
        """Statuses until the stream ends. Raises Unavailable, in the operator's words, when it breaks or is silent."""
        call = self._stub.WatchStatus(WatchStatusRequest(router_id="router"))
        try:
            while True:
                status = await _read_within(call, HEARTBEAT_TIMEOUT_SECONDS)
                if status is grpc.aio.EOF:
                    raise Unavailable("the status stream was closed", code="closed")
                yield status
        except grpc.aio.AioRpcError as error:
            raise Unavailable(self._explain(error), code="reset") from None
        except TimeoutError:
            raise Unavailable("does not answer", code="heartbeat") from None
        finally:
            call.cancel()

    def take(self, status: WorkerStatus) -> bool:
        """Believe a status. True for another incarnation than the last: it knows nothing of the calls we had there."""
        is_restarted = self._incarnation not in (b"", status.incarnation)
        if is_restarted:
            self.cancel_calls()
        self._incarnation = status.incarnation
        self.name = status.name or self.address
        self.status = status
        return is_restarted

    def cancel_calls(self) -> None:
        """The server is lost: end its calls now instead of at their deadlines. Their owners see Unavailable.

        They weigh nothing any more: whoever comes back at this address starts with an empty load.
        """
        self.load = 0
        for call in self._costs:
            self._costs[call] = 0
            call.cancel()

    async def wait_idle(self) -> None:
        """Return once no call is open; the caller sets the deadline."""
        while self._costs:
            await self._idle.wait()

    async def close(self) -> None:
        await self._channel.close()

    def _explain(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return f"is not a {self.tier} server"
        details = error.details() or error.code().name
        known = [reason for words, reason in _REASONS.items() if words in details]
        return f"cannot be reached ({known[0] if known else ' '.join(details.split())[:_MAX_REASON_CHARS]})"

    @abc.abstractmethod
    def _make_stub(self, channel: grpc.aio.Channel) -> Any:
        """The tier's gRPC stub."""

    @abc.abstractmethod
    def _reported_load(self) -> int:
        """Tiles or sequences the server itself last said it has."""

    @contextmanager
    def _open(self, call: grpc.aio.Call, cost: int) -> Iterator[None]:
        """Own a call: count its cost, translate its errors, end it in any case."""
        self._costs[call] = cost
        self._idle.clear()
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
            self.load -= self._costs.pop(call)
            metrics.DISPATCH.labels(self.tier, self.name, outcome).inc()
            if not self._costs:
                self._idle.set()


class VisionWorker(Worker):
    """A vision server."""

    tier = "vision"

    async def encode(self, request: EncodeRequest, num_tiles: int, timeout: float) -> EncodeReply:
        """Encode one image and have its features delivered. Cancelling drops it. Raises DvdError."""
        call = self._stub.Encode(request, timeout=timeout)
        with self._open(call, num_tiles):
            reply: EncodeReply = await call
            return reply

    async def score(self, request: ScoreRequest, num_tiles: int, timeout: float) -> ScoreReply:
        """How likely each tile of an image is to be compressed. Raises DvdError."""
        call = self._stub.Score(request, timeout=timeout)
        with self._open(call, num_tiles):
            reply: ScoreReply = await call
            return reply

    async def probe(self, request: ProbeRequest, timeout: float) -> ProbeReply:
        """How long a video is. Raises DvdError."""
        call = self._stub.Probe(request, timeout=timeout)
        with self._open(call, 0):
            reply: ProbeReply = await call
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
