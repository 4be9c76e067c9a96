"""A hint to the processor that memory is needed soon: where loops hop between blocks, it cannot foresee the next."""

# mypy: disable-error-code="no-untyped-def"
from typing import Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

LINE_BYTES: Final = 64
_FOR_READING, _IN_ALL_CACHES, _DATA = 0, 3, 1  # arguments of llvm.prefetch (llvm.org/docs/LangRef.html)


@intrinsic
def prefetch(_, array, row, column):
    """Bring the cache line of ``array[row, column]`` nearer. Indices must be in range; nothing waits."""

    def codegen(context, builder, signature, args):
        held = make_array(signature.args[0])(context, builder, args[0])
        shape = cgutils.unpack_tuple(builder, held.shape)
        strides = cgutils.unpack_tuple(builder, held.strides)
        place = cgutils.get_item_pointer2(
            context, builder, held.data, shape, strides, signature.args[0].layout, args[1:]
        )
        address, word = builder.bitcast(place, cgutils.voidptr_t), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, word(_FOR_READING), word(_IN_ALL_CACHES), word(_DATA)])
        return context.get_dummy_value()

    return types.void(array, row, column), codegen
