"""The sending end of ``tcp``: a few links to one peer, each with a thread that sends what waits in their one queue."""

import asyncio
import itertools
import logging
import queue
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from common.service.errors import TransportFailed
from common.transport.link import Link
from common.transport.sender import BoundedSender, TransportLimits
from common.transport.tcp_wire import (
    ANSWER,
    FRAME,
    GREETING,
    HEARTBEAT,
    NAME,
    NO_ANSWER,
    NO_FRAME,
    PATIENCE,
    SILENCE,
    connect,
)

log = logging.getLogger(__name__)

_MAX_LINKS: Final = 2
"""To one peer, so that one moves bytes while the other has its frame placed, and large frames do not hold up small."""
_MAX_SILENT_BEATS: Final = int(SILENCE / HEARTBEAT)
_MAX_RECEIVED: Final = 4_096


@dataclass(slots=True)
class _Frame:
    """One that is not acknowledged. Keeps its credit once it is on its way, even when nobody waits for it any more."""

    number: int
    packed_header: bytes
    payload: memoryview
    verdict: asyncio.Future[str]


class _Reading:
    """What a sender hears over one link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.num_silent = 0
        """Heartbeats since it was last heard: not seconds, as this process may stand still, too."""
        self._received = b""

    def verdicts(self) -> Iterator[tuple[int, str]]:
        """Those that are here. Raises OSError."""
        self._received += self.link.receive_now(_MAX_RECEIVED)
        self.num_silent = 0
        while len(self._received) >= ANSWER.size:
            number, num_bytes = ANSWER.unpack_from(self._received)
            stop = ANSWER.size + num_bytes
            if len(self._received) < stop:
                return
            answer, self._received = self._received[:stop], self._received[stop:]
            if answer != NO_ANSWER:
                yield number, answer[ANSWER.size :].decode("ascii", "replace")


class TcpSender(BoundedSender):
    """A ``FeatureSender`` for one peer: connects at the first send, over for good when any of its links breaks."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        super().__init__(NAME, limits)
        self._address = address
        self._numbers = itertools.count()
        self._pending: dict[int, _Frame] = {}
        self._waiting: queue.SimpleQueue[_Frame | None] = queue.SimpleQueue()  # bounded by credit
        self._links: list[_Reading] = []
        self._opening: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Drop the connection; pending sends fail with ``TransportFailed``."""
        self._hang_up("this end was closed")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE)
        for reading in self._links:
            reading.link.close()

    async def _connect(self) -> None:
        if not self._links:
            if self._opening is None:
                self._opening = self._keep(self._open_first(), "tcp connection")
            await asyncio.wait({self._opening})

    async def _exchange(self, packed_header: bytes, payload: memoryview, deadline: float) -> str:
        frame = _Frame(next(self._numbers), packed_header, payload, asyncio.get_running_loop().create_future())
        self._pending[frame.number] = frame
        if not self._waiting.empty() and len(self._links) < _MAX_LINKS and self._opening is None:
            self._opening = self._keep(self._open_another(), "another tcp connection")
        self._waiting.put(frame)
        return await frame.verdict

    async def _open_first(self) -> None:
        try:
            self._add(await self._dial())
        except (OSError, UnicodeError):
            self._hang_up("the peer cannot be reached")
        self._opening = None

    async def _open_another(self) -> None:
        """One link is enough, if the peer has no second for us; then it is not asked again."""
        try:
            self._add(await self._dial())
        except OSError as error:
            log.debug("no second link over tcp: %s", error)
            return
        self._opening = None

    async def _dial(self) -> Link:
        """A link on which the peer has said that it is one of ours. Raises OSError, of which TimeoutError."""
        async with asyncio.timeout(self._limits.connect_timeout):
            connected = await connect(self._address)
            try:
                greeting = b""
                while len(greeting) < len(GREETING):
                    received = await asyncio.get_running_loop().sock_recv(connected, len(GREETING) - len(greeting))
                    greeting += received
                    if not received:
                        break
                if greeting != GREETING:
                    raise ConnectionError("the peer speaks something else")
            except BaseException:
                connected.close()
                raise
            return Link(connected, SILENCE)

    def _add(self, link: Link) -> None:
        if not self._links:
            self._keep(self._listen_for_life(), "tcp heartbeat")
        reading = _Reading(link)
        self._links.append(reading)
        link.watch(partial(self._read_verdicts, reading))
        link.start(partial(self._send_frames, link), self._on_link_ended)

    def _send_frames(self, link: Link) -> None:
        """In the link's thread. All of them take from one queue, so that none waits behind a frame on another link."""
        while self._send_one(link):
            pass

    def _send_one(self, link: Link) -> bool:
        """False when this was the last. A function of its own, as a payload must not outlive its turn in here."""
        try:
            frame = self._waiting.get(timeout=HEARTBEAT)
        except queue.Empty:
            link.send(NO_FRAME)
            return True
        if frame is None:
            return False
        if frame.verdict.done():  # its caller has left, and nothing of it has
            link.tell(self._settle, frame.number)
        else:
            prefix = FRAME.pack(len(frame.packed_header), len(frame.payload), frame.number)
            link.send(prefix + frame.packed_header, frame.payload)
        return True

    def _read_verdicts(self, reading: _Reading) -> None:
        try:
            for number, verdict in reading.verdicts():
                self._on_verdict(number, verdict)
        except OSError as error:
            log.debug("a link over tcp ended: %s", error)
            self._on_link_ended()

    def _on_verdict(self, number: int, verdict: str) -> None:
        frame = self._settle(number)
        if frame is None:
            raise ConnectionError("a verdict on no frame of ours")
        if not frame.verdict.done():
            frame.verdict.set_result(verdict)

    async def _listen_for_life(self) -> None:
        """Ends the connection when nothing at all has come over one of its links."""
        while all(reading.num_silent < _MAX_SILENT_BEATS for reading in self._links):
            for reading in self._links:
                reading.num_silent += 1
            await asyncio.sleep(HEARTBEAT)
        self._on_link_ended()

    def _settle(self, number: int) -> _Frame | None:
        """The bytes of a frame are no longer on their way, or never were."""
        frame = self._pending.pop(number, None)
        if frame is not None:
            self._credit.release(len(frame.payload))
        return frame

    def _keep(self, story: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(story, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _on_link_ended(self) -> None:
        self._hang_up("the connection to the peer broke")

    def _hang_up(self, failure: str) -> None:
        """The end of this connection, whatever the cause; the first cause is the one that is told."""
        if self.is_broken:
            return
        self._credit.close(failure)
        for task in self._tasks:
            task.cancel()
        for reading in self._links:
            self._waiting.put(None)
            reading.link.hang_up()
        for frame in self._pending.values():
            if not frame.verdict.done():
                frame.verdict.set_exception(TransportFailed(failure))
        self._pending.clear()
