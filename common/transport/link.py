"""One connected stream socket, and a thread that blocks on it: large payloads move in few calls, and without the GIL.

The thread does what takes time, the event loop only what is short (``send_now``, ``receive_now``). Who hangs up wakes
the thread; the descriptor goes when the thread has ended, never under its hands. Every failure is an ``OSError``,
whatever broke. Knows nothing of frames.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from typing_extensions import Buffer

from protos.frame import checksum

log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 2**20
"""Received at a time, so that a checksum finds its bytes in the cache."""
_UNIX_BUFFER_BYTES: Final = 2**20
_PATIENCE: Final = 5.0
"""Seconds for a thread to see that its socket is shut down."""


class Link:
    """A connected socket, owned from now on.

    Args:
        silence: seconds in which whoever waits for the peer must hear something.
    """

    def __init__(self, connected: socket.socket, silence: float) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._is_watched = False
        connected.settimeout(None)
        seconds, fraction = divmod(silence, 1)
        patience = struct.pack("ll", int(seconds), int(1e6 * fraction))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        if connected.family == socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        else:  # the kernel sizes the buffers of TCP better than a fixed number would
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # --- event loop

    def start(self, story: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Run ``story`` in the thread until it returns or the link breaks; then ``on_end`` on the loop.

        Raises:
            OSError: there is no thread to be had.
        """
        thread = threading.Thread(target=self._run, args=(story, on_end), name="features over tcp", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(f"no thread for a link: {error}") from None
        self._thread = thread

    def watch(self, on_readable: Callable[[], None]) -> None:
        """Call ``on_readable`` on the loop when there is something to ``receive_now``."""
        self._is_watched = True
        self._loop.add_reader(self._socket.fileno(), on_readable)

    def receive_now(self, max_bytes: int) -> bytes:
        """What is here, if anything. Raises OSError: the peer has left."""
        try:
            received = self._socket.recv(max_bytes, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        _check_ended(len(received))
        return received

    def send_now(self, message: bytes) -> bool:
        """Send a short message at once; False if the way is full, because the peer does not read. Raises OSError."""
        try:
            num_sent = self._socket.send(message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if num_sent < len(message):
            raise ConnectionError("the peer does not read")
        return True

    def hang_up(self) -> None:
        """The end, for both sides; the thread notices. Safe to call twice."""
        if self._is_watched:
            self._is_watched = False
            self._loop.remove_reader(self._socket.fileno())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, wait for the thread, and give the descriptor back. Safe to call twice."""
        self.hang_up()
        if self._thread is not None:
            self._thread.join(_PATIENCE)
        self._socket.close()

    # --- the thread

    def tell(self, story: Callable[..., object], *arguments: object) -> None:
        """Have the loop call ``story``; nobody waits for it. Raises OSError: the loop has ended."""
        try:
            self._loop.call_soon_threadsafe(story, *arguments)
        except RuntimeError:
            raise ConnectionError("the loop has ended") from None

    def receive_some(self, memory: memoryview) -> int:
        """At least one byte, at most what ``memory`` holds. Raises OSError: the peer has left, or is silent."""
        num_bytes = self._socket.recv_into(memory)
        _check_ended(num_bytes)
        return num_bytes

    def receive_into(self, memory: memoryview, start: int) -> int:
        """Fill ``memory`` from ``start`` on; returns the CRC32C of all of it. Raises OSError as ``receive_some``."""
        crc = checksum(memory[:start])
        while start < len(memory):
            piece = memory[start : start + _PIECE_BYTES]
            num_bytes = self._socket.recv_into(piece, 0, socket.MSG_WAITALL)
            _check_ended(num_bytes)
            crc = checksum(piece[:num_bytes], crc)
            start += num_bytes
        return crc

    def send(self, *parts: Buffer) -> None:
        """Send ``parts`` as one, as long as it takes. Raises OSError."""
        left = [memoryview(part) for part in parts]
        while left:
            num_bytes = self._socket.sendmsg(left)
            while left and num_bytes >= len(left[0]):
                num_bytes -= len(left.pop(0))
            if left:
                left[0] = left[0][num_bytes:]

    def _run(self, story: Callable[[], None], on_end: Callable[[], None]) -> None:
        try:
            story()
        except OSError as error:
            log.debug("a link ended: %s", error)
        finally:
            with contextlib.suppress(OSError):
                self.tell(on_end)


class Inbox:
    """What has arrived over a link and was not asked for yet, so that short messages do not cost a call each."""

    def __init__(self, link: Link, capacity: int, patience: float) -> None:
        self._link = link
        self._patience = patience
        self._memory = memoryview(bytearray(capacity))
        self._start = 0
        self._stop = 0

    def take(self, num_bytes: int) -> memoryview:
        """The next ``num_bytes``, at most the capacity; good until the next call.

        Raises:
            OSError: the link broke, or they did not come within the patience.
        """
        here = self._stop - self._start
        if here < num_bytes:
            self._memory[:here] = self._memory[self._start : self._stop]
            self._start, self._stop = 0, here
            self._fill(num_bytes)
        taken = self._memory[self._start : self._start + num_bytes]
        self._start += num_bytes
        return taken

    def move_into(self, memory: memoryview) -> int:
        """Fill the beginning of ``memory`` with what is here already; returns how many bytes that were."""
        num_bytes = min(len(memory), self._stop - self._start)
        memory[:num_bytes] = self._memory[self._start : self._start + num_bytes]
        self._start += num_bytes
        return num_bytes

    def _fill(self, num_bytes: int) -> None:
        deadline = time.monotonic() + self._patience
        while self._stop < num_bytes:
            self._stop += self._link.receive_some(self._memory[self._stop :])
            if self._stop < num_bytes and time.monotonic() > deadline:
                raise TimeoutError("the peer sends too slowly")


def _check_ended(num_bytes: int) -> None:
    if num_bytes == 0:
        raise ConnectionError("the peer has hung up")
