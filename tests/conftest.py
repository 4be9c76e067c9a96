"""Tests start many processes on few cores: one thread each, and no OpenMP thread that waits by spinning. GPU kernels
run in Triton's interpreter.

``make test`` runs three tests at a time, as most of them wait for processes that start: module by module, so that what
a module shares is started once, and the modules that take longest first.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

SLOWEST: Final = (
    "tests/faults/test_chaos.py",
    "tests/fuzz/",
    "tests/faults/",
    "tests/deploy/cluster/test_cluster.py",
    "tests/end_to_end/",
    "tests/clients/",
    "tests/benchmarks/test_compare.py",
    "tests/benchmarks/test_table18.py",
    "tests/deploy/cluster/test_local_head.py",
    "tests/test_readme.py",
    "tests/deploy/",
    "tests/benchmarks/",
    "tests/common/transport/",
    "tests/router/",
)
"""In this order; the rest is quick."""
ROOT: Final = Path(__file__).parents[1]
KERNELS: Final = ROOT / "language_server" / "kernels" / "__pycache__"
"""Where Numba keeps what it has compiled."""
OF_THEIR_OWN: Final = (
    "test_node_groups",
    "test_openapi",
    "test_parity",
    "test_start_up_errors",
    "test_tensor_parallel",
)
"""Modules of ``end_to_end`` that start their own systems; the others share one."""


def pytest_sessionstart(session: pytest.Session) -> None:
    is_first_of_many = bool(session.config.getoption("numprocesses", None)) and not hasattr(
        session.config, "workerinput"
    )
    if is_first_of_many and not any(KERNELS.glob("*.nbi")):
        subprocess.run([sys.executable, "-m", "tests.compile_kernels"], check=True, cwd=ROOT, timeout=600)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(nodeid: str) -> int:
    return next((rank for rank, place in enumerate(SLOWEST) if nodeid.startswith(place)), len(SLOWEST))


def _one_after_the_other(nodeid: str) -> str:
    """What tests that must not run side by side have in common."""
    module = nodeid.partition("::")[0]
    if module.startswith("tests/end_to_end/") and not any(name in module for name in OF_THEIR_OWN):
        return "nano"
    if module.startswith("tests/clients/"):
        return "clients"
    if module.endswith("faults/test_chaos.py"):
        return "chaos"  # has a system of its own
    if module.startswith("tests/faults/"):
        return "faults"  # they share a system, and measure how soon others notice
    if module.endswith(("cluster/test_cluster.py", "cluster/test_local_head.py")):
        return "ray"  # a second Ray cluster would be too much for the machine
    return module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Its marker xdist_group would say the same, but pytest-xdist 3.8 does not see it with pytest 9.2.
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _one_after_the_other(nodeid)

    config.option.loadscopereorder = False  # by the number of tests, which says little
    return ByModule(config, log)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection between tests looks at it again, and no fork copies it."""
    gc.collect()
    gc.freeze()
