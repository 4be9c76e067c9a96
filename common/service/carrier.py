"""The server's end of ``Carrier.Carry``: runs the calls of one caller that share its stream.

The services themselves do not know: each call is a handler of theirs with a request and a context, as if it had come
alone. Knows nothing of what they say.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from common.service.carrying import MAX_CARRIED_BYTES, MAX_TIMEOUT_SECONDS, WINDOW, pack_metadata, unpack_metadata
from common.service.errors import DvdError, InternalError, InvalidRequest, to_grpc
from common.service.leases import Lease
from protos.carrier_pb2 import Begin, End, Orders, Reports, Said

log = logging.getLogger(__name__)

Metadata: TypeAlias = tuple[tuple[str, str], ...]
FindHandler: TypeAlias = Callable[[str, Metadata], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]
"""The handler of a method of this server for a call with this metadata."""
CheckPeer: TypeAlias = Callable[["grpc.aio.ServicerContext[Any, Any]", str], None]
Translate: TypeAlias = Callable[[Exception], DvdError]
_OK: Final = grpc.StatusCode.OK.value[0]
_MAX_CALLS: Final = 65_536
"""Of one stream; a server refuses far earlier, in words that routers understand."""
_MAX_UNSENT: Final = 65_536
"""Calls of which something waits to be sent. Whoever begins and never reads is read no further."""


def make_carry_handler(
    find: FindHandler, lease: Lease, check_peer: CheckPeer, translate: Translate
) -> "grpc.RpcMethodHandler[Any, Any]":
    """What answers ``Carry``.

    Args:
        lease: of the caller; each of its calls is held by it.
        check_peer: raises DvdError unless whoever sends the stream may call a method.
        translate: any failure of a handler as one of ours.
    """

    async def carry(unused_requests: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        await _Stream(context, find, lease, check_peer, translate).run()

    return grpc.stream_stream_rpc_method_handler(
        carry, request_deserializer=Orders.FromString, response_serializer=Reports.SerializeToString
    )


class CarriedContext:
    """What a handler may ask of its call; the part of ``grpc.aio.ServicerContext`` that ours use."""

    def __init__(self, begin: Begin) -> None:
        self._metadata = unpack_metadata(begin.metadata)
        self._deadline = time.monotonic() + begin.timeout_seconds if begin.timeout_seconds else None
        self._callbacks: list[Callable[[CarriedContext], None]] = []

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()

    def add_done_callback(self, callback: "Callable[[CarriedContext], None]") -> None:
        self._callbacks.append(callback)

    def done(self) -> None:
        """The call is over."""
        for callback in self._callbacks:
            callback(self)


class _Stream:
    """One ``Carry``."""

    def __init__(
        self, context: Any, find: FindHandler, lease: Lease, check_peer: CheckPeer, translate: Translate
    ) -> None:
        self._context = context
        self._find = find
        self._lease = lease
        self._check_peer = check_peer
        self._translate = translate
        self._outbox = _Outbox()
        self._calls: dict[int, _Call] = {}

    async def run(self) -> None:
        """Until the caller goes. Its calls end with it."""
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(self._outbox.write_to(self._context), name="reports of carried calls")
            while (orders := await self._next_orders()) is not grpc.aio.EOF:
                for begin in orders.begin:
                    self._begin(group, begin)
                for window in orders.read:
                    if (call := self._calls.get(window.call)) is not None:
                        call.window.open(window.num_messages)
                for number in orders.cancel:
                    self._cancel(number)
            for number in list(self._calls):
                self._cancel(number)
            writing.cancel()

    async def _next_orders(self) -> Any:
        await self._outbox.has_room()
        return await self._context.read()

    def _begin(self, group: asyncio.TaskGroup, begin: Begin) -> None:
        if begin.call in self._calls or len(self._calls) >= _MAX_CALLS:
            return self._outbox.end(begin.call, _end(InternalError("a call cannot be carried")))
        window = _Window()
        task = group.create_task(self._serve(begin, window), name="carried call")
        self._calls[begin.call] = _Call(task, window)
        # Not at the task's own end: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda _: self._calls.pop(begin.call, None))
        return None

    def _cancel(self, number: int) -> None:
        if (call := self._calls.pop(number, None)) is not None:
            self._outbox.forget(number)
            call.task.cancel()

    async def _serve(self, begin: Begin, window: "_Window") -> None:
        try:
            end = await self._answer(begin, window)
        except Exception as error:  # noqa: BLE001 - the seam: every failure becomes a status
            end = _end(self._translate(error))
        self._outbox.end(begin.call, end)

    async def _answer(self, begin: Begin, window: "_Window") -> End:
        self._check_peer(self._context, begin.method)
        if not 0 <= begin.timeout_seconds <= MAX_TIMEOUT_SECONDS:
            raise InvalidRequest(f"timeout_seconds is at most {MAX_TIMEOUT_SECONDS:g}")
        context = CarriedContext(begin)
        handler = await self._find(begin.method, context.invocation_metadata())
        if handler is None or not handler.unary_stream:
            return End(status=grpc.StatusCode.UNIMPLEMENTED.value[0], details="Method not found!")
        try:
            async with asyncio.timeout(context.time_remaining()) as deadline:
                with self._lease():
                    request = handler.request_deserializer(begin.request)
                    messages: AsyncGenerator[Any, None] = handler.unary_stream(request, context)
                    # A caller may leave while a message waits: what the method holds goes back then, not at some time.
                    async with aclosing(messages):
                        async for message in messages:
                            self._outbox.add(begin.call, handler.response_serializer(message))
                            await window.pass_one()
        except TimeoutError:
            if not deadline.expired():
                raise
            return End(status=grpc.StatusCode.DEADLINE_EXCEEDED.value[0], details="Deadline Exceeded")
        finally:
            context.done()
        return End(status=_OK)


@dataclass(frozen=True, slots=True)
class _Call:
    task: asyncio.Task[None]
    window: "_Window"


class _Window:
    """How far a call may be ahead of its reader."""

    def __init__(self) -> None:
        self._num_left = WINDOW
        self._is_open = asyncio.Event()
        self._is_open.set()

    def open(self, num_messages: int) -> None:
        self._num_left += num_messages
        if self._num_left > 0:
            self._is_open.set()

    async def pass_one(self) -> None:
        """Count a message. Returns when another may be made; without waiting, as a rule."""
        self._num_left -= 1
        if self._num_left <= 0:
            self._is_open.clear()
            await self._is_open.wait()


class _Outbox:
    """What the calls have said and nobody has sent. Bounded by their windows, and in number by ``has_room``."""

    def __init__(self) -> None:
        self._messages: dict[int, list[bytes]] = {}  # in the order of their first
        self._ends: dict[int, End] = {}
        self._is_filled = asyncio.Event()
        self._has_sent = asyncio.Event()

    def add(self, call: int, message: bytes) -> None:
        self._messages.setdefault(call, []).append(message)
        self._is_filled.set()

    def end(self, call: int, end: End) -> None:
        self._messages.setdefault(call, [])
        self._ends[call] = end
        self._is_filled.set()

    async def has_room(self) -> None:
        """Returns at once, as a rule: once not too many calls wait for what they said to be sent."""
        while len(self._messages) > _MAX_UNSENT:
            self._has_sent.clear()
            await self._has_sent.wait()

    def forget(self, call: int) -> None:
        """Its caller wants no more of it."""
        self._messages.pop(call, None)
        self._ends.pop(call, None)

    async def write_to(self, context: Any) -> None:
        """For ever: all that is there leaves in one message, and more gathers while it does."""
        while True:
            await self._is_filled.wait()
            reports = self._next_reports()
            if reports.said:
                await context.write(reports)
                self._has_sent.set()

    def _next_reports(self) -> Reports:
        reports = Reports()
        num_bytes = 0
        while self._messages and num_bytes < MAX_CARRIED_BYTES:
            call = next(iter(self._messages))
            messages = self._messages.pop(call)
            reports.said.append(Said(call=call, messages=messages, end=self._ends.pop(call, None)))
            num_bytes += sum(map(len, messages))
        if not self._messages:
            self._is_filled.clear()
        return reports


def _end(error: DvdError) -> End:
    status, details, metadata = to_grpc(error)
    return End(status=status.value[0], details=details, metadata=pack_metadata(metadata))
