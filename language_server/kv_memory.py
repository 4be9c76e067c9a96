"""How much memory the KV cache gets when nobody says."""

import os
from pathlib import Path
from typing import Final

import torch

_CPU_BYTES: Final = 1 << 30
_MAX_CPU_FRACTION: Final = 0.5  # of the memory that can be had


def default_kv_bytes(device: torch.device, cuda_fraction: float) -> int:
    """On CUDA ``cuda_fraction`` of the free memory, elsewhere a gibibyte or half of what is there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * cuda_fraction)
    return min(_CPU_BYTES, int(_available_bytes() * _MAX_CPU_FRACTION))


def _available_bytes() -> int:
    """Memory that can be had without swapping; page cache counts as free where the system says so."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
