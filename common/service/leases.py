"""What a caller has begun ends with the caller, also when it vanishes without a word.

A killed process closes its connections, and gRPC cancels its calls. One that is stopped, or behind a link that is down,
says and closes nothing. So a router names itself in every call and renews its lease once a second; a server that hears
nothing for a few seconds cancels all calls of that name. gRPC's own pings cannot tell: their answers wait behind the
megabytes that a slow link still has to carry, while renewals have a connection of their own.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc.aio

from common.service import metrics, tracing
from common.service.carried_calls import CarriedCalls
from common.service.carrying import MAX_CARRIED_BYTES
from common.service.errors import Unavailable
from protos import lease_pb2_grpc
from protos.lease_pb2 import RenewReply, RenewRequest

log = logging.getLogger(__name__)

LEASE_SECONDS: Final = 5.0
"""A caller that vanished has no work left on a server after this."""
RENEWAL_SECONDS: Final = 1.0
_TICK_SECONDS: Final = 0.5
_PATIENT_TICKS: Final = 8
"""Ticks are counted rather than time measured: nobody is blamed for what this process itself slept through."""
_CALLER_KEY: Final = "dvd-caller"
_MAX_NAME_CHARS: Final = 64

Lease: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Enter it for the time of a call. Raises Unavailable when the caller has vanished."""


@dataclass(slots=True)
class _Caller:
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    num_silent_ticks: int = 0
    has_vanished: bool = False


class Leases:
    """The callers that have a call open here. Belongs to the event loop."""

    def __init__(self) -> None:
        self._callers: dict[str, _Caller] = {}
        self._ticking: asyncio.Task[None] | None = None

    def of(self, metadata: Sequence[tuple[str, str | bytes]] | None) -> Lease:
        """What bounds a call with this metadata; nothing does where no caller is named."""
        name = next((value for key, value in metadata or () if key == _CALLER_KEY), None)
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_CHARS:
            return nullcontext
        return lambda: self._hold(name)

    def renew(self, name: str) -> None:
        """A sign of life."""
        caller = self._callers.get(name)
        if caller is not None:
            caller.num_silent_ticks = 0

    @contextmanager
    def _hold(self, name: str) -> Iterator[None]:
        caller = self._callers.setdefault(name, _Caller())
        caller.num_silent_ticks = 0
        task = asyncio.current_task()
        assert task is not None  # a handler runs in one
        caller.calls.add(task)
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick(), name="leases")
        try:
            yield
        except asyncio.CancelledError:
            if not caller.has_vanished:
                raise
            task.uncancel()
            raise Unavailable("the caller has vanished", code="lease") from None
        finally:
            caller.calls.discard(task)
            if not caller.calls and self._callers.get(name) is caller:
                del self._callers[name]

    async def _tick(self) -> None:
        """Runs while there are calls."""
        while self._callers:
            await asyncio.sleep(_TICK_SECONDS)
            for name, caller in list(self._callers.items()):
                caller.num_silent_ticks += 1
                if caller.num_silent_ticks > _PATIENT_TICKS:
                    self._end(name, caller)

    def _end(self, name: str, caller: _Caller) -> None:
        log.warning("a caller has vanished: its %d calls are cancelled", len(caller.calls))
        metrics.CANCELLED.labels("lease").inc(len(caller.calls))
        del self._callers[name]  # should it come back, it begins anew
        caller.has_vanished = True
        for task in caller.calls:
            task.cancel()


class LeasedChannel:
    """A channel whose calls name their caller, who is alive as long as this process is. For the stubs of protos.

    Args:
        calls: carries the calls; owned.
        renewals: another connection to the same server; owned.
        carried: methods whose calls share one stream.
    """

    def __init__(
        self, calls: grpc.aio.Channel, renewals: grpc.aio.Channel, carried: frozenset[str] = frozenset()
    ) -> None:
        self._calls = calls
        self._renewals = renewals
        self._name = secrets.token_hex(16)
        self._carried = carried
        self._carrier = CarriedCalls(calls, ((_CALLER_KEY, self._name),))
        self._renewing: asyncio.Task[None] | None = None

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """As ``grpc.aio.Channel`` has it."""
        return self._named(self._calls.unary_unary(*arguments, **options))

    def unary_stream(self, method: str, **options: Any) -> Callable[..., Any]:
        """Likewise."""
        alone = self._named(self._calls.unary_stream(method, **options))
        if method not in self._carried:
            return alone
        return self._carry(method, options["request_serializer"], options["response_deserializer"], alone)

    async def close(self) -> None:
        """Hang up. Calls that are open end."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._carrier.close()
        await self._renewals.close()
        await self._calls.close()

    def _named(self, method: Any) -> Callable[..., Any]:
        metadata = ((_CALLER_KEY, self._name),)

        def call(request: Any, timeout: float | None = None) -> Any:
            self._keep_renewing()
            return method(request, timeout=timeout, metadata=(*metadata, *tracing.outgoing()))

        return call

    def _carry(self, method: str, serialize: Any, deserialize: Any, alone: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None) -> Any:
            data = serialize(request)
            if len(data) > MAX_CARRIED_BYTES:
                return alone(request, timeout=timeout)
            self._keep_renewing()
            return self._carrier.begin(method, data, deserialize, timeout, tuple(tracing.outgoing()))

        return call

    def _keep_renewing(self) -> None:
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew(), name="renew lease")

    async def _renew(self) -> None:
        """For as long as there may be calls."""
        renew = lease_pb2_grpc.LeaseStub(self._renewals).Renew  # type: ignore[no-untyped-call]
        request = RenewRequest(caller=self._name)
        while True:
            with suppress(grpc.aio.AioRpcError):  # whether the server is there is seen elsewhere
                await renew(request, timeout=LEASE_SECONDS)
            await asyncio.sleep(RENEWAL_SECONDS)


class _LeaseServicer(lease_pb2_grpc.LeaseServicer):
    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def Renew(self, request: RenewRequest, context: Any) -> RenewReply:
        self._leases.renew(request.caller)
        return RenewReply()


def add_leases(server: grpc.aio.Server, leases: Leases) -> None:
    """Let ``server`` take renewals."""
    lease_pb2_grpc.add_LeaseServicer_to_server(_LeaseServicer(leases), server)  # type: ignore[no-untyped-call]
