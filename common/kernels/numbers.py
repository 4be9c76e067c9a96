"""Arithmetic that Numba lacks: bfloat16, kept as its bits in uint16, and an exponential that vectorises.

Kernels read with ``widen``, compute in float32, and write with ``narrow``; both do nothing to float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LOG2_E: Final = np.float32(1.4426950408889634)
_MIN_EXPONENT: Final = np.float32(-126.0)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's name for bfloat16, which llvmlite lacks. Only processors that have the instruction may meet it: for others
    LLVM calls a function that nobody links."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __new__(cls):
        return object.__new__(cls)

    def __str__(self):
        return "bfloat"


_BFLOAT: Final = _BFloat()


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
    processors make. What is below the smallest normal number may become 0."""
    if not _is_bfloat16(like):
        return types.float32(value, like), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        if "+avx512bf16" in context.codegen().magic_tuple()[-1]:  # one instruction instead of six
            return builder.bitcast(builder.fptrunc(args[0], _BFLOAT), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(is_odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return types.uint16(value, like), codegen


@intrinsic
def as_ordered(_, value):
    """A number of the model's type as an integer that is smaller or larger than others where the number is.

    The largest of many integers is found many at a time; of numbers it is not, because one may be NaN. A NaN comes
    before or behind all other numbers, depending on its sign.
    """
    is_bfloat16 = _is_bfloat16(value)

    def codegen(context, builder, signature, args):
        kind = ir.IntType(16 if is_bfloat16 else 32)
        return _turn_negatives(builder, builder.bitcast(args[0], kind))

    return (types.int16 if is_bfloat16 else types.int32)(value), codegen


@intrinsic
def from_ordered(_, value):
    """The number behind ``as_ordered``, as float32."""
    is_bfloat16 = value == types.int16

    def codegen(context, builder, signature, args):
        word, bits = ir.IntType(32), _turn_negatives(builder, args[0])
        if is_bfloat16:
            bits = builder.shl(builder.zext(bits, word), ir.Constant(word, 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), codegen


def _turn_negatives(builder, bits):
    """The bits of a number below zero but for the sign, which order it the wrong way round: its own inverse."""
    kind = bits.type
    is_negative = builder.ashr(bits, ir.Constant(kind, kind.width - 1))
    return builder.xor(bits, builder.and_(is_negative, ir.Constant(kind, (1 << (kind.width - 1)) - 1)))


@intrinsic
def _as_float(_, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _has_few_bits(_, like):
    """Known to the compiler, which drops the other branch."""
    has_few = _is_bfloat16(like)
    return types.boolean(like), lambda context, builder, signature, args: ir.Constant(ir.IntType(1), has_few)


@njit(inline="always")
def exp2(power, like):
    """2 ** power for float32 ``power`` < 127.5, and a result that is going to be of the type of ``like``.

    The relative error is 3e-7 at most for float32, and 6e-5 for bfloat16, a thirtieth of what rounding adds. What would
    be below the smallest normal number is that number. NaN gives some number: the residual stream carries it to the
    logits, where it is seen.

    2 ** n times a polynomial in the rest, the Taylor series of 2 ** f around 0 for abs(f) <= 0.5.
    """
    power = max(power, _MIN_EXPONENT)
    whole = np.floor(power + np.float32(0.5))
    f = power - whole
    series = np.float32(9.6181291e-3)
    if not _has_few_bits(like):
        series += (np.float32(1.5403530e-4) * f + np.float32(1.3333558e-3)) * f
    series = series * f + np.float32(5.5504109e-2)
    series = series * f + np.float32(2.4022651e-1)
    series = series * f + np.float32(6.9314718e-1)
    series = series * f + np.float32(1.0)
    return series * _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(inline="always")
def exp(x):
    """e ** x for float32 ``x`` <= 88; the relative error is below 3e-7 around 0 and 1e-5 at the ends. The rest as
    ``exp2``."""
    return exp2(x * LOG2_E, x)
