"""Runs bad images through a decode pool, good ones beside them, and tells what became of each."""

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.model.geometry import Tiling
from common.service.errors import InvalidRequest
from tests.vision_server.neighbours import encoded, picture
from vision_server.decode_job import MediaOptions
from vision_server.decode_pool import DecodePool
from vision_server.media import decode, open_image
from vision_server.tiling import make_tiles

OPTIONS = MediaOptions(Tiling(1, 12, use_thumbnail=True), exif_orientation=True)
GOOD = encoded(picture(500, 300), "JPEG")


@dataclass
class Verdict:
    """``outcomes``: name -> ``tiles``, or the code of the refusal. ``peak_bytes``: of any worker's resident memory."""

    outcomes: dict[str, str] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.outcomes.values())


async def judge(pool: DecodePool, images: Mapping[str, bytes], options: MediaOptions = OPTIONS) -> Verdict:
    """Everything at once, and every ninth a good one whose tiles must be right. Raises AssertionError, or what a
    medium ended with that is neither tiles nor ``InvalidRequest``."""
    verdict = Verdict()
    expected = make_tiles(decode(open_image(GOOD)), options.tiling)

    async def one(name: str, data: bytes) -> None:
        try:
            tiles = await pool.tiles(data, options)
        except InvalidRequest as refusal:
            assert not re.search(r"0x[0-9a-f]{6}|/", refusal.message), (name, refusal.message)
            verdict.outcomes[name] = refusal.code
        else:
            assert tiles.dtype == np.uint8 and tiles.shape[1:] == (448, 448, 3), name
            verdict.outcomes[name] = "tiles"
        verdict.peak_bytes = max(verdict.peak_bytes, _peak_bytes(pool.pids))

    async def good(beside: str) -> None:
        assert np.array_equal(await pool.tiles(GOOD, options), expected), beside

    async with asyncio.TaskGroup() as tasks:
        for number, (name, data) in enumerate(images.items()):
            tasks.create_task(one(name, data))
            if number % 9 == 0:
                tasks.create_task(good(name))
    return verdict


def _peak_bytes(pids: Iterable[int]) -> int:
    peaks = [0]
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue  # just ended
        peaks += [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return max(peaks)
