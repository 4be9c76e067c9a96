"""One decode worker as the pool sees it: a process, and the socket to it. How it is started, asked and ended."""

import asyncio
import contextlib
import mmap
import os
import signal
import socket
import sys
from contextlib import ExitStack
from itertools import count
from typing import Final, Self

import numpy as np

from common.service.errors import InvalidRequest, StartupError, Unavailable
from vision_server.decode_job import MAX_RECORD_BYTES, READY, Job, Kind, MediaOptions, Outcome
from vision_server.shared_memory import copy_of, room, view
from vision_server.tiling import Tiles

_START_SECONDS: Final = 180.0
"""On a crowded machine that has never compiled the kernels a worker takes a minute."""
_LARGE_BYTES: Final = 2**20
_KEPT_VARIABLES: Final = (
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "NUMBA_CACHE_DIR",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "TMPDIR",
)


class DiedIdle(Exception):
    """Before it was given the job."""


class WorkerLost(Exception):
    """Died or hung at a job; says which."""


class WorkerProcess:
    """One process and the socket to it."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self._process = process
        self._channel = channel
        self._numbers = count()
        self._is_killed = False
        self.is_filtered = False
        self.is_abandoned = False  # ended because nobody waits for what it was at

    @classmethod
    async def start(cls, memory_bytes: int, max_pixels: int, seconds: float, nice: int) -> Self:
        """Returns once it can decode. Raises StartupError."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise _cannot_start(error) from None
        ours.setblocking(False)
        arguments = (os.getpid(), theirs.fileno(), memory_bytes, max_pixels, seconds, nice)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "vision_server.decode_worker", *map(str, arguments),
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                    pass_fds=[theirs.fileno()], env=_environment(max_pixels),
                )  # fmt: skip
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise _cannot_start(error) from None
            raise
        worker = cls(process, ours)
        try:
            await worker._become_ready()
        except BaseException:
            await worker.end()
            raise
        return worker

    async def _become_ready(self) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                greeting = await self._receive()
        except TimeoutError:
            raise StartupError(f"a decode worker was not ready after {_START_SECONDS:.0f} s") from None
        except WorkerLost:
            assert self._process.stderr is not None  # asked for
            lines = (await self._process.stderr.read()).decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no reason given")
            raise StartupError(f"decode workers cannot run: {last}") from None
        self.is_filtered = greeting != READY

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and not self._is_killed

    async def run(self, kind: Kind, data: bytes, options: MediaOptions, wall_seconds: float) -> tuple[Outcome, Tiles]:
        """Have one job done. The tiles of a job that makes none are empty.

        Raises:
            InvalidRequest: what the worker found.
            Unavailable: out of descriptors or memory.
            DiedIdle, WorkerLost: it is of no use any more.
        """
        job, side = Job(next(self._numbers), kind, options), options.tiling.tile_size
        tile_bytes = side * side * 3
        with ExitStack() as descriptors:
            try:
                source = await asyncio.to_thread(copy_of, data) if len(data) > _LARGE_BYTES else copy_of(data)
                descriptors.callback(os.close, source)
                target = room(options.max_wanted * tile_bytes)
                descriptors.callback(os.close, target)
            except OSError:
                raise _no_room() from None
            try:
                socket.send_fds(self._channel, [job.pack()], [source, target])
            except (BrokenPipeError, ConnectionResetError):
                raise DiedIdle from None
            outcome = await self._outcome_of(job, wall_seconds)
            num_bytes = outcome.num_tiles * tile_bytes if kind == Kind.TILES else 0
            try:
                tiles = view(target, num_bytes) if num_bytes else np.empty(0, np.uint8)
            except OSError:
                raise _no_room() from None
        return outcome, tiles.reshape(-1, side, side, 3)

    async def _outcome_of(self, job: Job, wall_seconds: float) -> Outcome:
        try:
            async with asyncio.timeout(wall_seconds):
                outcome = Outcome.unpack(await self._receive())
        except TimeoutError:
            raise WorkerLost(f"did nothing for {wall_seconds:.0f} s") from None
        except ValueError:
            raise WorkerLost("spoke nonsense") from None
        if outcome.number == job.number and outcome.code:
            raise InvalidRequest(outcome.message, code=outcome.code)
        options = job.options
        most = {Kind.MEASURE: options.max_tiles, Kind.TILES: options.max_wanted}.get(job.kind)
        if outcome.number != job.number or (most is not None and not 1 <= outcome.num_tiles <= most):
            raise WorkerLost("spoke nonsense")
        return outcome

    async def _receive(self) -> bytes:
        try:
            record = await asyncio.get_running_loop().sock_recv(self._channel, MAX_RECORD_BYTES)
        except ConnectionResetError:
            record = b""
        if not record:
            status = await self._process.wait()
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise WorkerLost(how)
        return record

    def kill(self) -> None:
        self._is_killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> None:
        await self._process.wait()

    async def end(self) -> None:
        self.kill()
        await self._process.wait()
        self._channel.close()


def _no_room() -> Unavailable:
    return Unavailable("there are no descriptors or no memory left to decode an image")


def _cannot_start(error: OSError) -> StartupError:
    return StartupError(f"decode workers cannot be started: {error.strerror}")


def _environment(max_pixels: int) -> dict[str, str]:
    """No secrets of the server's; and images in one piece of memory each, in few large pages."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    block_bytes = min(-(-4 * max_pixels // mmap.PAGESIZE) * mmap.PAGESIZE, 2**30)
    return kept | {
        "PILLOW_BLOCK_SIZE": str(block_bytes),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
