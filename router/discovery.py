"""Where the servers of a tier are said to be: listed, behind a DNS name, or in a file that somebody keeps up to date.

    10.0.0.1:9001, unix:/run/dvd/vision.sock   fixed
    dns:vision.internal:9001                   every address of the name, asked again now and then
    file:/run/dvd/vision                       one address a line, ``#`` begins a comment; replace it by rename

What cannot be looked up now leaves the last known addresses as they are. Parsing and comparing are pure; looking up
happens in threads. Knows nothing of what a server is and whether it lives: see ``router.fleet``.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.service import metrics
from common.service.errors import Unavailable

log = logging.getLogger(__name__)

FILE_POLL_SECONDS: Final = 0.5
LOOKUP_TIMEOUT_SECONDS: Final = 5.0
MAX_FILE_BYTES: Final = 2**20

_FORMS: Final = "expected HOST:PORT, unix:/path, dns:NAME:PORT or file:/path"
_HOST: Final = re.compile(r"\w[\w.-]*", re.ASCII)
_COMMENT: Final = re.compile(r"(^|\s)#.*")


# --- pure


@dataclass(frozen=True, slots=True)
class Fixed:
    """One address that never changes."""

    address: str


@dataclass(frozen=True, slots=True)
class DnsName:
    """All addresses of ``name``, each with ``port``."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"dns:{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class WatchedFile:
    """The addresses in a file."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"


Moving = DnsName | WatchedFile
"""What has to be looked up again and again."""


def parse_entry(entry: str) -> Fixed | Moving:
    """One entry of ``--vision`` or ``--language``. Raises ValueError saying what is wrong with it."""
    kind, _, rest = entry.partition(":")
    if kind == "dns":
        return DnsName(*_split_host_port(rest))
    if kind == "file":
        if not rest.startswith("/"):
            raise ValueError("expected file:/path, a whole path from the root")
        return WatchedFile(Path(rest))
    return Fixed(parse_address(entry))


def parse_address(text: str) -> str:
    """``HOST:PORT`` or ``unix:/path`` in the one way of writing it. Raises ValueError."""
    if text.startswith("unix:"):
        if not text.startswith("unix:/"):
            raise ValueError("expected unix:/path, a whole path from the root")
        return text
    host, port = _split_host_port(text)
    return f"{host}:{port}"


def parse_members(text: str) -> list[str]:
    """The addresses in the text of a watched file. Raises ValueError naming the line."""
    addresses = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = _COMMENT.sub("", line).strip()
        if entry:
            try:
                addresses.append(parse_address(entry))
            except ValueError:
                raise ValueError(f"line {number}: expected HOST:PORT or unix:/path, found {entry[:64]!r}") from None
    return merge([addresses])


def merge(groups: Iterable[Sequence[str]]) -> list[str]:
    """All addresses, each once, in the order in which they are first named."""
    return list(dict.fromkeys(address for group in groups for address in group))


def difference(before: Iterable[str], after: Iterable[str]) -> tuple[list[str], list[str]]:
    """What came and what went, in order."""
    old, new = dict.fromkeys(before), dict.fromkeys(after)
    return [address for address in new if address not in old], [address for address in old if address not in new]


def _split_host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535):
        raise ValueError(_FORMS)
    return _check_host(host), int(port)


def _check_host(host: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            raise ValueError(f"{host[:64]} is not an IPv6 address") from None
    if not _HOST.fullmatch(host):
        raise ValueError(_FORMS)
    return host


# --- looking up, in a thread


def look_up(source: Moving) -> list[str]:
    """The addresses a source names now. Blocks. Raises Unavailable saying why it cannot be known."""
    return _resolve(source) if isinstance(source, DnsName) else _read(source)


def _resolve(source: DnsName) -> list[str]:
    try:
        found = socket.getaddrinfo(source.name.strip("[]"), source.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unavailable(reason.lower()) from None
    hosts = {str(sockaddr[0]) for _, _, _, _, sockaddr in found}
    return sorted(f"[{host}]:{source.port}" if ":" in host else f"{host}:{source.port}" for host in hosts)


def _read(source: WatchedFile) -> list[str]:
    try:
        with source.path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Unavailable((error.strerror or str(error)).lower()) from None
    if len(content) > MAX_FILE_BYTES:
        raise Unavailable(f"more than {MAX_FILE_BYTES} bytes")
    try:
        return parse_members(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unavailable("not a text in UTF-8") from None
    except ValueError as error:
        raise Unavailable(str(error)) from None


class _Lookup:
    """At most one look-up of a source at a time, in a thread that nobody waits for.

    A resolver may be stuck for longer than we want to wait, and than we want to live: the threads of an executor would
    hold up the end of the process.
    """

    def __init__(self, source: Moving) -> None:
        self._source = source
        self._answer: asyncio.Future[list[str] | Unavailable] | None = None

    async def run(self) -> list[str]:
        """What ``look_up`` says. Raises Unavailable, also when it takes too long; the next call waits for the same."""
        if self._answer is None:
            loop = asyncio.get_running_loop()
            self._answer = loop.create_future()
            arguments = (loop, self._answer)
            threading.Thread(target=self._look, args=arguments, name=f"look up {self._source}", daemon=True).start()
        await asyncio.wait({self._answer}, timeout=LOOKUP_TIMEOUT_SECONDS)
        if not self._answer.done():
            raise Unavailable(f"no answer within {LOOKUP_TIMEOUT_SECONDS:g} s")
        answer, self._answer = self._answer.result(), None
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    def _look(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[list[str] | Unavailable]) -> None:
        answer: list[str] | Unavailable
        try:
            answer = look_up(self._source)
        except Unavailable as error:
            answer = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(future.set_result, answer)


# --- following


class Discovery:
    """Tells where the servers of one tier are, from ``start`` until ``close``, on the event loop.

    Args:
        tier: for log and metrics.
        entries: as on the command line; ``RouterSettings`` has checked them.
        interval: seconds between two look-ups of a DNS name.
        on_members: called with all addresses, at the start and whenever they changed.
    """

    def __init__(
        self, tier: str, entries: Sequence[str], interval: float, on_members: Callable[[list[str]], None]
    ) -> None:
        self._tier = tier
        self._interval = interval
        self._on_members = on_members
        # In the order of the entries; a source that was never looked up names nothing.
        self._found: dict[Fixed | Moving, list[str]] = {}
        for source in map(parse_entry, entries):
            self._found[source] = [source.address] if isinstance(source, Fixed) else []
        self._problems: dict[Moving, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Tell the fixed addresses at once and begin to look up the others."""
        self._on_members(merge(self._found.values()))
        for source in self._found:
            if not isinstance(source, Fixed):
                self._tasks.append(asyncio.create_task(self._follow(source), name=f"follow {source}"))
        for task in self._tasks:
            task.add_done_callback(log_death)

    async def close(self) -> None:
        """Stop looking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, source: Moving) -> None:
        lookup = _Lookup(source)
        while True:
            try:
                addresses = await lookup.run()
            except Unavailable as error:
                self._failed(source, error.message)
            else:
                self._succeeded(source, addresses)
            await asyncio.sleep(self._interval if isinstance(source, DnsName) else FILE_POLL_SECONDS)

    def _failed(self, source: Moving, problem: str) -> None:
        """Keep what is known. Said once, not at every try."""
        metrics.DISCOVERY_FAILURES.labels(self._tier, "dns" if isinstance(source, DnsName) else "file").inc()
        if self._problems.get(source) == problem:
            return
        self._problems[source] = problem
        num_known = len(self._found[source])
        if num_known == 0:
            log.warning("waiting for %s servers from %s: %s", self._tier, source, problem)
        else:
            log.warning("%s servers from %s: %s; keeping the %d known ones", self._tier, source, problem, num_known)

    def _succeeded(self, source: Moving, addresses: list[str]) -> None:
        if self._problems.pop(source, None) is not None:
            log.info("%s servers from %s: can be read again", self._tier, source)
        came, went = difference(self._found[source], addresses)
        if came or went:
            changes = " ".join([*(f"+{address}" for address in came), *(f"-{address}" for address in went)])
            log.info("%s servers from %s: %s", self._tier, source, changes)
            self._found[source] = addresses
            self._on_members(merge(self._found.values()))


def log_death(task: asyncio.Task[None]) -> None:
    """What follows something until it is told to stop has ended by itself."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("%s died", task.get_name(), exc_info=task.exception())
