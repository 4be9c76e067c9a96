"""Where a model runs and in which precision, when the operator leaves it to us. Both servers must decide alike."""

from typing import Final, Literal

import torch

from common.service import metrics
from common.service.errors import ConfigError

DtypeName = Literal["auto", "bfloat16", "float32"]
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises ConfigError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name[:64]!r} is unknown to torch") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name[:64]!r} was asked for, but torch sees no GPU")
    return device


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies in it, else float32.

    On a CPU with AVX-512 BF16 and no AMX, an InternViT-300M tile takes 0.6 of its float32 time (docs/decisions.md).
    """
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    # torch names these with an underscore and offers nothing else; a release without them computes in float32.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe is not None and probe() for probe in probes)


def export_memory(device: torch.device) -> None:
    """Have ``/metrics`` tell the memory of a GPU, as torch's allocator counts it when it is asked. Nothing of a CPU."""
    if device.type != "cuda":
        return
    metrics.GPU_MEMORY_BYTES.labels("allocated").set_function(lambda: torch.cuda.memory_allocated(device))
    metrics.GPU_MEMORY_BYTES.labels("reserved").set_function(lambda: torch.cuda.memory_reserved(device))
