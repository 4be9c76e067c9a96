"""The caller's end of ``Carrier.Carry``: calls that look like those of gRPC and share one stream.

Knows nothing of what they carry. A call that is carried fails as one of its own would: with the status that its server
gave it, or with that of the connection.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, Final

import grpc
import grpc.aio

from common.service.carrying import (
    CARRY,
    MAX_CARRIED_BYTES,
    MAX_TIMEOUT_SECONDS,
    STATUSES,
    WINDOW,
    pack_metadata,
    unpack_metadata,
)
from protos.carrier_pb2 import Begin, Orders, Reports, Said, Window

_Metadata = tuple[tuple[str, str], ...]


class CarriedCalls:
    """The carried calls of one channel. Belongs to the event loop.

    Args:
        channel: to the server; not owned.
        metadata: of the stream itself.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: _Metadata) -> None:
        self._carry = channel.stream_stream(
            CARRY, request_serializer=Orders.SerializeToString, response_deserializer=Reports.FromString
        )
        self._metadata = metadata
        self._stream: _Stream | None = None

    def begin(
        self,
        method: str,
        request: bytes,
        deserialize: Callable[[bytes], Any],
        timeout: float | None,
        metadata: _Metadata,
    ) -> "CarriedCall":
        """Open a call of ``method``; nothing has been sent when this returns."""
        if self._stream is None or self._stream.is_over:
            self._stream = _Stream(self._carry(metadata=self._metadata))
        return self._stream.begin(method, request, deserialize, timeout, metadata)

    async def close(self) -> None:
        """Calls that are open end."""
        if self._stream is not None:
            await self._stream.close()


class CarriedCall:
    """As ``grpc.aio.UnaryStreamCall``: what a reader needs of it."""

    def __init__(self, stream: "_Stream", call: int, deserialize: Callable[[bytes], Any]) -> None:
        self._stream = stream
        self._call = call
        self._deserialize = deserialize
        self._messages: deque[bytes] = deque()
        self._num_taken = 0
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        self._is_over = False

    async def read(self) -> Any:
        """The next message, or ``grpc.aio.EOF``.

        Raises:
            grpc.aio.AioRpcError: the call has failed.
            asyncio.CancelledError: it was cancelled, as the reader may have been.
        """
        while not self._messages:
            if self._is_over:
                if self._failure is None:
                    return grpc.aio.EOF
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._num_taken += 1
        if self._num_taken == WINDOW // 2:
            self._stream.taken(self._call, self._num_taken)
            self._num_taken = 0
        return self._deserialize(self._messages.popleft())

    @property
    def is_more_ready(self) -> bool:
        """The next ``read`` does not wait, and has a message."""
        return bool(self._messages)

    def cancel(self) -> bool:
        """End it at once, here and there. False where it was over."""
        if self._is_over:
            return False
        self._messages.clear()
        self.end(asyncio.CancelledError())
        self._stream.cancel(self._call)
        return True

    def expire_after(self, timeout: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(0.0, timeout), self._expire)

    def take(self, said: Said) -> None:
        """What its server said."""
        self._messages.extend(said.messages)
        if len(self._messages) > WINDOW:
            # Its server does not keep to the window: nobody may fill our memory.
            self._messages.clear()
            self.end(_failure(grpc.StatusCode.INTERNAL, "more messages than asked for"))
            self._stream.cancel(self._call)
        elif not said.HasField("end"):
            self._wake()
        elif said.end.status == grpc.StatusCode.OK.value[0]:
            self.end(None)
        else:
            status = STATUSES.get(said.end.status, grpc.StatusCode.UNKNOWN)
            self.end(_failure(status, said.end.details, unpack_metadata(said.end.metadata)))

    def end(self, failure: BaseException | None) -> None:
        """Nothing more will come; what has come can still be read."""
        self._is_over = True
        self._failure = failure
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _expire(self) -> None:
        self._messages.clear()
        self.end(_failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        self._stream.cancel(self._call)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Stream:
    """One ``Carry`` and the calls in it. When it breaks they all have."""

    def __init__(self, carry: Any) -> None:
        self._carry = carry
        self._calls: dict[int, CarriedCall] = {}
        self._numbers = count(1)
        self._begin: deque[Begin] = deque()
        self._read: list[Window] = []
        self._cancel: list[int] = []
        self._has_orders = asyncio.Event()
        self.is_over = False
        self._running = asyncio.create_task(self._run(), name="carried calls")

    def begin(
        self,
        method: str,
        request: bytes,
        deserialize: Callable[[bytes], Any],
        timeout: float | None,
        metadata: _Metadata,
    ) -> CarriedCall:
        number = next(self._numbers)
        self._calls[number] = call = CarriedCall(self, number, deserialize)
        begin = Begin(call=number, method=method, request=request, metadata=pack_metadata(metadata))
        if timeout is not None:
            call.expire_after(timeout)
            begin.timeout_seconds = min(max(timeout, _LEAST_TIMEOUT_SECONDS), MAX_TIMEOUT_SECONDS)
        self._begin.append(begin)
        self._has_orders.set()
        return call

    def taken(self, call: int, num_messages: int) -> None:
        """Their reader has taken so many more messages of a call."""
        if call in self._calls:
            self._read.append(Window(call=call, num_messages=num_messages))
            self._has_orders.set()

    def cancel(self, call: int) -> None:
        """Its caller wants no more of it."""
        if self._calls.pop(call, None) is not None and not self.is_over:
            self._cancel.append(call)
            self._has_orders.set()

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        writing = asyncio.create_task(self._write(), name="orders of carried calls")
        failure = _failure(grpc.StatusCode.UNAVAILABLE, "the stream that carried the call was closed")
        try:
            while (reports := await self._carry.read()) is not grpc.aio.EOF:
                for said in reports.said:
                    self._take(said)
        except grpc.aio.AioRpcError as error:
            failure = error
        finally:
            self.is_over = True
            self._carry.cancel()
            for call in self._calls.values():
                call.end(failure)
            self._calls.clear()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _take(self, said: Said) -> None:
        call = self._calls.get(said.call)  # a cancelled one may still be spoken of
        if call is not None:
            call.take(said)
            if said.HasField("end"):
                self._calls.pop(said.call, None)

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader hears of it
            while True:
                await self._has_orders.wait()
                await self._carry.write(self._next_orders())

    def _next_orders(self) -> Orders:
        orders = Orders(read=self._read, cancel=self._cancel)
        self._read, self._cancel = [], []
        num_bytes = 0
        while self._begin and num_bytes < MAX_CARRIED_BYTES:
            begin = self._begin.popleft()
            if begin.call in self._calls:  # it has not been cancelled meanwhile
                num_bytes += len(begin.request)
                orders.begin.append(begin)
        if not self._begin:
            self._has_orders.clear()
        return orders


_LEAST_TIMEOUT_SECONDS: Final = 1e-3
"""What is left is little; 0 would mean that there is no deadline."""


def _failure(status: grpc.StatusCode, details: str, metadata: _Metadata = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)
