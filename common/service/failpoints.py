"""Faults on command, at named places of the servers: how tests make a server die exactly there.

    DVD_TEST_BUILD=1 DVD_FAILPOINTS='vision.encode.after=kill:1; vision.deliver=corrupt(nan):50%' dvd vision ...
    DVD_TEST_BUILD=1 DVD_FAILPOINTS=file:/tmp/vision.failpoints dvd vision ...    read again whenever it changes

Each entry is ``NAME=ACTION`` and optionally ``:WHEN``. Actions:

    kill            SIGKILL to this process
    hang            never go on
    sleep(SECONDS)  go on later
    raise           fail with an internal error
    corrupt(KIND)   the place itself knows how; see there

Without WHEN at every hit; ``3`` at the third hit only, ``3+`` from the third on, ``10%`` by chance (``seed=N`` is an
entry, too), ``has(TEXT)`` where the content passed by holds TEXT; joined by ``&`` all must hold, and a hit is counted
where the content fits. Places are marked behind a look at one constant, which is all they cost where nothing is set::

    if failpoints.ARE_ON:
        await failpoints.reach("vision.encode.before", request.image)

A server without ``DVD_TEST_BUILD=1`` refuses to start with ``DVD_FAILPOINTS`` set.
"""

import asyncio
import os
import random
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.service import metrics
from common.service.errors import ConfigError, InternalError

VARIABLE: Final = "DVD_FAILPOINTS"
BUILD_VARIABLE: Final = "DVD_TEST_BUILD"

NAMES: Final = frozenset(
    {
        "vision.encode.before",  # an image has come, nothing was done; content: its bytes
        "vision.batch",  # on the device's thread, before a batch
        "vision.deliver",  # a frame is about to leave; corrupt: see ``vision_server.damage``
        "vision.encode.after",  # all frames were acknowledged, the reply was not sent
        "language.admit",  # room was found, ``Admitted`` was not sent; content: the request, texts included
        "language.step",  # on the engine's thread, before a step
        "language.token",  # a token is about to leave; content: likewise
        "language.finish",  # the last message of a choice is about to leave; content: likewise
        "router.dispatch",  # before a call to a vision server; content: the hash of the image
    }
)
ACTIONS: Final = frozenset({"kill", "hang", "sleep", "raise", "corrupt"})

_FILE: Final = "file:"
_ENTRY: Final = re.compile(r"(?P<name>[\w.]+)=(?P<action>\w+)(\((?P<value>[^)]*)\))?(:(?P<when>.+))?")
_HANG_SECONDS: Final = 3600.0


@dataclass(slots=True)
class Failpoint:
    """One entry, and how often it was passed."""

    name: str
    action: str
    value: str = ""
    first_hit: int = 1
    last_hit: int | None = None
    chance: float = 1.0
    content: bytes = b""
    num_hits: int = 0

    def is_due(self, content: bytes | memoryview, dice: random.Random) -> bool:
        """Whether it acts this time. Hits without its content do not count."""
        if self.content and self.content not in bytes(content):
            return False
        self.num_hits += 1
        is_in_range = self.num_hits >= self.first_hit and (self.last_hit is None or self.num_hits <= self.last_hit)
        return is_in_range and dice.random() < self.chance


def parse(text: str) -> tuple[list[Failpoint], int]:
    """The entries of ``DVD_FAILPOINTS``, and the seed.

    Raises:
        ConfigError: names the entry, and what is allowed.
    """
    points, seed = [], 0
    for entry in filter(None, (part.strip() for part in re.split(r"[;\n]", text))):
        if entry.startswith("seed="):
            seed = int(entry.removeprefix("seed="))
        else:
            points.append(_parse_entry(entry))
    return points, seed


def _parse_entry(entry: str) -> Failpoint:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(f"{VARIABLE}: {entry[:64]!r}: expected NAME=ACTION or NAME=ACTION:WHEN")
    if match["name"] not in NAMES:
        raise ConfigError(f"{VARIABLE}: {match['name'][:64]!r}: must be one of {', '.join(sorted(NAMES))}")
    if match["action"] not in ACTIONS:
        raise ConfigError(f"{VARIABLE}: {match['action'][:64]!r}: must be one of {', '.join(sorted(ACTIONS))}")
    point = Failpoint(match["name"], match["action"], match["value"] or "")
    if point.action == "sleep":
        _number(entry, point.value)
    for condition in filter(None, (match["when"] or "").split("&")):
        _set_condition(point, entry, condition)
    return point


def _set_condition(point: Failpoint, entry: str, when: str) -> None:
    if when.startswith("has(") and when.endswith(")"):
        point.content = when[4:-1].encode()
    elif when.endswith("%"):
        point.chance = _number(entry, when[:-1]) / 100
    elif when.endswith("+"):
        point.first_hit = int(_number(entry, when[:-1]))
    else:
        point.first_hit = point.last_hit = int(_number(entry, when))


def _number(entry: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{VARIABLE}: {entry[:64]!r}: {text[:16]!r} is no number") from None


class Failpoints:
    """Those of one process. Any thread may pass.

    Args:
        setting: as in ``DVD_FAILPOINTS``.

    Raises:
        ConfigError: it cannot be understood.
    """

    def __init__(self, setting: str) -> None:
        self._file = Path(setting.removeprefix(_FILE)) if setting.startswith(_FILE) else None
        self._stamp: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._points, seed = parse("" if self._file else setting)
        self._dice = random.Random(seed)

    def due(self, name: str, content: bytes | memoryview = b"") -> Failpoint | None:
        """The entry that acts at this place this time. Counts it."""
        with self._lock:
            self._read_again()
            for point in self._points:
                if point.name == name and point.is_due(content, self._dice):
                    metrics.FAILPOINT_HITS.labels(name).inc()
                    return point
        return None

    def _read_again(self) -> None:
        """If the file has changed; all counts begin anew then."""
        if self._file is None:
            return
        try:
            status = self._file.stat()
        except FileNotFoundError:
            self._points, self._stamp = [], None
            return
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._points, seed = parse(self._file.read_text("utf-8"))
            self._dice, self._stamp = random.Random(seed), stamp


def hit(name: str, content: bytes | memoryview = b"") -> str:
    """Pass a place on a thread that may block. Returns the kind of damage to do, mostly none (``""``).

    Raises:
        InternalError: the entry says so.
    """
    point = _failpoints.due(name, content)
    if point is None:
        return ""
    if seconds := _seconds(point):
        time.sleep(seconds)
    return _act(point)


async def reach(name: str, content: bytes | memoryview = b"") -> str:
    """Pass a place on the event loop, which goes on meanwhile. See ``hit``."""
    point = _failpoints.due(name, content)
    if point is None:
        return ""
    if seconds := _seconds(point):
        await asyncio.sleep(seconds)
    return _act(point)


def check_build(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse failpoints outside of test builds, and those that cannot be understood.

    Raises:
        ConfigError: see above.
    """
    setting = environ.get(VARIABLE, "")
    if setting and environ.get(BUILD_VARIABLE) != "1":
        raise ConfigError(f"{VARIABLE} is set, and this is no test build ({BUILD_VARIABLE}=1): unset it")
    Failpoints(setting)


def _seconds(point: Failpoint) -> float:
    if point.action == "sleep":
        return float(point.value)
    return _HANG_SECONDS if point.action == "hang" else 0.0


def _act(point: Failpoint) -> str:
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if point.action == "raise":
        raise InternalError(f"failpoint {point.name}")
    return (point.value or "bits") if point.action == "corrupt" else ""


def _of_this_process() -> Failpoints:
    """None in a release build; ``check_build`` says why at the start."""
    try:
        check_build()
    except ConfigError:
        return Failpoints("")
    return Failpoints(os.environ.get(VARIABLE, ""))


_failpoints: Final = _of_this_process()
ARE_ON: Final = bool(os.environ.get(VARIABLE)) and os.environ.get(BUILD_VARIABLE) == "1"
"""Whether any place needs a look."""
