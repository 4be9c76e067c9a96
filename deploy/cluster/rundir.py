"""What a cluster leaves on a host while it runs: one private directory, in it one for each server, in that its keeper.

    /tmp/dvd-NAME-INCARNATION/          mode 0700
        vision-0.3/                     server vision-0, its third life
            keeper.json                 who looks after it
            options.yaml announce.json log ...

The directory is what is left to go by when Ray is gone. Knows nothing of Ray.
"""

import contextlib
import json
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from common.service.errors import ConfigError
from deploy.cluster.tiers import TIERS, Tier

_POLL_SECONDS: Final = 0.05
_KEEPER_FILE: Final = "keeper.json"
_STAT_STATE, _STAT_STARTTIME = 2, 21  # fields 3 and 22 of proc(5)


@dataclass(frozen=True, slots=True)
class KeeperFile:
    """The keeper of one server. ``born`` tells it from a later process with the same pid (clock ticks since boot)."""

    tier: Tier
    replica: str
    pid: int
    born: int
    server_pid: int

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """None: there is none, or not yet."""
        try:
            return cls(**json.loads((directory / _KEEPER_FILE).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, directory: Path) -> None:
        draft = directory / f".{_KEEPER_FILE}"
        draft.write_text(json.dumps(asdict(self)), "utf-8")
        draft.replace(directory / _KEEPER_FILE)

    @property
    def is_alive(self) -> bool:
        return birth_of(self.pid) == self.born

    def signal(self, number: signal.Signals) -> None:
        """Harmless when it has ended."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def cluster_directory(name: str, incarnation: str) -> Path:
    return Path(tempfile.gettempdir()) / f"dvd-{name}-{incarnation}"


def make_private(path: Path) -> Path:
    """A directory that is ours alone; one that exists must be already.

    Raises:
        ConfigError: it cannot be made, or somebody else can write to it.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}") from None
    if not is_private(path):
        raise ConfigError(f"{path} belongs to somebody else: remove it")
    return path


def is_private(path: Path) -> bool:
    """Whether it is a directory that nobody else can write to or read."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def remove(directory: Path) -> None:
    """A server's directory, and its cluster's when it was the last."""
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # others are still there
        directory.parent.rmdir()


def birth_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # The split begins with field 3.
    return None if fields[_STAT_STATE - 2] == "Z" else int(fields[_STAT_STARTTIME - 2])


def keepers_in(directory: Path) -> list[KeeperFile]:
    """Those that live."""
    found = [KeeperFile.read(entry) for entry in sorted(directory.glob("*/"))]
    return [keeper for keeper in found if keeper is not None and keeper.is_alive]


def end_all(directory: Path, grace: float, is_forced: Callable[[], bool] = lambda: False) -> list[str]:
    """Drain and end every server the directory names, routers first; then remove it. Returns who was ended.

    Blocks for up to ``grace`` seconds a tier; what has not ended then, or when ``is_forced`` says so, is killed: the
    kernel ends a server with its keeper.
    """
    ended = [keeper.replica for keeper in keepers_in(directory)]
    for tier in reversed(TIERS):
        keepers = [keeper for keeper in keepers_in(directory) if keeper.tier == tier]
        for keeper in keepers:
            keeper.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while _living(keepers) and time.monotonic() < deadline and not is_forced():
            time.sleep(_POLL_SECONDS)
        for keeper in keepers:
            keeper.signal(signal.SIGKILL)
        while _living(keepers):  # SIGKILL takes a moment, and cannot be refused
            time.sleep(_POLL_SECONDS)
    shutil.rmtree(directory, ignore_errors=True)
    return ended


def _living(keepers: Iterable[KeeperFile]) -> bool:
    return any(keeper.is_alive for keeper in keepers)
