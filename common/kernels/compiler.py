"""How kernels are compiled, how many threads they take, and how tensors reach them."""

import functools
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import torch

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
    # What is kept is taken for fresh while the function's own file is the same: also what it is made of must be.
    index = kept._cache._cache_file
    index._source_stamp = (index._source_stamp, _stamp_of_helpers())
    return kept  # type: ignore[no-any-return]


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
