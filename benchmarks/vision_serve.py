"""What a vision server under load keeps of its encoder's speed.

Every round has two parts on the same cores. The bare part encodes tiles in a loop, in this process. In the other a
vision server, a program of its own, takes ``Encode`` calls for JPEG pictures that are all different, as many at once
as keep it busy, and delivers features to a receiver in a third process, which drops them: what is measured is decoding,
tiling, batching, signing and sending, not what a language server does.
"""

import asyncio
import contextlib
import multiprocessing
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Final

from typing_extensions import Buffer

from benchmarks.systems import Dtype
from benchmarks.tables import Table, number
from benchmarks.vision_subjects import PICTURE_SIDE, PICTURE_TILES, pictures, random_tiles
from common.model.config import load_config
from common.service import rpc
from common.service.announce import Announcement
from common.service.errors import Unavailable
from common.transport.base import Lend
from common.transport.registry import make_receiver
from deploy.process import compute_defaults
from protos.frame import FrameHeader
from protos.status_pb2 import FEATURE_DTYPE_BFLOAT16, Endpoint
from protos.vision_pb2 import EncodeRequest, TilingOptions
from protos.vision_pb2_grpc import VisionStub
from vision_server.encoder import VisionEncoder

_NUM_PICTURES: Final = 16
_AT_ONCE: Final = 4
_STARTUP_SECONDS: Final = 600.0
_STOP_SECONDS: Final = 60.0
_CALL_SECONDS: Final = 600.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
Round = dict[str, float]
"""Tiles/s of both parts, and processor seconds a tile, all processes of the server together."""


def measure(model: Path, dtype: Dtype, num_threads: int, num_rounds: int, seconds: float) -> list[Round]:
    """A first round only warms up."""
    encoder = VisionEncoder(load_config(model), "cpu", dtype)
    encoder.load(model)
    with _receiver() as endpoint, _server(model, dtype, num_threads) as server:
        rounds = [asyncio.run(_round(encoder, server, endpoint, seconds)) for _ in range(num_rounds + 1)]
    return rounds[1:]


def kept_table(rounds: Sequence[Round]) -> Table:
    """Who shares the cores with others sees by the processor seconds what the server costs, and not what others do."""
    rows = []
    for part, label in (("bare", "bare encoder"), ("served", "server under load")):
        rate, core = (median(each[key] for each in rounds) for key in (part, f"{part}_core_s"))
        kept, kept_core = (
            median(each[part] / each["bare"] for each in rounds),
            median(each["bare_core_s"] / each[f"{part}_core_s"] for each in rounds),
        )
        rows.append([label, number(rate), f"{kept:.0%}", number(core), f"{kept_core:.0%}"])
    notes = [f"medians of {len(rounds)} rounds; pictures of {PICTURE_SIDE} px, {PICTURE_TILES} tiles each"]
    return Table("Vision server", ["", "tiles/s", "kept", "core s a tile", "kept"], rows, notes=notes)


class Drop:
    """A ``FrameSink`` that lets every frame in and keeps none."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def place(self, header: FrameHeader, packed_header: Buffer, lend: Lend | None = None) -> memoryview:
        if (memory := None if lend is None else lend()) is not None:
            return memoryview(memory).cast("B")
        if len(self._memory) < header.payload_bytes:
            self._memory = bytearray(header.payload_bytes)
        return memoryview(self._memory)[: header.payload_bytes]

    def commit(self, header: FrameHeader, memory: memoryview, payload_crc32c: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Server:
    address: str
    pid: int

    def processor_seconds(self) -> float:
        """Of the program and all that it started and that still run, so far."""
        parents, seconds = _processes()
        family = {self.pid}
        while grown := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= grown
        return sum(seconds[pid] for pid in family)


async def _round(encoder: VisionEncoder, server: _Server, endpoint: Endpoint, seconds: float) -> Round:
    bare = _bare(encoder, seconds)
    async with _stub(server.address) as stub:
        return bare | await _served(stub, server, endpoint, seconds)


def _bare(encoder: VisionEncoder, seconds: float) -> Round:
    """``encode`` in a loop."""
    tiles = random_tiles(PICTURE_TILES, encoder.config.tiling.tile_size)
    started, used, num_tiles = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        encoder.encode(tiles)
        num_tiles += len(tiles)
    took, used = time.perf_counter() - started, time.process_time() - used
    return {"bare": num_tiles / took, "bare_core_s": used / num_tiles}


async def _served(stub: VisionStub, server: _Server, endpoint: Endpoint, seconds: float) -> Round:
    """Between the first reply and the last that came in time: calls stay in flight for all of that."""
    images = pictures(_NUM_PICTURES)
    ends: list[tuple[float, float]] = []

    async def caller(first: int, until: float) -> None:
        number = first
        while time.perf_counter() < until:
            reply = await stub.Encode(_request(images[number % len(images)], endpoint), timeout=_CALL_SECONDS)
            assert reply.num_tiles == PICTURE_TILES
            ends.append((time.perf_counter(), server.processor_seconds()))
            number += _AT_ONCE

    until = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as callers:
        for first in range(_AT_ONCE):
            callers.create_task(caller(first, until))
    in_time = [end for end in ends if end[0] <= until]
    if len(in_time) < 2:
        raise Unavailable(f"the vision server ended {len(in_time)} images in {seconds:g} s: too few for a rate")
    (first_end, first_used), (last_end, last_used) = in_time[0], in_time[-1]
    num_tiles = PICTURE_TILES * (len(in_time) - 1)
    return {"served": num_tiles / (last_end - first_end), "served_core_s": (last_used - first_used) / num_tiles}


def _request(image: bytes, endpoint: Endpoint) -> EncodeRequest:
    """Nothing that a cache could know."""
    return EncodeRequest(
        request_id=secrets.token_bytes(16),
        mm_hash=secrets.token_bytes(32),
        image_hash=secrets.token_bytes(32),
        image=image,
        tiling=TilingOptions(min_dynamic_patch=1, max_dynamic_patch=12, use_thumbnail=True),
        deliver_to=[endpoint],
        ticket=secrets.token_bytes(32),
        dtype=FEATURE_DTYPE_BFLOAT16,
    )


@asynccontextmanager
async def _stub(address: str) -> AsyncIterator[VisionStub]:
    channel = rpc.make_channel(address)
    try:
        yield VisionStub(channel)  # type: ignore[no-untyped-call]
    finally:
        await channel.close()


@contextmanager
def _server(model: Path, dtype: Dtype, num_threads: int) -> Iterator[_Server]:
    with tempfile.TemporaryDirectory() as folder:
        announcement = Path(folder) / "ready.json"
        options = ["--model", model, "--dtype", dtype, "--device", "cpu", "--threads", num_threads]
        options += ["--listen", "127.0.0.1:0", "--announce", announcement, "--log-level", "warning"]
        command = [sys.executable, "-m", "vision_server", *map(str, options)]
        process = subprocess.Popen(command, env={**compute_defaults(os.environ), **os.environ})  # as ``dvd`` does it
        try:
            yield _Server(_address(process, announcement), process.pid)
        finally:
            process.terminate()
            process.wait(_STOP_SECONDS)


def _address(process: "subprocess.Popen[bytes]", announcement: Path) -> str:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline:
        if (announced := Announcement.read(announcement)) is not None:
            return announced.address
        if process.poll() is not None:
            raise Unavailable(f"the vision server ended with status {process.returncode}")
        time.sleep(0.1)
    raise Unavailable(f"the vision server was not ready after {_STARTUP_SECONDS:g} s")


@contextmanager
def _receiver() -> Iterator[Endpoint]:
    """Where features go: to a process that ends with the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_receive, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Endpoint.FromString(ours.recv_bytes())
    finally:
        process.terminate()
        process.join()


def _receive(pipe: Connection) -> None:
    asyncio.run(_receive_forever(pipe))


async def _receive_forever(pipe: Connection) -> None:
    receiver = make_receiver("zmq", "127.0.0.1:0")
    endpoint = await receiver.start(Drop())
    pipe.send_bytes(endpoint.SerializeToString())
    await asyncio.Event().wait()


def _processes() -> tuple[dict[int, int], dict[int, float]]:
    """Parent and processor seconds of every process (proc_pid_stat(5))."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(fields[1])
            seconds[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return parents, seconds
