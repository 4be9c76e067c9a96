"""Every attention backend that a CPU can run. GPU kernels run in Triton's interpreter: ``tests/conftest.py`` asks for
it before Triton is imported."""

import importlib
from collections.abc import Callable
from typing import Any

from language_server.attention import triton_paged
from language_server.attention.base import AttentionBackend
from language_server.attention.cpu import CpuBackend
from language_server.attention.sdpa import SdpaBackend
from language_server.attention.triton_paged import TritonBackend

BACKENDS: dict[str, Callable[[], AttentionBackend]] = {"sdpa": SdpaBackend, "cpu": CpuBackend}
if triton_paged.is_available():
    BACKENDS["triton"] = lambda: TritonBackend(num_processors=8)


def _mend_products(tl: Any, interpreter: Any) -> None:
    """Let ``tl.dot`` multiply bfloat16 numbers. Of itself the interpreter multiplies their bits, as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot_of_numbers(self, a, b, d, *options):
        return create_dot(self, widened(a), widened(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_numbers


if "triton" in BACKENDS:
    _mend_products(importlib.import_module("triton.language"), importlib.import_module("triton.runtime.interpreter"))
