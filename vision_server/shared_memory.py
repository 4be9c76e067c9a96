"""Memory that two processes see, passed by descriptor: nothing to name, nothing to clean up after a crash."""

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED: Final = ctypes.c_void_p(-1).value


def room(num_bytes: int) -> int:
    """A new descriptor of so many zero bytes, whose size nobody can change: whoever maps them cannot be made to fault.
    Pages take memory once they are written."""
    descriptor = os.memfd_create("dvd-media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def copy_of(data: bytes) -> int:
    """A new descriptor of the same bytes."""
    descriptor, written = room(len(data)), 0
    try:
        while written < len(data):
            written += os.pwrite(descriptor, memoryview(data)[written:], written)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def view(descriptor: int, num_bytes: int) -> NDArray[np.uint8]:
    """The first bytes behind ``descriptor``, which may be closed. They are given back with the last array that shows
    them. Unlike Python's own maps this one keeps no descriptor open: there may be hundreds of images.

    Raises:
        OSError: no address space.
    """
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory: Any = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, num_bytes).atexit = False
    return np.frombuffer(memory, np.uint8)
