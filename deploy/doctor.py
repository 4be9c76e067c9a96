"""``dvd doctor``: what this machine has, one line per check. Changes nothing and needs no running server."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape

from common.service.errors import CheckpointError, ConfigError
from deploy.settings import DoctorSettings, model_directory

if TYPE_CHECKING:
    from common.model.checkpoint import Checkpoint
    from common.model.config import InternVLConfig
    from common.model.names import Role

Verdict = Literal["ok", "warn", "fail"]

ROLES: Final[tuple["Role", ...]] = ("vision", "language")
_DISTRIBUTION: Final = "dvd-serve"
_CONSTRAINTS: Final = Path(__file__).parent.parent / "constraints.txt"
_MIN_PYTHON: Final = (3, 11)
_GIB: Final = 2**30
_LOW_MEMORY_GIB: Final = 4
_LOW_SHM_MIB: Final = 64  # what docker gives unless told otherwise
_COLOURS: Final[dict[Verdict, str]] = {"ok": "green", "warn": "yellow", "fail": "red"}
_OPTIONAL: Final = {
    "bitsandbytes": "language weights in 8 bits",
    "flash_attn": "fast attention on CUDA",
    "triton": "paged attention on CUDA, comes with torch",
    "nixl_cu13": "RDMA between machines",
    "ray": "clusters",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """``fail``: DvD cannot run here; ``warn``: it can, but slower, with less, or untested."""

    verdict: Verdict
    subject: str
    detail: str


def main(settings: DoctorSettings) -> int:
    """``dvd doctor``: 0 unless something needed is missing."""
    console = Console(highlight=False)
    worst: Counter[Verdict] = Counter()
    for finding in examine(settings.model):
        worst[finding.verdict] += 1
        colour = _COLOURS[finding.verdict]
        console.print(f"[{colour}]{finding.verdict:<5}[/]{finding.subject:<14}{escape(finding.detail)}", soft_wrap=True)
    return 1 if worst["fail"] else 0


def examine(model: str | None = None) -> Iterator[Finding]:
    """All findings, the machine first."""
    for check in _CHECKS:
        yield from check()
    if model is not None:
        yield from check_model(model)


def check_python() -> Iterator[Finding]:
    is_new_enough = sys.version_info >= _MIN_PYTHON
    yield Finding("ok" if is_new_enough else "fail", "python", f"{platform.python_version()} on {platform.platform()}")


def check_packages() -> Iterator[Finding]:
    """Every package that the installed DvD asks for, against its bounds and against the versions it is tested with."""
    tested = _tested_versions()
    differing: list[str] = []
    for requirement in _requirements():
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", "packages", f"{requirement.name} is missing; pip install -c constraints.txt -e .")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Finding("fail", "packages", f"{requirement.name} {found} installed, {requirement.specifier} needed")
        elif requirement.name in tested and Version(found).public != tested[requirement.name]:
            differing.append(f"{requirement.name} {found} ({tested[requirement.name]})")
    if differing:
        yield Finding("warn", "packages", f"other versions than tested: {', '.join(differing)}")
    else:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "grpcio")]
        yield Finding("ok", "packages", ", ".join(versions))


def check_cpu() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    detail = f"{usable} cores, bfloat16 in hardware: {', '.join(fast) or 'no'}"
    yield Finding("ok" if fast or not flags else "warn", "cpu", detail)


def check_memory() -> Iterator[Finding]:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / _GIB for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    verdict: Verdict = "ok" if total >= _LOW_MEMORY_GIB else "warn"
    yield Finding(verdict, "memory", f"{total:.1f} GiB, {free:.1f} GiB unused")


def check_gpus() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return  # reported among the packages
    import torch

    if not torch.cuda.is_available():
        yield Finding("ok", "gpu", f"none; torch {torch.__version__} runs on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding("ok", "gpu", f"cuda:{index} {gpu.name}, {gpu.total_memory / _GIB:.0f} GiB")


def check_extras() -> Iterator[Finding]:
    for module, purpose in _OPTIONAL.items():
        state = "installed" if importlib.util.find_spec(module) else "not installed"
        yield Finding("ok", module, f"{state} (optional: {purpose})")


def check_shared_memory() -> Iterator[Finding]:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return
    free = shutil.disk_usage(directory).free / 2**20
    yield Finding("ok" if free >= _LOW_SHM_MIB else "warn", "/dev/shm", f"{free:.0f} MiB free")


def check_sockets() -> Iterator[Finding]:
    """What ``dvd serve`` needs: a port on loopback, and Unix sockets in a private directory."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield Finding("ok", "loopback", f"could listen on port {server.getsockname()[1]}")
    except OSError as error:
        yield Finding("fail", "loopback", f"cannot listen on 127.0.0.1: {error.strerror}")
    try:
        with tempfile.TemporaryDirectory(prefix="dvd-") as directory, socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{directory}/doctor.sock")
            yield Finding("ok", "unix sockets", f"in {Path(directory).parent}")
    except OSError as error:
        reason = error.strerror or str(error)
        yield Finding("fail", "unix sockets", f"in {tempfile.gettempdir()}: {reason}; set TMPDIR to a short path")


def check_model(model: str) -> Iterator[Finding]:
    """Reads the configuration and the headers of the shards, no weights."""
    from common.model.checkpoint import Checkpoint, locate
    from common.model.config import load_config

    try:
        directory = model_directory(model)
        config = load_config(directory)
        checkpoint = Checkpoint.open(directory)
    except (CheckpointError, ConfigError) as error:
        yield Finding("fail", "model", str(error))
        return
    num_bytes: Counter[str] = Counter()
    unknown = [name for name in checkpoint.entries if locate(name)[0] is None]
    for name, entry in checkpoint.entries.items():
        num_bytes[locate(name)[0] or "unknown"] += entry.num_bytes
    if unknown:
        yield Finding("fail", "model", f"tensor {unknown[0]} is of no known part of an InternVL model")
    for role in ROLES:
        if not num_bytes[role]:
            yield Finding("fail", "model", f"no {role} tensors in {directory}")
    text = config.text["model_type"]
    sizes = ", ".join(f"{role} {num_bytes[role] / 2**20:.1f} MiB" for role in ROLES)
    yield Finding("ok", "model", f"{config.layout} format, {text}, {len(checkpoint.entries)} tensors: {sizes}")
    yield from _check_fit(checkpoint, config)


def _check_fit(checkpoint: "Checkpoint", config: "InternVLConfig") -> Iterator[Finding]:
    """Of each server by itself, as it would be refused when it starts; the other one may run elsewhere."""
    from common.model import memory
    from common.model.device import choose_device, choose_dtype
    from language_server.quantization import choose_quantization

    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    for role in ROLES:
        try:
            quantization = choose_quantization("auto", checkpoint, config, dtype=dtype, device=device)
            weights = memory.weight_bytes(checkpoint, role, dtype, quantization.num_bytes)
            memory.check_fits(f"{role} server", {"weights": weights}, device)
        except (CheckpointError, ConfigError) as error:
            yield Finding("warn", "model", str(error))


_CHECKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (
    check_python,
    check_packages,
    check_cpu,
    check_memory,
    check_gpus,
    check_extras,
    check_shared_memory,
    check_sockets,
)


def _requirements() -> Iterator[Requirement]:
    """Of the installed DvD, without extras."""
    for line in importlib.metadata.requires(_DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _tested_versions() -> dict[str, str]:
    """``constraints.txt``, where there is a source tree."""
    if not _CONSTRAINTS.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in _CONSTRAINTS.read_text("utf-8").splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {name.replace("_", "-").lower(): version for name, _, version in pairs}


def _cpu_flags() -> frozenset[str]:
    """Empty where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    lines = (line.partition(":")[2] for line in info.read_text("utf-8").splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())
