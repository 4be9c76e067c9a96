"""One broken medium costs itself: never a neighbour, never the pool, and nobody waits for ever."""

import asyncio
import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from common.model.geometry import Tiling
from common.service.errors import InvalidRequest, StartupError, Unavailable
from tests.vision_server.neighbours import encoded, picture
from tests.vision_server.videos import film, number_of
from vision_server.decode_job import MediaOptions, Outcome
from vision_server.decode_pool import DecodePool
from vision_server.media import decode, open_image
from vision_server.tiling import make_tiles

TILING = Tiling(1, 12, use_thumbnail=True)
OPTIONS = MediaOptions(TILING)
GOOD = encoded(picture(900, 600), "JPEG")
SLOW = encoded(picture(3000, 3000), "WEBP", lossless=True, method=0)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    """Two workers with the limits of a server."""
    pool = DecodePool(2, max_pixels=50_000_000, max_tiles=40)
    await pool.start()
    yield pool
    await pool.close()


@pytest_asyncio.fixture(loop_scope="module")
async def make_pool():
    async with contextlib.AsyncExitStack() as stack:

        async def start(num_workers: int = 1, **limits) -> DecodePool:
            pool = DecodePool(num_workers, **{"max_pixels": 50_000_000, "max_tiles": 40, **limits})
            await pool.start()
            stack.push_async_callback(pool.close)
            return pool

        yield start


def in_process(data: bytes, tiling: Tiling = TILING) -> np.ndarray:
    return make_tiles(decode(open_image(data)), tiling)


async def at_work(*pids: int) -> int:
    """The first of these processes to use the processor from now on."""
    before = {pid: cpu_ticks(pid) for pid in pids}
    while True:
        await asyncio.sleep(0.01)
        for pid in pids:
            if cpu_ticks(pid) > before[pid] + 2:
                return pid


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def cpu_ticks(pid: int) -> int:
    fields = proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def state_of(pid: int) -> str:
    """``Z``: dead, and nobody has asked. Empty: gone."""
    with contextlib.suppress(OSError):
        return proc(pid, "stat").rpartition(") ")[2][0]
    return ""


async def assert_refused(waiting) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        await waiting
    assert refusal.value.code == "invalid_image"
    return refusal.value.message


async def replaced(pool: DecodePool, pid: int) -> None:
    while pid in pool.pids or len(pool.pids) < pool.num_workers:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
async def test_tiles_are_those_of_this_process(pool, kind):
    for width, height in ((448, 448), (900, 600), (30, 700)):
        data = encoded(picture(width, height), kind)
        assert np.array_equal(await pool.tiles(data, OPTIONS), in_process(data))


async def test_measure_says_how_many_tiles_will_come(pool):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = encoded(picture(3000, 400), "JPEG", exif=exif)
    for turned in (False, True):
        for tiling in (TILING, Tiling(3, 9, use_thumbnail=False, tile_size=64), Tiling(1, 1, True, dynamic=False)):
            options = MediaOptions(tiling, exif_orientation=turned)
            tiles = await pool.tiles(data, options)
            assert len(tiles) == await pool.measure(data, options)
    assert tiles.shape == (1, 448, 448, 3)


async def test_many_at_once_each_get_their_own(pool):
    images = [encoded(picture(200 + 40 * n, 300, seed=n), "PNG") for n in range(12)]
    found = await asyncio.gather(*(pool.tiles(image, OPTIONS) for image in images))
    for image, tiles in zip(images, found, strict=True):
        assert np.array_equal(tiles, in_process(image))


async def test_tiles_outlive_the_pool_and_leave_no_descriptor(make_pool):
    pool = await make_pool()
    await pool.tiles(GOOD, OPTIONS)  # what a worker said while it started has been read to its end by now
    before = len(os.listdir("/proc/self/fd"))
    kept = [await pool.tiles(GOOD, OPTIONS) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    await pool.close()
    for tiles in kept:
        assert np.array_equal(tiles, in_process(GOOD))
        tiles[:] = 0  # ours to write to


async def test_memory_goes_back_with_the_last_array(pool):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("dvd-media")

    before = mapped()
    tiles = await pool.tiles(GOOD, OPTIONS)
    row = tiles[1, 2]
    del tiles
    await asyncio.sleep(0)  # the finished task lets go of its result
    assert mapped() == before + 1
    del row
    assert mapped() == before


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_crash_costs_one_image(pool, signal_number):
    """The neighbour in flight and those behind are served, and a new worker takes the place."""
    crashes = pool.num_crashes
    slow = asyncio.create_task(pool.tiles(SLOW, OPTIONS))
    victim = await at_work(*pool.pids)
    behind = [asyncio.create_task(pool.tiles(GOOD, OPTIONS)) for _ in range(4)]
    os.kill(victim, signal_number)
    message = await assert_refused(slow)
    assert str(victim) not in message
    for tiles in await asyncio.gather(*behind):
        assert np.array_equal(tiles, in_process(GOOD))
    await replaced(pool, victim)
    assert pool.num_crashes == crashes + 1
    assert len(await pool.tiles(SLOW, MediaOptions(Tiling(1, 1, True)))) == 1


async def test_a_worker_that_dies_idle_costs_nothing(make_pool):
    pool = await make_pool()
    for _ in range(2):
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        while state_of(pid) not in "Z":
            time.sleep(0.01)  # noqa: ASYNC251 - the pool must not know yet
        assert np.array_equal(await pool.tiles(GOOD, OPTIONS), in_process(GOOD))
    assert pool.num_crashes == 0


async def test_a_worker_that_stands_still_is_given_up(make_pool):
    pool = await make_pool(wall_seconds=1.0)
    victim = pool.pids[0]
    os.kill(victim, signal.SIGSTOP)
    await assert_refused(pool.tiles(GOOD, OPTIONS))
    assert np.array_equal(await pool.tiles(GOOD, OPTIONS), in_process(GOOD))
    assert pool.num_crashes == 1
    assert victim not in pool.pids


async def test_processor_time_is_limited(make_pool):
    pool = await make_pool(seconds=0.05, wall_seconds=60.0)
    await assert_refused(pool.tiles(SLOW, OPTIONS))
    assert np.array_equal(await pool.tiles(encoded(picture(64, 64)), OPTIONS), in_process(encoded(picture(64, 64))))
    assert pool.num_crashes == 1


async def test_a_memory_bomb_costs_one_image(make_pool):
    """What is in memory limits is an image, what is not is refused, by a worker that lives on."""
    pool = await make_pool(memory_bytes=40 * 2**20)
    worker = pool.pids[0]
    await assert_refused(pool.tiles(SLOW, OPTIONS))
    assert np.array_equal(await pool.tiles(GOOD, OPTIONS), in_process(GOOD))
    assert pool.pids == [worker] or pool.num_crashes == 1


async def test_who_leaves_does_not_disturb_the_next(make_pool):
    """The late outcome belongs to nobody; the worker is the same one."""
    pool = await make_pool(abandoned_seconds=60)
    worker = pool.pids[0]
    for _ in range(3):
        leaving = asyncio.create_task(pool.tiles(SLOW, OPTIONS))
        await at_work(worker)
        leaving.cancel()
        assert np.array_equal(await pool.tiles(GOOD, OPTIONS), in_process(GOOD))
    assert pool.pids == [worker]


async def test_nothing_is_decoded_for_long_for_nobody(make_pool):
    """A worker that is busy for a caller who left is replaced; that is no crash."""
    pool = await make_pool(abandoned_seconds=0.01)
    worker = pool.pids[0]
    leaving = asyncio.create_task(pool.tiles(SLOW, OPTIONS))
    await at_work(worker)
    os.kill(worker, signal.SIGSTOP)  # it will not be done in time on any machine
    leaving.cancel()
    assert np.array_equal(await pool.tiles(GOOD, OPTIONS), in_process(GOOD))
    assert worker not in pool.pids
    assert pool.num_crashes == 0


async def test_who_leaves_the_queue_takes_no_worker(make_pool):
    pool = await make_pool()
    first = asyncio.create_task(pool.tiles(SLOW, OPTIONS))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(pool.tiles(GOOD, OPTIONS)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    assert len(await waiting[2]) == 7
    assert len(await first) == 10


async def test_workers_have_given_up_what_they_do_not_need(make_pool, monkeypatch):
    monkeypatch.setenv("DVD_API_KEY", "a-secret-of-the-server")
    (pid,) = (await make_pool()).pids
    status = dict(line.split(":\t", 1) for line in proc(pid, "status").splitlines())
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
    limits = proc(pid, "limits")
    for line in ("Max file size             0 ", "Max core file size        0 ", "Max open files            16 "):
        assert line in limits
    try:
        mapped, environment = proc(pid, "maps"), proc(pid, "environ")
        open_files = {os.readlink(f"/proc/{pid}/fd/{each}").partition(":")[0] for each in os.listdir(f"/proc/{pid}/fd")}
    except PermissionError:
        return  # as it should be: only root may look into a worker
    assert "libtorch" not in mapped
    assert "secret" not in environment
    assert open_files == {"/dev/null", "socket"}


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd')",
        "open('/tmp/x', 'w')",
        "socket.socket()",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "os.execv('/bin/true', ['true'])",
        "threading.Thread(target=print).start()",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC | mmap.PROT_READ)",
        "os.memfd_create('x')",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "bytearray(300_000_000)",
    ],
)
async def test_what_has_been_given_up_does_not_come_back(attempt):
    """Even for code of an attacker's choice."""
    code = (
        "import mmap, os, resource, socket, threading; from vision_server import sandbox\n"
        f"assert sandbox.enter(200_000_000)\nbytearray(100_000_000)\ntry: {attempt}\n"
        "except (OSError, MemoryError, RuntimeError, ValueError): os._exit(7)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 7


async def test_workers_do_not_outlive_a_pool_that_is_closed(make_pool):
    pool = await make_pool(2)
    pids = list(pool.pids)
    running = asyncio.create_task(pool.tiles(SLOW, OPTIONS))
    await asyncio.sleep(0.05)
    await pool.close()
    assert not any(state_of(pid) for pid in pids)
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(Unavailable):
        await pool.tiles(GOOD, OPTIONS)


async def test_workers_that_cannot_start_are_an_error_of_the_operator(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(StartupError, match="No such file"):
        await DecodePool(2, max_pixels=10**6, max_tiles=12).start()
    monkeypatch.undo()
    (tmp_path / "PIL.py").write_text("raise ImportError('no pictures today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartupError, match="no pictures today"):
        await DecodePool(2, max_pixels=10**6, max_tiles=12).start()


async def test_workers_that_no_longer_start_are_tried_ever_more_slowly(make_pool, monkeypatch, tmp_path):
    """Callers are told to go elsewhere, and are served again once workers start."""
    pool = await make_pool()
    (tmp_path / "PIL.py").write_text("raise ImportError('no pictures today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    os.kill(pool.pids[0], signal.SIGKILL)
    async with asyncio.timeout(60):
        while not pool.is_starved:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable):
            await pool.tiles(GOOD, OPTIONS)
        monkeypatch.undo()
        while pool.is_starved:
            await asyncio.sleep(0.01)
        assert np.array_equal(await pool.tiles(GOOD, OPTIONS), in_process(GOOD))


async def test_videos_have_a_tile_for_each_frame(pool):
    data = film(30)
    facts = await pool.probe(data)
    assert (facts.num_frames, round(facts.seconds, 2)) == (30, 1.2)
    options = MediaOptions(TILING, num_frames=5)
    assert await pool.measure(data, options) == 5
    tiles = await pool.tiles(data, options)
    assert tiles.shape == (5, 448, 448, 3)
    assert [number_of(tile) for tile in tiles] == [2, 8, 14, 19, 25]


async def test_an_image_is_no_video_and_the_reverse(pool):
    with pytest.raises(InvalidRequest) as refusal:
        await pool.tiles(GOOD, MediaOptions(TILING, num_frames=4))
    assert refusal.value.code == "unsupported_media"
    await assert_refused(pool.measure(film(5), OPTIONS))


@pytest.mark.parametrize(
    "record",
    [b"", b"x" * 28, Outcome(1, code="invalid_image").pack()[:-1] + b"\xff", Outcome(1).pack() + b"\xff"]
    + [Outcome(1, seconds=seconds).pack() for seconds in (-1.0, math.inf, math.nan)],
)
async def test_a_record_that_makes_no_sense_is_an_error(record):
    with pytest.raises(ValueError, match="no sense"):
        Outcome.unpack(record)


async def test_the_way_to_a_worker_and_back_is_short(make_pool):
    """Milliseconds, not tens of them: best of several, on a machine that may be busy."""
    pool = await make_pool()
    data = encoded(picture(448, 448), "BMP")
    fastest = 1.0
    for _ in range(30):
        started = time.perf_counter()
        await pool.measure(data, OPTIONS)
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 0.02
