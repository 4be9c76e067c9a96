"""Small records over a stream: what two ends say about payloads that travel elsewhere.

A record is a kind, a length and a body. Each kind has a greatest length, so a stranger can make nobody hold more than
one such body. Both ends speak at least every ``_BEAT_SECONDS``; one that is silent counts as gone. Every failure is an
``OSError`` or an ``EOFError``. Knows nothing of frames or memory.
"""

import asyncio
import enum
import struct
from collections.abc import Mapping
from typing import Any, Final

_HEAD: Final = struct.Struct("<BxxxI")
_BEAT_SECONDS: Final = 1.0
SILENCE_SECONDS: Final = 4.0
_MAX_UNREAD_BYTES: Final = 2**20
"""Written and not taken by the peer: far above what a peer that reads can leave."""


class Malformed(ConnectionError):
    """What no peer of ours says."""


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    FRAME = 3
    VERDICT = 4
    BEAT = 5


class Records:
    """One end of the stream.

    Args:
        max_bytes: the longest body of each kind that this end takes; other kinds are refused. Beats are always taken.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: Mapping[Kind, int]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._max_bytes = {**max_bytes, Kind.BEAT: 0}

    @property
    def local_address(self) -> str:
        """The host part of this end's address; "" for a unix socket."""
        name: Any = self._writer.get_extra_info("sockname")
        return str(name[0]) if isinstance(name, tuple) else ""

    async def read(self) -> tuple[Kind, bytes]:
        """The next record that is no beat. Raises OSError or EOFError: the peer is gone, silent, or no peer of ours."""
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                kind, body = await self._read_any()
            if kind != Kind.BEAT:
                return kind, body

    async def expect(self, kind: Kind) -> bytes:
        """The body of the next record, which must be of this kind. Raises like ``read``."""
        found, body = await self.read()
        if found != kind:
            raise Malformed(f"a record of kind {found} where {kind} was due")
        return body

    def write(self, kind: Kind, body: bytes = b"") -> None:
        """Send a record, without waiting. Raises OSError: the peer is gone, or has not read for long."""
        if self._writer.is_closing():
            raise ConnectionError("the connection is closed")
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            raise ConnectionError("the peer does not read")
        self._writer.write(_HEAD.pack(kind, len(body)) + body)

    async def beat(self) -> None:
        """Show that this end lives, until cancelled. Raises like ``write``."""
        while True:
            self.write(Kind.BEAT)
            await asyncio.sleep(_BEAT_SECONDS)

    def abort(self) -> None:
        """Hang up at once; safe to call twice."""
        self._writer.transport.abort()

    async def _read_any(self) -> tuple[Kind, bytes]:
        kind, num_bytes = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        if kind not in self._max_bytes or num_bytes > self._max_bytes[kind]:
            raise Malformed(f"a record of kind {kind} with {num_bytes} bytes")
        return Kind(kind), await self._reader.readexactly(num_bytes)
