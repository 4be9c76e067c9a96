"""Compressed image -> tiles: the published Pillow path against the vision server's decode workers, side by side.

    python -m benchmarks decode --size 4000x3000 --results benchmarks/results

Both get the same JPEG, a made-up photograph, and must give the same pixels; in every round each runs once. The second
table says where the time goes, and what the way to a worker costs a small image.
"""

import argparse
import asyncio
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.tables import Table, number
from common.model.geometry import Tiling, choose_grid
from common.service.errors import InternalError
from vision_server.decode_job import MediaOptions
from vision_server.decode_pool import DecodePool
from vision_server.media import MAX_PIXELS, decode, open_image
from vision_server.pillow_memory import rgbx
from vision_server.tiling import Tiles, tiles_of_pixels

PILLOW, WORKER = "Pillow", "decode worker"
Times = dict[str, list[float]]


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with the structure and the noise of a camera's: some 3 bits a pixel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def reference(data: bytes, tiling: Tiling, times: Times | None = None) -> Tiles:
    """What the published code does, stage by stage (INTERNVL.md 6)."""
    clock = _Clock(times)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    clock.lap("Pillow: decode")
    side = tiling.tile_size
    cols, rows = choose_grid(*image.size, tiling.min_tiles, tiling.max_tiles, side)
    sheet = image.resize((side * cols, side * rows))
    clock.lap("Pillow: resize to the sheet")
    cells = [sheet.crop((side * c, side * r, side * (c + 1), side * (r + 1))) for r in range(rows) for c in range(cols)]
    if len(cells) > 1:
        cells.append(image.resize((side, side)))
        clock.lap("Pillow: resize to the thumbnail")
    tiles = np.stack([np.asarray(cell) for cell in cells])
    clock.lap("Pillow: cells to arrays")
    return tiles


def ours(data: bytes, tiling: Tiling, times: Times) -> None:
    """The stages inside a worker."""
    clock = _Clock(times)
    image = decode(open_image(data))
    clock.lap("ours: decode")
    pixels = rgbx(image)  # free in a worker, where images lie in one piece
    clock = _Clock(times)
    tiles_of_pixels(pixels, tiling)
    clock.lap("ours: all tiles")


class _Clock:
    """Notes milliseconds between laps."""

    def __init__(self, times: Times | None) -> None:
        self._times = times
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        if self._times is not None:
            self._times.setdefault(name, []).append(1000 * (now - self._last))
        self._last = now


async def measure(width: int, height: int, max_tiles: int, num_rounds: int) -> dict[str, Any]:
    """Milliseconds of every round, by system and by stage.

    Raises:
        InternalError: the pixels differ.
    """
    data, small = photograph(width, height), photograph(448, 448)
    tiling = Tiling(1, max_tiles, use_thumbnail=True)
    options = MediaOptions(tiling)
    pool = DecodePool(1, max_pixels=MAX_PIXELS, max_tiles=max_tiles)
    await pool.start()
    try:
        expected, found = reference(data, tiling), await pool.tiles(data, options)
        if not np.array_equal(expected, found):
            raise InternalError("the worker's tiles are not those of Pillow")
        totals: Times = {}
        stages: Times = {}
        hops: Times = {}
        for _ in range(num_rounds):
            await _note(totals, PILLOW, lambda: asyncio.to_thread(reference, data, tiling))
            await _note(totals, WORKER, lambda: pool.tiles(data, options))
            reference(data, tiling, stages)
            ours(data, tiling, stages)
            for _ in range(5):
                await _note(hops, "448 x 448 in this process", lambda: asyncio.to_thread(_in_process, small, tiling))
                await _note(hops, "448 x 448 in a worker", lambda: pool.tiles(small, options))
    finally:
        await pool.close()
    about = {"image": f"{width}x{height} JPEG", "bytes": len(data), "tiles": len(expected)}
    return about | {"ms": totals, "stages_ms": stages, "hop_ms": hops}


def _in_process(data: bytes, tiling: Tiling) -> Tiles:
    return tiles_of_pixels(rgbx(decode(open_image(data))), tiling)


async def _note(times: Times, name: str, call: Callable[[], Awaitable[Any]]) -> None:
    started = time.perf_counter()
    await call()
    times.setdefault(name, []).append(1000 * (time.perf_counter() - started))


def comparison(found: dict[str, Any]) -> Table:
    pillow, worker = (median(found["ms"][name]) for name in (PILLOW, WORKER))
    best = min(found["ms"][PILLOW]) / min(found["ms"][WORKER])
    rows = [
        ["median, ms", number(pillow), number(worker), f"{pillow / worker:.2f} x"],
        ["fastest, ms", *(number(min(found["ms"][name])) for name in (PILLOW, WORKER)), f"{best:.2f} x"],
    ]
    title = f"{found['image']}, {found['bytes'] / 1e6:.1f} MB, to {found['tiles']} tiles, the same pixels"
    return Table(title, ["", PILLOW, WORKER, "ratio"], rows)


def by_stage(found: dict[str, Any]) -> Table:
    stages = found["stages_ms"] | found["hop_ms"]
    rows = [[name, number(median(each)), number(min(each))] for name, each in stages.items()]
    return Table("By stage, milliseconds", ["", "median", "fastest"], rows)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("--size", default="4000x3000", help="of the photograph, WxH")
    parser.add_argument("--max-tiles", type=int, default=12, help="thumbnail not counted")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    width, height = (int(side) for side in arguments.size.split("x"))
    found = asyncio.run(measure(width, height, arguments.max_tiles, arguments.rounds))
    for table in (comparison(found), by_stage(found)):
        print_table(Console(width=100), table)
    if arguments.results:
        print(write_record(arguments.results, "decode", argv, found))
