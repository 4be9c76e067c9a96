"""A TCP proxy that misbehaves as told: for gRPC, ZeroMQ and HTTP alike, as it knows nothing of what it carries.

Both ends see an ordinary peer. What it does to bytes comes from a seeded generator for each connection and direction,
so that the same traffic is damaged the same way again. What TCP itself would repair (loss, a link that is down for a
while) shows as delay; what it would not (a broken middlebox, bad memory) as damage::

    proxy.misbehave(Mischief(delay=0.1, loss=0.05))     # slow and lossy
    proxy.misbehave(Mischief(blocks=True))              # a partition: nothing passes, nobody is told
    proxy.misbehave(Mischief(corrupt=1), "to_server")   # one way only
    proxy.reset()                                       # every connection dies on the spot
    proxy.heal()
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, TypeVar

Direction = Literal["to_server", "to_client"]
BOTH: Final[tuple[Direction, ...]] = ("to_server", "to_client")

_CHUNK_BYTES: Final = 16384
_RETRANSMISSION_SECONDS: Final = 0.2
_CALL_SECONDS: Final = 30.0
_NO_LINGER: Final = struct.pack("ii", 1, 0)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mischief:
    """What happens to the bytes of one direction. Chances are for each chunk of at most 16 KiB."""

    delay: float = 0.0
    """Seconds for every chunk."""
    jitter: float = 0.0
    """Up to so many seconds more."""
    loss: float = 0.0
    """Chance to come only with TCP's retransmission, 0.2 s later."""
    rate: float = 0.0
    """Bytes a second; 0: as fast as it goes."""
    corrupt: float = 0.0
    """Chance of one flipped bit."""
    drop: float = 0.0
    """Chance to vanish."""
    duplicate: float = 0.0
    """Chance to come twice."""
    reorder: float = 0.0
    """Chance to be overtaken by the next one."""
    cut_after: int = 0
    """The connection is reset after so many bytes from now on; 0: never."""
    blocks: bool = False
    """Nothing passes until told otherwise; then all of it does, as TCP would send it again."""


NONE: Final = Mischief()


@dataclass(eq=False, slots=True)
class _Connection:
    """One client and its server: a pump each way."""

    writers: dict[Direction, asyncio.StreamWriter]
    pumps: list[asyncio.Task[None]] = field(default_factory=list)
    num_bytes: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(BOTH, 0))

    def reset(self) -> None:
        """RST to both ends: unread bytes are lost, as when a process is killed."""
        for writer in self.writers.values():
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            writer.transport.abort()


class Proxy:
    """Listens at ``listen``, forwards to ``target``; both ``host:port``. Methods may be called from any thread.

    Args:
        loop: where it runs; see ``Links``.
        seed: of all chances.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, listen: str, target: str, seed: int = 0) -> None:
        self._loop = loop
        self._listen = listen
        self._target = target
        self._seed = seed
        self._mischief: dict[Direction, Mischief] = dict.fromkeys(BOTH, NONE)
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._num_accepted = 0
        self._refuses = False
        self._server: asyncio.Server | None = None
        self.address = listen

    @property
    def num_connections(self) -> int:
        """Open now."""
        return len(self._connections)

    @property
    def num_accepted(self) -> int:
        """Since the beginning."""
        return self._num_accepted

    @property
    def num_bytes(self) -> int:
        """Forwarded over connections that are open now, both ways."""
        return sum(sum(connection.num_bytes.values()) for connection in tuple(self._connections))

    def misbehave(self, mischief: Mischief, *directions: Direction) -> None:
        """From now on, on every connection, present and future; without directions: both."""
        self._call(lambda: self._set(mischief, directions or BOTH))

    def heal(self) -> None:
        """Honest again. Connections that were reset or cut stay so: their owners make others."""
        self._call(self._heal)

    def reset(self) -> None:
        """Every open connection dies with RST."""
        self._call(self._reset)

    def refuse(self) -> None:
        """Like ``reset``, and new ones die at once until ``heal``."""
        self._call(self._refuse)

    def half_close(self, direction: Direction) -> None:
        """FIN in one direction of every open connection; the other goes on."""
        self._call(lambda: self._close_half(direction))

    # --- on the loop

    async def start(self) -> None:
        host, port = _split(self._listen)
        self._server = await asyncio.start_server(self._on_client, host, port, limit=_CHUNK_BYTES)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in tuple(self._connections):
            connection.reset()
        for handler in tuple(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    def _set(self, mischief: Mischief, directions: tuple[Direction, ...]) -> None:
        for direction in directions:
            self._mischief[direction] = mischief
            for connection in self._connections:
                connection.num_bytes[direction] = 0  # ``cut_after`` counts from now on
        self._notify()

    def _heal(self) -> None:
        self._refuses = False
        self._set(NONE, BOTH)

    def _reset(self) -> None:
        for connection in tuple(self._connections):
            connection.reset()

    def _refuse(self) -> None:
        self._refuses = True
        self._reset()

    def _close_half(self, direction: Direction) -> None:
        for connection in tuple(self._connections):
            writer = connection.writers[direction]
            with contextlib.suppress(OSError):
                if writer.can_write_eof() and not writer.is_closing():
                    writer.write_eof()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            await self._carry(reader, writer)
        except asyncio.CancelledError:
            pass  # ``close``: a handler that ends as cancelled would be reported as a failure
        finally:
            self._handlers.discard(handler)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._num_accepted = self._num_accepted, self._num_accepted + 1
        try:
            if self._refuses:
                raise ConnectionRefusedError
            server_reader, server_writer = await asyncio.open_connection(*_split(self._target), limit=_CHUNK_BYTES)
        except OSError:  # the target is not there: to the client it looks as if it had been and died
            _Connection({"to_client": writer}).reset()
            return
        connection = _Connection({"to_server": server_writer, "to_client": writer})
        self._connections.add(connection)
        try:
            connection.pumps = [
                asyncio.create_task(self._pump(connection, source, direction, number))
                for direction, source in zip(BOTH, (reader, server_reader), strict=True)
            ]
            await asyncio.gather(*connection.pumps)
        except OSError:
            connection.reset()  # a reset on one side is one on the other
        finally:
            for pump in connection.pumps:
                pump.cancel()
            await asyncio.gather(*connection.pumps, return_exceptions=True)
            self._connections.discard(connection)
            for each in connection.writers.values():
                each.close()

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, direction: Direction, number: int
    ) -> None:
        dice = random.Random(f"{self._seed} {number} {direction}")
        writer, held_back = connection.writers[direction], b""
        while chunk := await reader.read(_CHUNK_BYTES):
            mischief = await self._passable(direction)
            await _linger(mischief, len(chunk), dice)
            await self._passable(direction)  # it may have been blocked meanwhile
            chunk = _damaged(mischief, chunk, dice)
            if not held_back and chunk and dice.random() < mischief.reorder:
                held_back = chunk
                continue
            chunk, held_back = chunk + held_back, b""
            if mischief.cut_after and connection.num_bytes[direction] + len(chunk) > mischief.cut_after:
                writer.write(chunk[: max(0, mischief.cut_after - connection.num_bytes[direction])])
                await asyncio.sleep(0)
                connection.reset()
                return
            connection.num_bytes[direction] += len(chunk)
            writer.write(chunk)
            await writer.drain()
        await self._passable(direction)
        writer.write(held_back)
        if writer.can_write_eof():
            writer.write_eof()

    async def _passable(self, direction: Direction) -> Mischief:
        """Wait while the direction is blocked."""
        while self._mischief[direction].blocks:
            await self._changed.wait()
        return self._mischief[direction]

    def _call(self, action: Callable[[], object]) -> None:
        """Do it on the loop, and wait until it is done."""

        async def act() -> None:
            action()

        asyncio.run_coroutine_threadsafe(act(), self._loop).result(_CALL_SECONDS)


class Links:
    """Proxies on a loop of their own thread.

    Args:
        host: where they listen; a proxy has the port of its target, if that is on another address, or any free one.
        seed: of all chances.
    """

    def __init__(self, host: str, seed: int = 0) -> None:
        self.host = host
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies")
        self._proxies: list[Proxy] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._proxies:
            self._run(proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        self._loop.close()

    def add(self, target: str) -> Proxy:
        """A proxy before ``target``; it listens when this returns. The target need not exist yet."""
        host, port = _split(target)
        listen = f"{self.host}:{0 if host == self.host else port}"
        proxy = Proxy(self._loop, listen, target, self._seed + len(self._proxies))
        self._run(proxy.start())
        self._proxies.append(proxy)
        return proxy

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)


async def _linger(mischief: Mischief, num_bytes: int, dice: random.Random) -> None:
    seconds = mischief.delay + mischief.jitter * dice.random()
    if dice.random() < mischief.loss:
        seconds += _RETRANSMISSION_SECONDS
    if mischief.rate:
        seconds += num_bytes / mischief.rate
    if seconds:
        await asyncio.sleep(seconds)


def _damaged(mischief: Mischief, chunk: bytes, dice: random.Random) -> bytes:
    if dice.random() < mischief.drop:
        return b""
    if dice.random() < mischief.corrupt:
        damaged = bytearray(chunk)
        damaged[dice.randrange(len(chunk))] ^= 1 << dice.randrange(8)
        chunk = bytes(damaged)
    return chunk * 2 if dice.random() < mischief.duplicate else chunk


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
