"""The sending end of NIXL's transport: see ``nixl``."""

import asyncio
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from common.service.errors import ConfigError, TransportFailed
from common.service.listen import UNIX
from common.transport.nixl_agent import MAX_PAUSE, MIN_PAUSE, NOT_INSTALLED, ExposedMemory, is_installed
from common.transport.nixl_messages import FROM_RECEIVER, Frame, Hello, parse_verdict
from common.transport.records import Kind, Malformed, Records
from common.transport.sender import BoundedSender, TransportLimits
from common.transport.staging import Staging

log = logging.getLogger(__name__)

NAME: Final = "nixl"
MAX_INFLIGHT_FRAMES: Final = 1_024
"""Of one connection, whatever the limits say: the receiver takes no more."""
_PATIENCE: Final = 5.0
"""Seconds for the end of what was told to end."""
_SMALL_BYTES: Final = 256 * 2**10
"""Copied on the event loop: a thread would cost more."""
_ADDRESS: Final = re.compile(r"(unix:/[^\s]+|(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5})", re.ASCII)


@dataclass(slots=True)
class _Pending:
    """A frame without a verdict. Keeps its place and its credit even when nobody waits for it any more."""

    verdict: asyncio.Future[str]
    offset: int
    num_bytes: int


class NixlSender(BoundedSender):
    """A ``FeatureSender`` for one peer: connects at the first send, over for good when the connection breaks."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        super().__init__(NAME, limits)
        if limits.max_inflight_frames > MAX_INFLIGHT_FRAMES:
            raise ConfigError(f"max_inflight_frames {limits.max_inflight_frames}: at most {MAX_INFLIGHT_FRAMES}")
        if not is_installed():
            raise ConfigError(f"transport {NAME}: {NOT_INSTALLED}")
        self._address = address
        self._staging = Staging(limits.max_inflight_bytes)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="nixl-send")  # one copies while one serves reads
        self._is_over = threading.Event()
        self._memory: ExposedMemory | None = None
        self._records: Records | None = None
        self._opening: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._num_events = 0
        self._is_serving = False

    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""
        self._hang_up("this end was closed")
        if self._ending is not None:
            await asyncio.wait({self._ending}, timeout=_PATIENCE)

    async def _connect(self) -> None:
        if self._opening is None:
            self._opening = self._watched(self._open())
        await asyncio.wait({self._opening})
        self._credit.check()

    async def _open(self) -> None:
        async with asyncio.timeout(self._limits.connect_timeout):
            reader, writer = await _dial(self._address)
        self._records = records = Records(reader, writer, FROM_RECEIVER)
        self._watched(records.beat())
        loop = asyncio.get_running_loop()
        memory = await loop.run_in_executor(self._threads, self._expose, records.local_address)
        records.write(Kind.HELLO, Hello(memory.address, self._staging.num_bytes, memory.metadata).pack())
        async with asyncio.timeout(self._limits.connect_timeout):
            await records.expect(Kind.WELCOME)
        self._watched(self._read_verdicts(records))

    async def _exchange(self, packed_header: bytes, payload: memoryview, deadline: float) -> str:
        assert self._memory is not None
        try:
            offset = await self._staging.acquire(len(payload))
        except asyncio.CancelledError:
            self._credit.release(len(payload))
            raise
        self._credit.check()
        pending = _Pending(asyncio.get_running_loop().create_future(), offset, len(payload))
        number = next(self._numbers)
        self._pending[number] = pending
        target = self._memory.bytes[offset : offset + len(payload)]
        if len(payload) <= _SMALL_BYTES:
            target[:] = np.frombuffer(payload, np.uint8) if len(payload) else ()
            self._announce(number, pending, packed_header)
        else:
            self._watched(self._copy(target, payload, number, pending, packed_header))
        return await pending.verdict

    async def _copy(
        self, target: Any, payload: memoryview, number: int, pending: _Pending, packed_header: bytes
    ) -> None:
        source = np.frombuffer(payload, np.uint8)
        await asyncio.get_running_loop().run_in_executor(self._threads, np.copyto, target, source)
        self._announce(number, pending, packed_header)

    def _announce(self, number: int, pending: _Pending, packed_header: bytes) -> None:
        assert self._records is not None
        try:
            frame = Frame(number, pending.offset, pending.num_bytes, packed_header)
            self._records.write(Kind.FRAME, frame.pack())
        except OSError:
            return self._hang_up("the peer takes no more frames")
        self._num_events += 1
        if not self._is_serving:
            self._is_serving = True
            self._watched(self._serve_reads())

    async def _serve_reads(self) -> None:
        """As long as a frame has no verdict."""
        loop = asyncio.get_running_loop()
        while self._pending:
            await loop.run_in_executor(self._threads, self._progress, loop.is_closed)
        self._is_serving = False

    async def _read_verdicts(self, records: Records) -> None:
        while True:
            number, verdict = parse_verdict(await records.expect(Kind.VERDICT))
            pending = self._pending.pop(number, None)
            if pending is None:
                raise Malformed("a verdict on no frame of ours")
            self._num_events += 1
            self._staging.release(pending.offset, pending.num_bytes)
            self._credit.release(pending.num_bytes)
            if not pending.verdict.done():
                pending.verdict.set_result(verdict)

    def _watched(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure is the end of the connection."""
        task = asyncio.create_task(work, name="nixl sender")
        self._tasks.add(task)
        task.add_done_callback(self._on_task_ended)
        return task

    def _on_task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not isinstance(error, OSError | EOFError | TransportFailed):
            log.warning("connection over nixl ended unexpectedly", exc_info=error)
        self._hang_up("the peer cannot be reached" if task is self._opening else "the connection to the peer broke")

    def _hang_up(self, failure: str) -> None:
        """The end of this connection, whatever the cause; the first cause is the one that is told."""
        if self.is_broken:
            return
        self._credit.close(failure)
        self._staging.close(failure)
        self._is_over.set()
        for task in self._tasks:
            task.cancel()
        if self._records is not None:
            self._records.abort()
        for pending in self._pending.values():
            if not pending.verdict.done():
                pending.verdict.set_exception(TransportFailed(failure))
        self._pending.clear()
        self._ending = asyncio.create_task(asyncio.to_thread(self._let_go), name="nixl sender ends")

    # --- on threads

    def _expose(self, local_address: str) -> ExposedMemory:
        self._memory = ExposedMemory(self._staging.num_bytes, local_address)
        return self._memory

    def _progress(self, is_abandoned: Callable[[], bool]) -> None:
        """Serve reads until no frame waits; look rarely when nothing has happened for long."""
        assert self._memory is not None
        pause, num_events = MIN_PAUSE, self._num_events
        while self._pending and not self._is_over.is_set() and not is_abandoned():
            self._memory.progress()
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE) if num_events == self._num_events else MIN_PAUSE
            num_events = self._num_events

    def _let_go(self) -> None:
        self._threads.shutdown()
        if self._memory is not None:
            self._memory.close()


async def _dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not _ADDRESS.fullmatch(address):
        raise ConnectionError("not an address of this transport")
    if address.startswith(UNIX):
        return await asyncio.open_unix_connection(address.removeprefix(UNIX))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))
