"""Whole messages, with descriptors, between two processes of one user on one host: a SOCK_SEQPACKET socket on the loop.

Nothing here waits: what the socket does not take at once is queued within a bound, and what arrives is handed to a
callback. The kernel tells at once when the peer has died. Addresses are in the abstract namespace: names that vanish
with their owner, so there is no file that a crash could leave. Knows nothing of what the messages say.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from typing_extensions import Buffer

_BUFFER_BYTES: Final = 2**20
_MAX_DESCRIPTORS: Final = 1
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS)
_AT_ONCE: Final = 16
"""Messages read before the loop's other callbacks have their turn."""
_CREDENTIALS: Final = struct.Struct("3i")


class ProtocolViolation(Exception):
    """The peer said what no peer of ours says; raised by ``on_message``, ends the connection."""


class PacketLink:
    """A connected socket, owned from now on. For the event loop only.

    Args:
        max_message_bytes: of a message that may arrive.
        max_queued: messages that may wait because the peer does not read; one more ends the connection.
        on_message: called with each message, good until it returns, and with a descriptor that came with it, or -1;
            it then belongs to the callback.
        on_end: called once, with the cause, when the connection is over; not after ``close``.
    """

    def __init__(
        self,
        connected: socket.socket,
        *,
        max_message_bytes: int,
        max_queued: int,
        on_message: Callable[[memoryview, int], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._socket = connected
        self._buffer = memoryview(bytearray(max_message_bytes))
        self._max_queued = max_queued
        self._on_message = on_message
        self._on_end = on_end
        self._queue: deque[tuple[bytes, int]] = deque()
        self.is_closed = False
        connected.setblocking(False)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._loop = asyncio.get_running_loop()
        self.resume_reading()

    def send(self, *parts: Buffer, descriptor: int = -1) -> None:
        """Send ``parts`` as one message. A ``descriptor`` is closed once it is sent, or never will be.

        Does nothing when the connection is over: ``on_end`` has told.
        """
        if self.is_closed:
            _close_descriptor(descriptor)
        elif self._queue or not self._send_now(parts, descriptor):
            self._queue.append((b"".join(parts), descriptor))
            if len(self._queue) == 1 and not self.is_closed:
                self._loop.add_writer(self._socket, self._on_writable)
            if len(self._queue) > self._max_queued:
                self._end("the peer does not read")

    def pause_reading(self) -> None:
        """Take nothing more; the peer is held up once the socket is full."""
        self._loop.remove_reader(self._socket)

    def resume_reading(self) -> None:
        """Go on after ``pause_reading``."""
        if not self.is_closed:
            self._loop.add_reader(self._socket, self._on_readable)

    def close(self) -> None:
        """Hang up. The peer notices at once, but reads what was sent before."""
        if self.is_closed:
            return
        self.is_closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        for _, descriptor in self._queue:
            _close_descriptor(descriptor)
        self._queue.clear()
        self._socket.close()

    def _on_readable(self) -> None:
        try:
            for _ in range(_AT_ONCE):
                if self.is_closed or not self._receive():
                    break
        except ProtocolViolation as violation:
            self._end(str(violation))
        except OSError as error:
            self._end(error.strerror or "the connection broke")
        except BaseException:  # a mistake of ours, which the loop logs
            self._end("this end failed")
            raise

    def _receive(self) -> bool:
        """One message. False if there is none. Raises OSError: the connection is over."""
        try:
            num_bytes, ancillary, flags, _ = self._socket.recvmsg_into(
                [self._buffer], _ANCILLARY_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        descriptors = [number for _, _, data in ancillary for (number,) in struct.iter_unpack("i", data)]
        if num_bytes == 0 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) > _MAX_DESCRIPTORS:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ConnectionError(0, "the peer is gone" if num_bytes == 0 else "a message that does not fit")
        self._on_message(self._buffer[:num_bytes], descriptors[0] if descriptors else -1)
        return True

    def _on_writable(self) -> None:
        while self._queue:
            message, descriptor = self._queue.popleft()
            if not self._send_now([message], descriptor):
                self._queue.appendleft((message, descriptor))
                return
        if not self.is_closed:
            self._loop.remove_writer(self._socket)

    def _send_now(self, parts: Sequence[Buffer], descriptor: int) -> bool:
        """False if the socket is full. True also when the connection turns out to be over."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))] if descriptor >= 0 else []
        try:
            self._socket.sendmsg(parts, rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error.strerror or "the connection broke")
        _close_descriptor(descriptor)
        return True

    def _end(self, cause: str) -> None:
        if not self.is_closed:
            self.close()
            self._on_end(cause)


def connect(name: str) -> socket.socket:
    """Connect to ``name``.

    Raises:
        OSError: nobody listens there, too many are waiting, or not one of our user's.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        connection.connect(f"\0{name}")
        check_peer(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(name: str) -> socket.socket:
    """Listen at ``name``. Raises OSError: it is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.setblocking(False)
        listener.bind(f"\0{name}")
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def check_peer(connection: socket.socket) -> None:
    """Raises PermissionError if another user is at the other end: names in the abstract namespace are for all."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise PermissionError(0, "the peer is another user's")


def _close_descriptor(descriptor: int) -> None:
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.close(descriptor)
