"""Whether a model fits where it is to run, found out before a byte of its weights is read.

Counts only what is certain: weights as they will be held, and memory that the operator asked for. What passes
may still run out of memory; ``explained`` tells that in the same words. Knows nothing of layers or caches.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from common.model.checkpoint import Checkpoint, are_scales
from common.model.names import Role, is_unused, locate
from common.model.shards import TensorEntry
from common.service.errors import ConfigError

_GB: Final = 1e9
_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")
_MEMINFO: Final = Path("/proc/meminfo")
# What torch says when the system, not its own allocator, has no more.
_CPU_OUT_OF_MEMORY: Final = "can't allocate memory"


def weight_bytes(
    checkpoint: Checkpoint,
    role: Role,
    dtype: torch.dtype,
    quantized_bytes: Callable[[str, TensorEntry], int | None] = lambda name, entry: None,
) -> int:
    """Bytes that the weights of ``role`` take in memory, from the headers alone.

    Args:
        dtype: of all of them but the quantised ones.
        quantized_bytes: of a parameter that is held in eight bits, its scales included; None for one that is not.
    """
    total = 0
    for entry in checkpoint.entries.values():
        its_role, name, _ = locate(entry.name)
        if its_role == role and not is_unused(name, ()) and not are_scales(entry, checkpoint.entries):
            quantized = quantized_bytes(name, entry)
            total += math.prod(entry.shape) * dtype.itemsize if quantized is None else quantized
    return total


def check_fits(title: str, needs: Mapping[str, int], device: torch.device) -> None:
    """Refuse what cannot fit.

    Args:
        title: of the server.
        needs: bytes by what they are for; a need that starts with ``--`` is a flag that could ask for less.

    Raises:
        ConfigError: ``device`` has less free than all needs together, or does not exist.
    """
    needed, free = sum(needs.values()), free_bytes(device)
    if needed <= free:
        return
    parts = ", ".join(f"{what} {_gb(num_bytes)}" for what, num_bytes in needs.items() if num_bytes)
    flags = [f"a smaller {what}" for what, num_bytes in needs.items() if what.startswith("--") and num_bytes]
    remedy = ", ".join(["a smaller model", *flags]) + " or a larger device"
    raise ConfigError(f"the {title} needs {_gb(needed)} ({parts}), {_gb(free)} free on {device}; use {remedy}")


@contextmanager
def explained(title: str, device: torch.device) -> Iterator[None]:
    """Seam: memory that runs out inside becomes a ConfigError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_ours = isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_OUT_OF_MEMORY in str(error)
        if not is_ours:
            raise
        raise ConfigError(
            f"the {title} ran out of memory on {device} while it started, {_gb(free_bytes(device))} free now; "
            "use a smaller model or a larger device"
        ) from None


def free_bytes(device: torch.device) -> int:
    """What can be had on a device now. Raises ConfigError for a GPU that is not there."""
    if device.type != "cuda":
        return free_host_bytes()
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs")
    free, _ = torch.cuda.mem_get_info(device)
    return free


def free_host_bytes() -> int:
    """Memory that can be had without swapping, in the machine and in the control groups we are in."""
    return min([_free_in_machine(), *_free_in_cgroups()])


def _free_in_machine() -> int:
    """Page cache counts as free where the system says so."""
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_cgroups(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> Iterator[int]:
    """What each limit above us leaves. Version 1 and 2 differ in the names of their files only."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _free_below(root, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _free_below(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _free_below(root: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """From our group up to the root. In a container our path may be the host's: then only the root can be seen."""
    own = root / path.lstrip("/")
    for group in (own, *own.parents):
        if group.is_relative_to(root) and (group / limit).is_file():
            most = (group / limit).read_text(encoding="ascii").strip()
            if most != "max":
                yield max(0, int(most) - int((group / usage).read_text(encoding="ascii")) + _page_cache(group, prefix))


def _page_cache(group: Path, prefix: str) -> int:
    """Pages of files count as used, and are given back when somebody needs them."""
    pairs = (line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    return sum(int(value) for key, value in pairs if key in (f"{prefix}active_file", f"{prefix}inactive_file"))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / _GB:.1f} GB"
