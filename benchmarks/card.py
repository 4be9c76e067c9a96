"""What a device can do at best, measured: how fast it copies memory, and how fast it multiplies matrices.

The yardstick for everything that runs on it: a decode step reads memory, a prompt multiplies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

_ROUNDS: Final = 10
_COPY_BYTES: Final = {"cuda": 4 * 2**30, "cpu": 64 * 2**20}
_SIDE: Final = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    copy_bytes_per_s: float  # bytes read and bytes written
    matmul_flop_per_s: float  # bfloat16, a multiplication and an addition count as two


def measure_card(device: torch.device) -> Card:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Card(name, _copy_rate(device), _matmul_rate(device))


def seconds(work: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """The median time of ``work``, from an idle device to an idle device; a first round only warms up."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _copy_rate(device: torch.device) -> float:
    source = torch.randint(256, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device) -> float:
    """Of random matrices: zeros cost a GPU less power, and run faster."""
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
