"""A measurement somebody else can repeat: command, commit, versions, hardware, raw figures, in one dated JSON file."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

_PACKAGES = ("torch", "transformers", "grpcio", "pyzmq", "numpy", "pillow")


def write_record(folder: Path, name: str, argv: Sequence[str], figures: Any) -> Path:
    """Write ``figures`` with all that explains them; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    record = {
        "command": " ".join(["python -m benchmarks", name, *argv]),
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "figures": figures,
    }
    path = folder / f"{now:%Y-%m-%d}-{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path


def commit() -> str:
    """The commit of the code that ran, marked when it had changes on top."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=10)
    return found.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def hardware() -> dict[str, Any]:
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "memory_gib": _memory_gib()}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
