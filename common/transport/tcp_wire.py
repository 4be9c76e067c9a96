"""What ``tcp`` says on its links, and how they come about. Knows nothing of who sends what.

The receiver speaks first: ``GREETING``. A frame is ``[header bytes, payload bytes, number]``, then header and payload;
its answer is ``[number, verdict bytes]``, then the verdict. Both sides say at least one thing every ``HEARTBEAT``, if
only that they are there (``NO_FRAME``, ``NO_ANSWER``).
"""

import asyncio
import re
import socket
import struct
from typing import Any, Final

from common.service.listen import split_host_port

NAME: Final = "tcp"
GREETING: Final = b"DVDT\x01\x00\x00\x00"
FRAME: Final = struct.Struct("<IIQ")
ANSWER: Final = struct.Struct("<QB")
MAX_VERDICT_BYTES: Final = 255
NO_FRAME: Final = FRAME.pack(0, 0, 2**64 - 1)
NO_ANSWER: Final = ANSWER.pack(2**64 - 1, 0)
HEARTBEAT: Final = 0.5
"""Seconds."""
SILENCE: Final = 4.0
"""Seconds after which a peer is gone, so that a link that is half open is noticed within five. Also the time in which
what is short must arrive whole."""
PATIENCE: Final = 5.0
"""Seconds for what should take none: a name look-up, the end of a cancelled task."""
UNIX: Final = "unix:"
_ADDRESS: Final = re.compile(r"(unix:/[^\s]+|(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5})", re.ASCII)


async def listen(address: str) -> socket.socket:
    """A listening socket. Raises OSError."""
    loop = asyncio.get_running_loop()
    family: int = socket.AF_UNIX
    where: Any = address.removeprefix(UNIX)
    if not address.startswith(UNIX):
        host, port = split_host_port(address)
        found = await asyncio.wait_for(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM), PATIENCE)
        family, where = found[0][0], found[0][4]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


async def connect(address: str) -> socket.socket:
    """A socket connected to ``address``. Raises OSError."""
    if not _ADDRESS.fullmatch(address):
        raise ConnectionError("not an address of this transport")
    loop = asyncio.get_running_loop()
    if address.startswith(UNIX):
        return await _connect_to(socket.AF_UNIX, address.removeprefix(UNIX))
    host, _, port = address.rpartition(":")
    failure: OSError = ConnectionError("no such host")
    for family, *_, where in await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
        try:
            return await _connect_to(family, where)
        except OSError as error:
            failure = error
    raise failure


async def _connect_to(family: int, where: Any) -> socket.socket:
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connecting, where)
    except BaseException:
        connecting.close()
        raise
    return connecting


def address_of(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"{UNIX}{listener.getsockname()}"
    host, port, *_ = listener.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
