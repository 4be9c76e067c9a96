"""Tiles of a batch side by side on the cores of a CPU, each with its part of the threads.

Threads that share one tile meet after every operation, some 20 times a layer; beside a language server one of them is
always late, and all wait. Threads with tiles of their own meet once a batch. Measured on two cores, 38 M parameters,
float32: 1.06 tiles/s together, 1.27 side by side (docs/decisions.md).
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from vision_server.free_cores import FreeCores


class SideBySide:
    """Calls ``encode`` for each tile, [1, 3, S, S] -> [1, tokens per tile, hidden], from as many threads as fit, or
    from as many as others leave cores for.

    Args:
        fixed: one thread computes a tile, always. Sums are rounded in another order where threads share them, so only
            then are a tile's features the same bits whatever it is encoded with and however many cores are free.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], num_threads: int, *, fixed: bool = False) -> None:
        self._encode = encode
        self._num_threads = num_threads
        self._is_fixed = fixed
        self._free_cores = FreeCores(num_threads)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tile")

    def __call__(self, pixels: Tensor) -> Tensor:
        """[num_tiles, 3, S, S] -> [num_tiles, tokens per tile, hidden]. Raises what ``encode`` raised first."""
        parts: list[Tensor] = []
        while len(parts) < len(pixels):
            # Threads that share the last tile of a batch would wait for those that others put off.
            is_full = len(pixels) - len(parts) >= self._num_threads
            num_threads = self._free_cores.num_threads(may_look=is_full or not parts)
            tiles = pixels[len(parts) : len(parts) + num_threads]
            started, used = _now()
            share = 1 if self._is_fixed else num_threads // len(tiles)
            parts += self._at_once(tiles, share)
            ended, used_then = _now()
            self._free_cores.observe(share * len(tiles), ended - started, used_then - used)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _at_once(self, tiles: Tensor, share: int) -> list[Tensor]:
        """No more tiles than threads; each gets its ``share`` of them."""
        if share == self._num_threads:
            return [self._encode(tiles)]
        try:
            running = [self._pool.submit(self._encode_with, share, tile) for tile in torch.split(tiles, 1)]
            wait(running)  # also after a failure: the caller may free memory and try again
        finally:
            # oneMKL has one number for the whole process, and threads that are new to torch start with the last one.
            torch.set_num_threads(self._num_threads)
        return [future.result() for future in running]

    @torch.inference_mode()
    def _encode_with(self, num_threads: int, tile: Tensor) -> Tensor:
        torch.set_num_threads(num_threads)  # of this thread
        return self._encode(tile)


def _now() -> tuple[float, float]:
    """Seconds on the wall, and processor seconds of this process."""
    return time.perf_counter(), time.process_time()
