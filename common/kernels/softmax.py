"""The softmax between two matrix products: of a prompt's scores, and of a tile's, whose tokens all see each other."""

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import prange

from common.kernels.compiler import kernel
from common.kernels.numbers import LOG2_E, as_ordered, exp, exp2, from_ordered, narrow, widen

NO_WINDOW = 1 << 62
NO_SINKS = np.empty(0, np.float32)


@kernel
def softmax_without_division(scores, scaling, num_queries, offset, window, sinks, inverse_sums):
    """``exp(scaling * score - max)`` of what each query may see, 0 elsewhere, in place; one over the sums beside it.

    Args:
        scores: [num_heads * num_queries, num_keys], the queries of a head behind one another.
        scaling: float32, above 0.
        offset: key at which the first query stands; the next stands at the next, and sees no key behind its own. With
            ``num_keys`` or more every query sees all.
        window: how many keys a query sees, its own included.
        sinks: [num_heads] float32, logits of a key without value; empty: none.
        inverse_sums: [num_heads * num_queries, 1] float32.
    """
    num_rows, num_keys = scores.shape
    for row in prange(num_rows):
        end = min(num_keys, offset + row % num_queries + 1)
        start = max(0, end - window)
        seen = scores[row, start:end]  # indices that begin at 0 make loops that vectorise
        most = as_ordered(seen[0])
        for column in range(len(seen)):
            most = max(most, as_ordered(seen[column]))
        highest = from_ordered(most) * scaling
        total = np.float32(0.0)
        if len(sinks):
            sink = sinks[row // num_queries]
            highest = max(highest, sink)
            total = exp(sink - highest)
        factor, most_power = scaling * LOG2_E, highest * LOG2_E
        for column in range(len(seen)):
            weight = exp2(widen(seen[column]) * factor - most_power, scores[0, 0])
            total += weight
            seen[column] = narrow(weight, scores[0, 0])
        scores[row, :start] = narrow(np.float32(0.0), scores[0, 0])
        scores[row, end:] = narrow(np.float32(0.0), scores[0, 0])
        inverse_sums[row, 0] = np.float32(1.0) / total
