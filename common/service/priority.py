"""How much of the processor a program may take from others on the same machine."""

import contextlib
import os
from typing import Final

LOWEST: Final = 19


def yield_to_others(nice: int) -> None:
    """Lower the calling thread's OS priority by ``nice``, and that of all threads and processes it starts from now on.

    Not for the thread of an event loop: on a busy machine a server would be silent for seconds, and taken for dead.

    At 19, and where the system has it, threads run only while nobody else wants their core (``SCHED_IDLE``). Nice
    values alone decide shares, not who waits: since Linux 6.6 a thread that wakes up lets one of nice 19 finish its
    slice of some milliseconds first (``RUN_TO_PARITY`` in kernel/sched/features.h), which is longer than a decode step.
    """
    if os.nice(nice) >= LOWEST and hasattr(os, "SCHED_IDLE"):
        # A sandbox may refuse it; the nice value stands.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
