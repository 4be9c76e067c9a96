"""A process that yields to others: its nice value, and at the lowest the system's idle class."""

import subprocess
import sys

import pytest

SHOW = """
import os, sys
from common.service.priority import yield_to_others
before = os.nice(0)
yield_to_others(int(sys.argv[1]))
print(os.nice(0) - before, os.nice(0), os.sched_getscheduler(0) == os.SCHED_IDLE)
"""


def priority(nice: int) -> tuple[int, int, bool]:
    """What a new process finds: by how much its nice value rose, the value, and whether it runs on idle cores only."""
    shown = subprocess.run([sys.executable, "-c", SHOW, str(nice)], capture_output=True, text=True, check=True)
    difference, value, is_idle = shown.stdout.split()
    return int(difference), int(value), is_idle == "True"


@pytest.mark.parametrize("nice", [0, 3])
def test_a_nice_process_shares_its_cores(nice):
    difference, value, is_idle = priority(nice)
    assert (difference, is_idle) == (min(nice, 19 - (value - difference)), value == 19)


def test_the_nicest_takes_only_what_nobody_wants():
    _, value, is_idle = priority(19)
    assert (value, is_idle) == (19, True)
