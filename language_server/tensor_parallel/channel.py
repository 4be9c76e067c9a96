"""What rank 0 and one worker say to each other, over a pair of sockets that nobody else can reach.

A message is a kind, integers and a text: 12 bytes of header, 8 a number, UTF-8. Nothing of it is ever unpickled.
"""

import socket
import struct
from array import array
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from common.service.errors import InternalError

_HEADER: Final = struct.Struct("<III")  # kind, count of numbers, bytes of text
_MAX_NUMBERS: Final = 1 << 24
_MAX_TEXT_BYTES: Final = 1 << 16


class Kind(IntEnum):
    """To a worker, then from it."""

    START = 1  # text: what to load, as ``worker.Order`` writes it
    JOIN = 2  # all have loaded: meet
    CACHE = 3  # blocks of KV memory, tokens per block
    STEP = 4  # tokens, width of the block tables, then a query length and a length of each sequence
    LOGITS = 5  # rows
    PROGRESS = 11  # it is loading
    LOADED = 12  # bytes it could give to KV memory
    FAILED = 13  # index in ``workers.ERRORS``; text: what it was


@dataclass(frozen=True, slots=True)
class Message:
    kind: Kind
    numbers: tuple[int, ...] = ()
    text: str = ""


class Channel:
    """One end. Reading and writing may be two threads' business, one each."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone, or takes nothing for as long as the socket's timeout."""
        text = message.text.encode()
        header = _HEADER.pack(message.kind, len(message.numbers), len(text))
        self._connection.sendall(header + array("q", message.numbers).tobytes() + text)

    def receive(self) -> Message | None:
        """The next message, None when there will be no more.

        Raises:
            InternalError: not a message of ours.
        """
        header = self._read(_HEADER.size)
        if header is None:
            return None
        kind, num_numbers, text_bytes = _HEADER.unpack(header)
        if num_numbers > _MAX_NUMBERS or text_bytes > _MAX_TEXT_BYTES:
            raise InternalError(f"message with {num_numbers} numbers and {text_bytes} bytes of text")
        body = self._read(8 * num_numbers + text_bytes)
        if body is None:
            return None
        try:
            numbers = array("q", body[: 8 * num_numbers])
            return Message(Kind(kind), tuple(numbers), body[8 * num_numbers :].decode())
        except ValueError as error:
            raise InternalError(f"message of kind {kind}: {type(error).__name__}") from error

    def end(self) -> None:
        """Nothing more is said or heard, at either end."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end has done so
            return

    def close(self) -> None:
        self._connection.close()

    def _read(self, num_bytes: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < num_bytes:
            try:
                part = self._connection.recv(num_bytes - len(parts))
            except ConnectionError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)
