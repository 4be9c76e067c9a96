"""Arithmetic that Numba lacks: bfloat16, kept as its bits in uint16, and an exponential that vectorises.

Kernels read with ``widen``, compute in float32, and write with ``narrow``; both do nothing to float32.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_LOG2_E: Final = np.float32(1.4426950408889634)
_MIN_EXPONENT: Final = np.float32(-126.0)


def _is_bfloat16(kind: Any) -> bool:
    return bool(kind == types.uint16)


@intrinsic
def widen(_, value):
    """A number of the model's type as float32."""
    if not _is_bfloat16(value):
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), codegen


@intrinsic
def narrow(_, value, like):
    """float32 ``value`` as the type of ``like``, to the nearest, ties to even. Keeps infinities, and the NaN that
    processors make."""
    if not _is_bfloat16(like):
        return types.float32(value, like), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(is_odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return types.uint16(value, like), codegen


@intrinsic
def _as_float(_, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always")
def exp(x):
    """e ** x for float32 ``x`` <= 88; the relative error is below 3e-7 around 0 and 1e-5 at the ends. What would be
    below the smallest normal number is that number. NaN gives some number: the residual stream carries it to the
    logits, where it is seen.

    2 ** n times a polynomial in the rest, the Taylor series of 2 ** f around 0 for abs(f) <= 0.5.
    """
    power = max(x * _LOG2_E, _MIN_EXPONENT)
    whole = np.floor(power + np.float32(0.5))
    f = power - whole
    series = np.float32(1.5403530e-4)
    series = series * f + np.float32(1.3333558e-3)
    series = series * f + np.float32(9.6181291e-3)
    series = series * f + np.float32(5.5504109e-2)
    series = series * f + np.float32(2.4022651e-1)
    series = series * f + np.float32(6.9314718e-1)
    series = series * f + np.float32(1.0)
    return series * _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))
