"""How kernels are compiled, how many threads they take, and how tensors reach them."""

import importlib
from collections.abc import Callable
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
        compiled: Callable[..., None] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no directory to keep it in
        compiled = numba.njit(**options)(function)
    return compiled


def share_threads(num_elements: int) -> int:
    """Give the kernels that this thread calls next as many threads as torch has, or one where there is little to do.
    Returns how many."""
    if not _IS_PARALLEL:
        return 1
    is_worth_it = num_elements >= _MIN_PARALLEL_WORK
    num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if is_worth_it else 1
    numba.set_num_threads(num_threads)
    return num_threads


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory. NumPy has no bfloat16: kernels take its bits as uint16. ``tensor`` must be contiguous."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()  # type: ignore[no-any-return]
