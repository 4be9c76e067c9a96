"""The last step before a server program: tie it to its parent, pin it to its cores, become it.

``python -m deploy.launch PARENT CORES MODULE ARGS...``, started by ``deploy.process``. A program of its own because
Python code between fork and exec (``preexec_fn``) can deadlock in a parent that has threads. Imports nothing of ours.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); survives the exec below


def main(argv: list[str]) -> None:
    parent, cores, module, *args = argv
    die_with(int(parent))
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execv(sys.executable, [sys.executable, "-m", module, *args])


def die_with(parent: int) -> None:
    """No orphan, even when the parent is killed. Linux only; elsewhere a killed parent leaves its servers behind."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
