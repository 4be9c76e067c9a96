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

_PACKAGES = ("torch", "triton", "transformers", "grpcio", "pyzmq", "numpy", "pillow")
_CLIENT_PACKAGES = ("aiohttp", "uvloop", "msgspec")


def write_record(folder: Path, name: str, argv: Sequence[str], figures: Any, of: str = "") -> Path:
    """Write ``figures`` of the benchmark ``name`` with all that explains them; returns the file.

    ``of``: what was measured, where several records of a day would have one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks", name, *argv])
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-{'-'.join(filter(None, [name, of]))}.json"
    record = {**environment(command), "figures": figures}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path


def environment(command: str) -> dict[str, Any]:
    """What ran, when, from which code, with which versions, on what."""
    return {
        "command": command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
    }


def commit() -> str:
    """The commit of the code that ran, marked when it had changes on top."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def versions() -> dict[str, str]:
    """Those that are installed."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_CLIENT_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Of the machine this runs on; a server may be on another."""
    found = {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "memory_gib": _memory_gib()}
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return found | ({"gpus": gpus.splitlines()} if gpus else {})


def _output(*command: str) -> str:
    """What a command prints; nothing where it does not exist or fails."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
