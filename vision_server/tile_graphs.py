"""Encoding as CUDA graphs: one launch replays the whole way of some tiles that was captured at the start.

A graph has a fixed number of tiles, so there is one for each of a few numbers, and a batch is divided into those that
take the least time together, by the measure of each; the last may have black tiles to fill it. The tower's layers take
hundreds of launches, which is as long as the GPU needs for one or two tiles of the 300M shape.

Without a GPU the same numbers of tiles run operation by operation. Knows nothing of images or streams.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from common.model.graphs import Capture, Graph

log = logging.getLogger(__name__)

_MAX_REPLAY_SECONDS: Final = 1.0
"""Nothing shows a sign of life within a replay, and a router gives a server up after three seconds without."""
_NUM_MEASURES: Final = 2

Compute = Callable[[Tensor], Sequence[Tensor]]
"""Tiles [n, S, S, 3] uint8 -> what is wanted of them, [n, ...] each."""


def batch_sizes(max_tiles: int) -> list[int]:
    """Powers of two, and the largest there can be."""
    return sorted({1 << exponent for exponent in range(max_tiles.bit_length())} | {max_tiles})


def quick_sizes(sizes: Sequence[int], seconds_of_one: float) -> list[int]:
    """Those that surely take no longer than a replay may: a tile among others takes no more time than one alone. The
    smallest stays in any case."""
    return [size for size in sizes if size == min(sizes) or size * seconds_of_one <= _MAX_REPLAY_SECONDS]


def divide(num_tiles: int, seconds: Mapping[int, float]) -> list[int]:
    """Sizes, largest first, that hold ``num_tiles`` between them and take the least time.

    Args:
        seconds: of each size there is; above 0.
    """
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for count in range(1, num_tiles + 1):
        ways = ((took + best[max(count - size, 0)][0], size) for size, took in seconds.items())
        total, size = min(ways)
        best.append((total, [*best[max(count - size, 0)][1], size]))
    return sorted(best[num_tiles][1], reverse=True)


class TileGraphs:
    """Captures a graph of each size when it is made.

    Args:
        compute: is captured. Every tile's result depends on this tile alone.
        tile_side: pixels.
        capture: ``CudaCapture``, or something that computes the same without a GPU.
        on_progress: called at least every few replays' time: a sign of life.
    """

    def __init__(
        self,
        compute: Compute,
        sizes: Sequence[int],
        tile_side: int,
        device: torch.device,
        capture: Capture,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._compute = compute
        self._device = device
        self._on_progress = on_progress
        few = torch.zeros((min(sizes), tile_side, tile_side, 3), dtype=torch.uint8, device=device)
        seconds_of_one = self._measure(lambda: compute(few)) / len(few)
        sizes = quick_sizes(sizes, seconds_of_one)
        self._tiles = few.new_zeros(max(sizes), *few.shape[1:])
        self._outputs = [part.new_empty(max(sizes), *part.shape[1:]) for part in compute(few)]
        self._graphs: dict[int, Graph] = {}
        self.seconds: dict[int, float] = {}
        """Of a replay, by number of tiles."""
        for size in sorted(sizes, reverse=True):  # the largest first: the others find room in its memory
            self._graphs[size] = capture(partial(self._compute_first, size))
            self.seconds[size] = self._measure(self._graphs[size].replay)
        self._divisions: dict[int, list[int]] = {}
        figures = ", ".join(f"{size} in {took * 1e3:.1f} ms" for size, took in self.seconds.items())
        log.info("captured CUDA graphs; tiles: %s", figures)

    def run(self, tiles: Tensor, on_replay: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Tiles ``[n, S, S, 3]`` uint8 on the device -> what ``compute`` makes of them, in memory of its own.

        ``on_replay`` is called behind each replay that was launched.
        """
        results = [output.new_empty(len(tiles), *output.shape[1:]) for output in self._outputs]
        start = 0
        for size in self._division(len(tiles)):
            end = min(start + size, len(tiles))
            self._tiles[: end - start].copy_(tiles[start:end])
            self._tiles[end - start : size].zero_()
            self._graphs[size].replay()
            for result, output in zip(results, self._outputs, strict=True):
                result[start:end].copy_(output[: end - start])
            on_replay()
            start = end
        return results

    def _division(self, num_tiles: int) -> list[int]:
        if num_tiles not in self._divisions:
            self._divisions[num_tiles] = divide(num_tiles, self.seconds)
        return self._divisions[num_tiles]

    def _compute_first(self, size: int) -> None:
        for output, part in zip(self._outputs, self._compute(self._tiles[:size]), strict=True):
            output[:size].copy_(part)

    def _measure(self, work: Callable[[], object]) -> float:
        """Seconds, the least of some, from an idle device to an idle device."""
        times = []
        for _ in range(_NUM_MEASURES):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - started)
            self._on_progress()
        return max(min(times), 1e-9)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
