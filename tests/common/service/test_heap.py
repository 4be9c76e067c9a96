"""What the C library does with freed memory, looked at in a process of its own."""

import subprocess
import sys

PROGRAM = """
import ctypes, mmap, re, sys
from pathlib import Path
from common.service.heap import keep_freed_memory

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

def freed_bytes_that_stay():
    before = resident_bytes()
    memory = ctypes.create_string_buffer(b"x", 34 * 2**20)  # less than the largest frame
    ctypes.memset(memory, 1, len(memory))
    del memory
    return resident_bytes() - before

print(freed_bytes_that_stay())
keep_freed_memory()
print(freed_bytes_that_stay())
"""


def test_memory_of_the_size_of_a_frame_stays_for_the_next():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    by_itself, told = map(int, ended.stdout.split())
    assert by_itself < 8 * 2**20
    assert told > 26 * 2**20
