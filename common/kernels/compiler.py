"""How kernels are compiled, how many threads they take, and how tensors reach them."""

import contextlib
import fcntl
import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import torch
from numba.core.caching import IndexDataCacheFile

_MIN_PARALLEL_WORK: Final = 1 << 16
"""Elements from which sharing a loop pays for waking another thread."""


def _has_openmp() -> bool:
    """Numba's other pools end the process when two threads use them at once."""
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


_IS_PARALLEL: Final = _has_openmp()
if _IS_PARALLEL:
    numba.config.THREADING_LAYER = "omp"


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile ``function`` for the types it is called with. Its ``numba.prange`` loops run in parallel where they can;
    the interpreter's lock is free meanwhile."""
    options = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "nogil": True, "parallel": _IS_PARALLEL}
    try:
        kept: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no directory to keep it in
        compiled: Callable[..., None] = numba.njit(**options)(function)
        return compiled
    cache = kept._cache
    # What is kept is taken for fresh while the function's own file is the same: also what it is made of must be.
    stamp = (cache._cache_file._source_stamp, _stamp_of_helpers())
    cache._cache_file = KeptCode(cache.cache_path, cache._impl.filename_base, stamp)
    return kept  # type: ignore[no-any-return]


class KeptCode(IndexDataCacheFile):  # type: ignore[misc]  # Numba has no types
    """What was compiled of one function, on disk, for all processes of this machine.

    Numba numbers the code of each signature by an index that it reads, changes and writes back. Two processes that do
    so at once give two signatures one number, and the next to load the one runs the code of the other on its arrays.
    Here nobody reads or writes while another process writes.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep ``data`` under ``key``, for everybody."""
        with self._locked(fcntl.LOCK_EX):
            super().save(key, data)

    def load(self, key: Any) -> Any:
        """What was kept under ``key``, or None."""
        with self._locked(fcntl.LOCK_SH):
            return super().load(key)

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        try:
            lock = os.open(f"{self._index_path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:  # nothing is kept there yet, or nobody may write: then nobody does
            yield
            return
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile
            os.close(lock)


@functools.cache
def _stamp_of_helpers() -> str:
    """Of the sources in this folder."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()


@functools.cache
def _start_threads() -> None:
    """Numba starts its threads at the first use, and gives the thread that does it all cores in OpenMP: also torch."""
    num_threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(num_threads)


def share_threads(num_elements: int) -> int:
    """Give the kernels that this thread calls next as many threads as torch has, or one where there is little to do.
    Returns how many."""
    if not _IS_PARALLEL:
        return 1
    _start_threads()
    is_worth_it = num_elements >= _MIN_PARALLEL_WORK
    num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if is_worth_it else 1
    numba.set_num_threads(num_threads)
    return num_threads


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory. NumPy has no bfloat16: kernels take its bits as uint16. ``tensor`` must be contiguous."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()  # type: ignore[no-any-return]
