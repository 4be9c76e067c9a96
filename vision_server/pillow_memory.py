"""The pixels of a Pillow image without a copy, through the Arrow C data interface.

A copy of a 12-megapixel image takes as long as cutting it into tiles does. Layout of the struct: the Arrow project's
"C data interface", which is frozen.
"""

import ctypes
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class _ArrowArray(ctypes.Structure):
    """``children`` of an RGB image has one entry, and that two buffers: which pixels exist (all), and their bytes."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_pointer_in: Final = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype = ctypes.c_void_p
_pointer_in.argtypes = [ctypes.py_object, ctypes.c_char_p]


def rgbx(image: Image.Image) -> NDArray[np.uint8]:
    """``[H, W, 4]`` of an image of mode RGB; the fourth byte means nothing. Not to be written to.

    A view where Pillow holds the image in one piece (``PILLOW_BLOCK_SIZE`` sets how large a piece may be), else a copy.
    """
    assert image.mode == "RGB"
    width, height = image.size
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # several pieces
        return np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.uint8).reshape(height, width, 4)
    array = _ArrowArray.from_address(_pointer_in(capsule, b"arrow_array")).children[0].contents
    num_bytes = 4 * width * height
    assert array.n_buffers == 2 and array.length == num_bytes and array.offset == 0
    memory: Any = (ctypes.c_uint8 * num_bytes).from_address(array.buffers[1])
    memory.owner = capsule  # lives as long as a view of the memory
    return np.frombuffer(memory, np.uint8).reshape(height, width, 4)
