"""How much memory the KV cache gets when nobody says."""

from typing import Final

import torch

from common.model.memory import free_host_bytes

_CPU_BYTES: Final = 1 << 30
_MAX_CPU_FRACTION: Final = 0.5  # of the memory that can be had


def default_kv_bytes(device: torch.device, cuda_fraction: float) -> int:
    """On CUDA ``cuda_fraction`` of the free memory, elsewhere a gibibyte or half of what is there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * cuda_fraction)
    return min(_CPU_BYTES, int(free_host_bytes() * _MAX_CPU_FRACTION))
