"""The receiving end of ``tcp``: a listener, and a thread for each link that blocks where bytes are awaited.

The sink is called on the event loop. A payload is looked at only after its header was placed, and then goes where the
sink keeps it; its checksum is taken on the way. What is refused is read and thrown away, piece by piece.
"""

import asyncio
import contextlib
import errno
import logging
import queue
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from common.service.listen import cannot_listen
from common.transport.base import FrameSink, place_frame, receive_frame
from common.transport.link import Inbox, Link
from common.transport.listen import remove_socket
from common.transport.memory import WarmMemory
from common.transport.meter import ReceiveMeter
from common.transport.sender import TransportLimits
from common.transport.tcp_wire import (
    ANSWER,
    FRAME,
    GREETING,
    HEARTBEAT,
    MAX_VERDICT_BYTES,
    NAME,
    NO_ANSWER,
    NO_FRAME,
    PATIENCE,
    SILENCE,
    address_of,
    listen,
)
from protos.frame import MAX_HEADER_BYTES, FrameHeader, FrameRejected
from protos.status_pb2 import Endpoint

log = logging.getLogger(__name__)

_MAX_PEERS: Final = 512
"""Links that a receiver keeps. Beyond them, the oldest that never brought a good frame goes."""
_SMALL_BYTES: Final = 64 * 2**10
"""Up to here a payload is copied, with its header, in one call of the sink's."""
_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)

_Placed = tuple[FrameHeader, memoryview]


class TcpReceiver:
    """A ``FeatureReceiver`` on ``host:port`` (port 0: any free one) or ``unix:/path``."""

    def __init__(self, address: str, limits: TransportLimits) -> None:
        self._address = address
        self._limits = limits
        self._memory = WarmMemory(limits.max_inflight_bytes)
        self._listener: socket.socket | None = None
        self._peers: dict[Link, _Peer] = {}  # oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, sink: FrameSink) -> Endpoint:
        """Listen, and feed ``sink`` from threads of our own, by way of this loop.

        Raises:
            ConfigError: the address is taken or not one of this machine.
        """
        try:
            self._listener = listener = await listen(self._address)
        except OSError as error:
            raise cannot_listen(self._address, error) from None
        for story in (self._accept(listener, sink), self._say_that_we_are_here()):
            task = asyncio.create_task(story, name="features over tcp")
            self._tasks.add(task)
            task.add_done_callback(self._on_task_ended)
        return Endpoint(transport=NAME, address=address_of(listener))

    async def close(self) -> None:
        """Stop listening; frames in flight are dropped and their senders notice."""
        self._hang_up()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE)
        for link in tuple(self._peers):
            self._forget(link)
        self._memory.close()
        remove_socket(self._address)

    async def _accept(self, listener: socket.socket, sink: FrameSink) -> None:
        while True:
            try:
                connected, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                await asyncio.sleep(HEARTBEAT)  # others may give a descriptor back
                continue
            if not self._has_room():
                connected.close()
                continue
            link = Link(connected, SILENCE)
            peer = self._peers[link] = _Peer(link, sink, self._memory, self._limits, self._hang_up)
            try:
                link.send_now(GREETING)
                link.start(peer.take_frames, partial(self._forget, link))
            except OSError as error:
                log.debug("a link over tcp did not come about: %s", error)
                self._forget(link)

    def _has_room(self) -> bool:
        """Whether there is room for one more. Strangers give way: they cannot keep others out by connecting often."""
        if len(self._peers) < _MAX_PEERS:
            return True
        stranger = next((link for link, peer in self._peers.items() if not peer.is_known), None)
        if stranger is not None:
            self._forget(stranger)
        return stranger is not None

    async def _say_that_we_are_here(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            for peer in self._peers.values():
                peer.say_that_we_are_here()

    def _forget(self, link: Link) -> None:
        peer = self._peers.pop(link, None)
        if peer is not None:
            peer.hang_up()
            link.close()

    def _on_task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            log.error("no longer taking features over tcp", exc_info=task.exception())
            self._hang_up()

    def _hang_up(self) -> None:
        """Senders turn to another transport at once."""
        for task in self._tasks:
            task.cancel()
        for peer in self._peers.values():
            peer.hang_up()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None


class _Peer:
    """One link of a receiver. Its thread asks the sink by way of the loop, and waits in ``_answers`` for the answer."""

    def __init__(
        self, link: Link, sink: FrameSink, memory: WarmMemory, limits: TransportLimits, on_failure: Callable[[], None]
    ) -> None:
        self.is_known = False
        self._link = link
        self._sink = sink
        self._memory = memory
        self._max_frame_bytes = limits.max_frame_bytes
        self._on_failure = on_failure
        self._meter = ReceiveMeter(NAME)
        self._answers: queue.SimpleQueue[_Placed | str | None] = queue.SimpleQueue()
        self._is_over = False

    # --- the thread

    def take_frames(self) -> None:
        """Until the peer leaves, breaks the rules or falls silent, all of which is an OSError."""
        inbox = Inbox(self._link, _SMALL_BYTES, SILENCE)
        while True:
            prefix = inbox.take(FRAME.size)
            if prefix == NO_FRAME:
                continue
            header_bytes, payload_bytes, number = FRAME.unpack(prefix)
            if header_bytes > MAX_HEADER_BYTES or payload_bytes > self._max_frame_bytes:
                self._meter.malformed()
                raise ConnectionError("no frame of ours")
            packed_header = bytes(inbox.take(header_bytes))
            if payload_bytes <= _SMALL_BYTES:
                self._ask(self._receive, number, packed_header, inbox.take(payload_bytes))
            else:
                self._take_payload(inbox, number, packed_header, payload_bytes)

    def _take_payload(self, inbox: Inbox, number: int, packed_header: bytes, num_bytes: int) -> None:
        placed = self._ask(self._place, packed_header, num_bytes)
        if isinstance(placed, str):
            _skip(inbox, num_bytes)
            self._link.tell(self._answer, number, placed, num_bytes)
        else:
            header, memory = placed
            crc = self._link.receive_into(memory, inbox.move_into(memory))
            self._link.tell(self._commit, number, header, memory, crc)

    def _ask(self, question: Callable[..., None], *arguments: Any) -> _Placed | str:
        self._link.tell(question, *arguments)
        answer = self._answers.get()
        if answer is None:
            raise ConnectionError("this end hung up")
        return answer

    # --- event loop

    def hang_up(self) -> None:
        """Nothing is taken any more, whatever the thread has in hand."""
        self._is_over = True
        self._answers.put(None)
        self._link.hang_up()

    def say_that_we_are_here(self) -> None:
        try:
            self._link.send_now(NO_ANSWER)  # or not, if the way is full: then it has enough to read
        except OSError:
            self._link.hang_up()

    def _receive(self, number: int, packed_header: bytes, payload: memoryview) -> None:
        if not self._is_over:
            with self._sink_at_work():
                verdict = receive_frame(self._sink, packed_header, payload)
            self.is_known |= verdict == "ok"
            self._answers.put(verdict)
            self._answer(number, verdict, len(payload))

    def _place(self, packed_header: bytes, num_bytes: int) -> None:
        if not self._is_over:
            with self._sink_at_work():
                try:
                    placed = place_frame(self._sink, packed_header, num_bytes, lambda: self._memory.take(num_bytes))
                except FrameRejected as rejection:
                    return self._answers.put(rejection.reason)
            self.is_known = True
            self._answers.put(placed)

    def _commit(self, number: int, header: FrameHeader, memory: memoryview, crc: int) -> None:
        if not self._is_over:
            verdict = "ok"
            with self._sink_at_work():
                try:
                    self._sink.commit(header, memory, crc)
                except FrameRejected as rejection:
                    verdict = rejection.reason
            self._answer(number, verdict, len(memory))

    def _answer(self, number: int, verdict: str, num_bytes: int) -> None:
        if self._is_over:
            return
        self._meter.received(verdict, num_bytes)
        encoded = verdict.encode()[:MAX_VERDICT_BYTES]
        try:
            is_sent = self._link.send_now(ANSWER.pack(number, len(encoded)) + encoded)
        except OSError:
            is_sent = False
        if not is_sent:  # it has left, or never reads: not waited for
            self._meter.unanswered()
            self._link.hang_up()

    @contextlib.contextmanager
    def _sink_at_work(self) -> Iterator[None]:
        """A failure that is no verdict is one of the sink itself: it gets no more frames. The loop logs it."""
        try:
            yield
        except BaseException:
            log.error("no longer taking features over tcp")
            self._on_failure()
            raise


def _skip(inbox: Inbox, num_bytes: int) -> None:
    while num_bytes:
        num_bytes -= len(inbox.take(min(num_bytes, _SMALL_BYTES)))
