"""One server behind the router: its client, what it says of itself, and the calls this router has open on it.

Knows nothing of HTTP, images or prompts, nor of the other servers (``router.fleet``). Foreign errors (gRPC) become
ours here. A server may be used while its ``WatchStatus`` stream speaks, says READY and names the right checkpoint.
"""

import abc
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, cast

import grpc
import grpc.aio

from common.service import metrics
from common.service.carried_calls import CarriedCall
from common.service.errors import (
    Cancelled,
    DvdError,
    InternalError,
    InvalidRequest,
    TransportFailed,
    Unavailable,
    from_grpc,
    was_raised_by_us,
)
from common.service.keys import Keys
from common.service.rpc import make_leased_channel
from protos.language_pb2 import (
    DetokenizeReply,
    DetokenizeRequest,
    GenerateEvent,
    GenerateRequest,
    TokenizeReply,
    TokenizeRequest,
)
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
from router.outliers import Circuit, Speed

Tier = Literal["vision", "language"]
LossKind = Literal["reset", "closed", "unreachable", "heartbeat", "progress", "restarted", "drained", "left"]

HEARTBEAT_TIMEOUT_SECONDS: Final = 2.5
"""A worker sends a status every second; without any for this long it is ejected. Its last one may be a second younger
than its end, and a hang must be known within 3 s (RELIABILITY.md section 2)."""
_HEARTBEAT_SLICES: Final = 6
STUCK_STATUSES: Final = 2
"""Statuses, one a second, without progress in spite of work: the server has been stuck for 2 to 3 s. They are counted
rather than timed, so that no server is blamed when this process itself was stopped for a while."""
_STUCK_SECONDS: Final = 1.5
"""Changes of state send statuses besides."""
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
_NOT_KNOWN: Final = {
    "Hostname Verification Check failed": "its certificate is for another role",
    "CERTIFICATE_VERIFY_FAILED": "its certificate has expired, or is of another deployment",
    "WRONG_VERSION_NUMBER": "it has no keys, and this router has",
}

REFUSALS: Final = frozenset({"draining", "not_ready"})
_NOT_ITS_FAULT: Final = REFUSALS | {TransportFailed.default_code, Cancelled.default_code}
"""What a server in order says when it goes, comes, or cannot reach the one that waits for its features."""

_STATE_NAMES: Final = {
    WORKER_STATE_STARTING: "starting",
    WORKER_STATE_READY: "ready",
    WORKER_STATE_DRAINING: "draining",
}


class ServerLost(Unavailable):
    """A server was lost while a call was open on it; the code is for us, clients hear ``worker_unavailable``.

    Args:
        kind: how we know.
        death: names the process that is gone.
    """

    default_code = "server_lost"

    def __init__(self, kind: LossKind, death: bytes) -> None:
        super().__init__("a server of ours was lost")
        self.kind = kind
        self.death = death

    @property
    def is_death(self) -> bool:
        """The process has ended, not by itself: whatever it worked on may be the reason."""
        return self.kind in ("reset", "restarted")


@dataclass(slots=True, eq=False)
class _OpenCall:
    """A call whose owner has not come to its end."""

    cost: int  # 0 once its server is lost
    death: bytes  # names the process it was sent to
    lost: ServerLost | None = None
    failure: DvdError | None = None  # what it ended with; its owner may fail of something else


class Worker(abc.ABC):
    """One server: its channel, its last status, and the calls this router has open on it."""

    tier: ClassVar[Tier]
    carried: ClassVar[frozenset[str]] = frozenset()  # methods whose calls share one stream

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        self.address = address
        self.name = address  # the configured one, once it has told us
        self.status: WorkerStatus | None = None  # None while there is no live status stream
        self.load = 0  # outstanding tiles (vision) or sequences (language) of this router
        self._num_expected = 0  # outstanding, too, of calls that have not begun
        self.is_refused = False  # serves another checkpoint
        self.is_leaving = False  # no longer among our servers: finishes what it has
        self.stands_in = False  # it leaves, but none of those who replace it is ready yet
        self.is_stuck = False  # speaks, but gets nowhere with its work
        self.circuit = Circuit()
        self.usable_until = -1e9  # monotonic seconds of the last moment in which it was known to be usable
        self.heard_at = 0.0  # of its last status
        self.grew_at = 0.0  # of the last one that showed progress
        self.on_ejected: Callable[[Worker], None] = lambda worker: None  # its circuit has opened
        self._is_doubted = False  # a call says it is gone; its next status tells
        self._progress = 0
        self._num_without_progress = 0
        self._incarnation = b""
        self._calls: dict[grpc.aio.Call, _OpenCall] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._keys = keys
        self._connect()

    @property
    def is_usable(self) -> bool:
        is_ready = self.status is not None and self.status.state == WORKER_STATE_READY
        is_trusted = not (self._is_doubted or self.is_stuck or self.is_refused)
        return is_ready and is_trusted and (not self.is_leaving or self.stands_in)

    @property
    def state_name(self) -> str:
        if self.is_leaving:
            return "leaving"
        if self.status is None:
            return "lost"
        if self.is_stuck:
            return "stuck"
        return "refused" if self.is_refused else _STATE_NAMES.get(self.status.state, "starting")

    @property
    def num_calls(self) -> int:
        """Calls whose owners have not come to their end."""
        return len(self._calls)

    @property
    def incarnation(self) -> bytes:
        """Of the process that answered last; empty before any has."""
        return self._incarnation

    @property
    def total_load(self) -> int:
        """This router's outstanding work, or what the server reports if others gave it more."""
        return max(self.load + self._num_expected, self._reported_load())

    @contextmanager
    def expecting(self, cost: int) -> Iterator[Callable[[], None]]:
        """Count work that was chosen for this server, until the call that does it begins and counts it, or this block
        ends: whoever chooses in the same moment must see it. Gives what to call when it begins."""
        left = cost

        def begins() -> None:
            nonlocal left
            self._num_expected -= left
            left = 0

        self._num_expected += cost
        try:
            yield begins
        finally:
            begins()

    async def follow_status(self) -> AsyncIterator[WorkerStatus]:
        """Statuses until the stream ends. Raises Unavailable, in the operator's words, when it breaks or is silent."""
        await self._take_up_new_keys()
        call = self._stub.WatchStatus(WatchStatusRequest(router_id="router"))
        try:
            while True:
                status = await _read_within(call, HEARTBEAT_TIMEOUT_SECONDS, self._export_age)
                if status is grpc.aio.EOF:
                    raise Unavailable("the status stream was closed", code="closed")
                yield status
        except grpc.aio.AioRpcError as error:
            is_ending = self.status is not None and self.status.state == WORKER_STATE_DRAINING
            raise Unavailable(self._explain(error), code="closed" if is_ending else "reset") from None
        except TimeoutError:
            raise Unavailable("does not answer", code="heartbeat") from None
        finally:
            call.cancel()

    def take(self, status: WorkerStatus) -> bool:
        """Believe a status. True for another incarnation than the last: it knows nothing of the calls we had there."""
        is_restarted = self._incarnation not in (b"", status.incarnation)
        if is_restarted:
            self.cancel_calls("restarted")
            self.circuit.reset()
        self._incarnation = status.incarnation
        self.name = status.name or self.address
        self.status = status
        self._is_doubted = False
        self.heard_at = time.monotonic()
        self._watch_progress(status.progress, is_restarted)
        if self.is_usable:
            self.usable_until = self.heard_at
        return is_restarted

    @property
    def has_no_progress(self) -> bool:
        """It has work, speaks, and gets nowhere: a stuck device, say."""
        return self._num_without_progress >= STUCK_STATUSES and self.heard_at - self.grew_at >= _STUCK_SECONDS

    def lose(self, kind: LossKind) -> None:
        """Nothing is known of it any more: it is not used until it speaks again, and what it has is lost."""
        if self.is_usable:
            self.usable_until = time.monotonic()
        self.status = None
        self.is_refused = self.is_stuck = False
        self._num_without_progress = 0
        self.cancel_calls(kind)

    def cancel_calls(self, kind: LossKind = "left") -> None:
        """End all calls now instead of at their deadlines. Their owners see ``ServerLost``.

        They weigh nothing any more: whoever comes back at this address starts with an empty load.
        """
        self.load = 0
        for call, opened in self._calls.items():
            opened.cost = 0
            opened.lost = opened.lost or ServerLost(kind, opened.death)
            call.cancel()

    async def wait_idle(self) -> None:
        """Return once no call is open; the caller sets the deadline."""
        while self._calls:
            await self._idle.wait()

    async def close(self) -> None:
        await self._channel.close()

    def _connect(self) -> None:
        self._generation = 0 if self._keys is None else self._keys.generation
        self._channel = make_leased_channel(self.address, self._keys, self.tier, self.carried)
        self._stub = self._make_stub(self._channel)

    async def _take_up_new_keys(self) -> None:
        """Between two status streams no call is open: a channel shows the certificate that it began with."""
        if self._keys is not None and self._keys.generation != self._generation:
            before = self._channel
            self._connect()
            await before.close()

    def _explain(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return f"is not a {self.tier} server"
        details = error.details() or error.code().name
        if strange := [reason for words, reason in _NOT_KNOWN.items() if words in details]:
            metrics.AUTH_FAILURES.labels("grpc").inc()
            return f"is not believed ({strange[0]})"
        known = [reason for words, reason in _REASONS.items() if words in details]
        return f"cannot be reached ({known[0] if known else ' '.join(details.split())[:_MAX_REASON_CHARS]})"

    @abc.abstractmethod
    def _make_stub(self, channel: grpc.aio.Channel) -> Any:
        """The tier's gRPC stub."""

    @abc.abstractmethod
    def _reported_load(self) -> int:
        """Tiles or sequences the server itself last said it has."""

    def _watch_progress(self, progress: int, is_restarted: bool) -> None:
        """A thread that computes bumps its counter twice a second at least, with or without work."""
        has_grown = progress != self._progress or is_restarted
        self._progress = progress
        is_at_work = self.total_load > 0 and self.status is not None and self.status.state != WORKER_STATE_STARTING
        if has_grown:
            self.is_stuck = False
        if has_grown or not is_at_work or progress == 0:  # a server that does not tell
            self._num_without_progress = 0
            self.grew_at = self.heard_at
        else:
            self._num_without_progress += 1

    def _export_age(self) -> None:
        if self.heard_at:
            metrics.HEARTBEAT_AGE_SECONDS.labels(self.tier, self.name).set(time.monotonic() - self.heard_at)

    @contextmanager
    def _open(self, call: grpc.aio.Call, cost: int) -> Iterator[_OpenCall]:
        """Own a call: count its cost, translate its errors, judge the server by it, end it in any case."""
        self._calls[call] = opened = _OpenCall(cost, self._incarnation)
        self._idle.clear()
        self.load += cost
        self.circuit.begin()
        outcome, is_success = "ok", cast(bool | None, True)
        try:
            with self.translated(opened):
                yield opened
        except DvdError as error:
            outcome, is_success = error.code, _speaks_of_server(error) if error is opened.failure else None
            self._is_doubted |= isinstance(error, Unavailable) and error.code in REFUSALS
            raise
        except BaseException as error:
            outcome, is_success = ("cancelled" if isinstance(error, asyncio.CancelledError) else "error"), None
            raise
        finally:
            call.cancel()
            del self._calls[call]
            self.load -= opened.cost
            metrics.DISPATCH.labels(self.tier, self.name, outcome).inc()
            if not self._calls:
                self._idle.set()
            if self.circuit.end(is_success, time.monotonic()):
                self.on_ejected(self)

    @contextmanager
    def translated(self, opened: _OpenCall) -> Iterator[None]:
        """Seam: errors of gRPC become ours.

        A call that somebody else cancelled, because its server is lost, raises CancelledError in its owner although
        the owner was not cancelled; that one becomes ``ServerLost``. A cancelled owner stays cancelled.
        """
        try:
            yield
        except grpc.aio.AioRpcError as error:
            opened.failure = self._ours(error, opened)
            raise opened.failure from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise opened.lost or ServerLost("reset", opened.death) from None

    def _ours(self, error: grpc.aio.AioRpcError, opened: _OpenCall) -> DvdError:
        ours = from_grpc(error)
        if opened.lost is not None:
            return opened.lost
        if isinstance(ours, Cancelled):  # and not by us
            return Unavailable(ours.message, code="cancelled")
        if type(ours) is Unavailable and not was_raised_by_us(error) and error.code() == grpc.StatusCode.UNAVAILABLE:
            # The connection is gone. The status stream says so as well, a moment sooner or later.
            self._is_doubted = True
            return ServerLost(self._kind_of(error), opened.death)
        return ours

    def _kind_of(self, error: grpc.aio.AioRpcError) -> LossKind:
        if self.status is not None and self.status.state == WORKER_STATE_DRAINING:
            return "drained"
        return "unreachable" if "failed to connect" in (error.details() or "") else "reset"


class VisionWorker(Worker):
    """A vision server."""

    tier = "vision"

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        super().__init__(address, keys)
        self.speed = Speed()

    async def encode(self, request: EncodeRequest, num_tiles: int, timeout: float) -> EncodeReply:
        """Encode one image and have its features delivered. Cancelling drops it. Raises DvdError."""
        call = self._stub.Encode(request, timeout=timeout)
        with self._open(call, num_tiles) as opened:
            reply: EncodeReply = await call
            _check_not_late(opened)
            return reply

    async def score(self, request: ScoreRequest, num_tiles: int, timeout: float) -> ScoreReply:
        """How likely each tile of an image is to be compressed. Raises DvdError."""
        call = self._stub.Score(request, timeout=timeout)
        with self._open(call, num_tiles) as opened:
            reply: ScoreReply = await call
            _check_not_late(opened)
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
    carried = frozenset({"/dvd.v1.Language/Generate"})

    @contextmanager
    def generate(self, request: GenerateRequest, timeout: float) -> Iterator["Events"]:
        """An open Generate call; leaving the block ends it on the server too. Iterating raises DvdError."""
        call = self._stub.Generate(request, timeout=timeout)
        with self._open(call, request.sampling.n) as opened:
            yield Events(self, call, opened)

    async def tokenize(self, request: TokenizeRequest, timeout: float) -> TokenizeReply:
        """The ids of a prompt. Raises DvdError."""
        call = self._stub.Tokenize(request, timeout=timeout)
        with self._open(call, 0):
            reply: TokenizeReply = await call
            return reply

    async def detokenize(self, request: DetokenizeRequest, timeout: float) -> DetokenizeReply:
        """The text of ids. Raises DvdError."""
        call = self._stub.Detokenize(request, timeout=timeout)
        with self._open(call, 0):
            reply: DetokenizeReply = await call
            return reply

    def _make_stub(self, channel: grpc.aio.Channel) -> LanguageStub:
        return LanguageStub(channel)  # type: ignore[no-untyped-call]

    def _reported_load(self) -> int:
        return 0 if self.status is None else self.status.language.num_running + self.status.language.num_waiting


async def _read_within(call: Any, seconds: float, on_slice: Callable[[], None]) -> Any:
    """The next message. Raises TimeoutError after ``seconds`` of silence; ``on_slice`` is called meanwhile.

    Waits in slices: when this process itself was stopped for a while (a loaded machine, a suspended one), the timer of
    one slice runs out at once, but the messages that came meanwhile are read in the next. No peer is blamed for it.
    """
    reading = asyncio.ensure_future(call.read())
    try:
        for _ in range(_HEARTBEAT_SLICES):
            await asyncio.wait({reading}, timeout=seconds / _HEARTBEAT_SLICES)
            on_slice()
            if reading.done():
                return reading.result()
        raise TimeoutError
    finally:
        reading.cancel()


class Events:
    """The events of one Generate call."""

    def __init__(self, worker: LanguageWorker, call: Any, opened: _OpenCall) -> None:
        self._worker = worker
        self._call = call
        self._opened = opened

    @property
    def is_more_ready(self) -> bool:
        """The next event is there; not known of a call that is not carried."""
        return isinstance(self._call, CarriedCall) and self._call.is_more_ready

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> GenerateEvent:
        try:
            event = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            # Once a call, while a context of its own for each token would cost more than what is done with it.
            with self._worker.translated(self._opened):
                raise error
        if event is grpc.aio.EOF:
            raise StopAsyncIteration
        _check_not_late(self._opened)
        return cast(GenerateEvent, event)


def _check_not_late(opened: _OpenCall) -> None:
    """Raises ServerLost for what came from a server that was given up before: its work is done again elsewhere."""
    if opened.lost is not None:
        metrics.LATE_RESULTS.labels("old_incarnation").inc()
        raise opened.lost


def _speaks_of_server(error: DvdError) -> bool | None:
    """Whether a failure is one of the server; None for what every server would say, or one that says it is full.

    A loss is no failure either: whoever comes back is judged by its statuses.
    """
    if isinstance(error, InvalidRequest):
        return True
    is_failure = isinstance(error, InternalError | Unavailable) and not isinstance(error, ServerLost)
    return False if is_failure and error.code not in _NOT_ITS_FAULT else None
