"""What programs have in common, seen from outside: one of them in a process of its own."""

import subprocess
import sys

PROGRAM = """
import asyncio, gc, signal, sys
from common.service.program import ServerSettings, run_program, run_worker

class Worker:
    @property
    def ready_line(self):
        signal.raise_signal(signal.SIGTERM)  # once there is something to say
        return "ready"

    def __init__(self):
        self.ended = asyncio.get_running_loop().create_future()

    async def start(self):
        print("starting", gc.get_freeze_count())

    async def load(self, progress):
        self.weights = [[number] for number in range(100_000)]

    async def drain(self): ...
    def abort_load(self): ...

    async def close(self):
        print("closing", gc.get_freeze_count())
        return True

async def run(settings):
    return await run_worker("worker", Worker)

sys.exit(run_program("worker", ServerSettings, [], run))
"""


def test_what_a_start_has_made_is_not_collected_again_and_again():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    counts = dict(line.split() for line in ended.stdout.splitlines())
    assert int(counts["starting"]) > 10_000  # what was imported
    assert int(counts["closing"]) > int(counts["starting"]) + 100_000  # and what was loaded
