"""One thread per process in all tests: they start many processes on few cores, and OpenMP threads that wait spin."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
