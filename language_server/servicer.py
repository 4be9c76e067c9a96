"""The gRPC face of the language server: who may come in, and what is let go of when a caller leaves."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias, TypeVar

import grpc.aio

from common.service import failpoints, rpc, tracing
from common.service.errors import Overloaded, Unavailable
from common.service.status import StatusBoard
from language_server.generation import Backend, Generation
from language_server.texts import Texts
from protos import language_pb2_grpc
from protos.language_pb2 import (
    DetokenizeReply,
    DetokenizeRequest,
    GenerateEvent,
    GenerateRequest,
    TokenizeReply,
    TokenizeRequest,
)
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_STARTING, WatchStatusRequest, WorkerStatus

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_PLACES: Final[dict[str | None, str]] = {"admitted": "admit", "finished": "finish"}
"""Failpoints, by what is about to leave."""
_PartT = TypeVar("_PartT")


class LanguageServicer(language_pb2_grpc.LanguageServicer):
    """The gRPC face: each ``Generate`` is one ``Generation``."""

    def __init__(self, board: StatusBoard, request_timeout: float, max_num_open: int) -> None:
        self._board = board
        self._max_num_open = max_num_open
        self._request_timeout = request_timeout
        self._open: set[Generation] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.backend: Backend | None = None  # once loaded
        self.texts: Texts | None = None  # likewise

    async def drained(self) -> None:
        """Returns once no ``Generate`` is running."""
        await self._idle.wait()

    async def Generate(self, request: GenerateRequest, context: _Context) -> AsyncIterator[GenerateEvent]:
        """See ``Generation.events``; a server that is not ready answers Unavailable."""
        backend = self._ready(self.backend)
        if len(self._open) >= self._max_num_open:
            raise Overloaded("too many requests are waiting")
        remaining = rpc.remaining_seconds(context)
        timeout = self._request_timeout if remaining is None else min(remaining, self._request_timeout)
        trace = tracing.parent_of(context.invocation_metadata())
        generation = Generation(backend, request, time.monotonic() + timeout, trace)
        self._open.add(generation)
        self._idle.clear()
        # A generator that is suspended when its caller leaves runs no further: the call itself must tell us.
        context.add_done_callback(lambda _: self._close(generation))
        try:
            async for event in generation.events():
                if failpoints.ARE_ON:
                    place = _PLACES.get(event.WhichOneof("event"), "token")
                    await failpoints.reach(f"language.{place}", request.SerializeToString())
                yield event
        finally:
            self._close(generation)

    async def Tokenize(self, request: TokenizeRequest, context: _Context) -> TokenizeReply:
        """See ``Texts.tokenize``; a server that is not ready answers Unavailable."""
        return await self._ready(self.texts).tokenize(request)

    async def Detokenize(self, request: DetokenizeRequest, context: _Context) -> DetokenizeReply:
        """See ``Texts.detokenize``; likewise."""
        return await self._ready(self.texts).detokenize(request)

    async def WatchStatus(self, request: WatchStatusRequest, context: _Context) -> AsyncIterator[WorkerStatus]:
        """State and load for one router, for as long as it listens."""
        async for status in self._board.watch():
            yield status

    def _ready(self, part: _PartT | None) -> _PartT:
        """A part that is there once the server is loaded. Raises Unavailable before, and while draining."""
        if part is None or self._board.state == WORKER_STATE_STARTING:
            raise Unavailable("this server is starting", code="not_ready")
        if self._board.state == WORKER_STATE_DRAINING:
            raise Unavailable("this server is draining", code="draining")
        return part

    def _close(self, generation: Generation) -> None:
        generation.close()
        self._open.discard(generation)
        if not self._open:
            self._idle.set()
