"""The last step before a server program: tie it to its parent, pin it to its cores, become it.

``python -m deploy.launch PARENT CORES MODULE ARGS...``, started by ``deploy.process``. A program of its own because
Python code between fork and exec (``preexec_fn``) can deadlock in a parent that has threads. Imports next to nothing.
"""

import os
import sys

from common.service.parent import die_with


def main(argv: list[str]) -> None:
    parent, cores, module, *args = argv
    die_with(int(parent))
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execv(sys.executable, [sys.executable, "-m", module, *args])


if __name__ == "__main__":
    main(sys.argv[1:])
