"""A child process that must not outlive its parent. Imports nothing: it is what a child does first."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); survives an exec


def die_with(parent: int) -> None:
    """No orphan, even when the parent is killed: Linux ends us with the thread that started us.

    Linux only; elsewhere a killed parent leaves its children behind.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
