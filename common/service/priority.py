"""How much of the processor a program may take from others on the same machine."""

import contextlib
import os
from typing import Final

LOWEST: Final = 19


def yield_to_others(nice: int) -> None:
    """Lower this process's OS priority by ``nice``; before other threads exist, because they inherit it.

    At 19, and where the system has it, threads run only while nobody else wants their core (``SCHED_IDLE``). Nice
    values alone decide shares, not who waits: since Linux 6.6 a thread that wakes up lets one of nice 19 finish its
    slice of some milliseconds first (``RUN_TO_PARITY`` in kernel/sched/features.h), which is longer than a decode step.
    """
    if os.nice(nice) >= LOWEST and hasattr(os, "SCHED_IDLE"):
        # A sandbox may refuse it; the nice value stands.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
