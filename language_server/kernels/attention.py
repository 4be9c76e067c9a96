"""Attention of one new token per sequence, read straight from the blocks of the KV cache.

Generating is bound by memory: what counts is that each row of a block is read once, for all its heads, and that the
next block is on its way meanwhile. Four tokens at a time share the loads of the query and of the sums.
"""

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import njit, prange

from common.kernels.compiler import kernel
from common.kernels.numbers import exp, narrow, widen
from common.kernels.prefetch import LINE_BYTES, prefetch


@kernel
def paged_attention(query, keys, values, block_tables, seq_lens, head_dim, num_parts, window, scaling, sinks, out):
    """Softmax over each sequence's keys, in float32.

    Args:
        query: [num_tokens, >= num_heads * head_dim], row ``i`` belongs to sequence ``i``.
        keys, values: [num_blocks, block_size, num_kv_heads * head_dim].
        block_tables: [num_seqs, max_blocks] int64.
        seq_lens: [num_seqs] int64, the new token included.
        num_parts: into which the KV heads of a sequence are divided, for threads to share; divides their number.
        window: how many of the last keys are seen.
        scaling: float32, multiplies the scores.
        sinks: [num_heads] float32, logits of a key without value; empty: none.
        out: [num_tokens, num_heads * head_dim], written for the first num_seqs rows.
    """
    block_size, kv_width = keys.shape[1], keys.shape[2]
    group = out.shape[1] // kv_width
    num_kv_heads = kv_width // head_dim // num_parts  # of one part
    num_heads = num_kv_heads * group
    for task in prange(len(seq_lens) * num_parts):
        row, part = task // num_parts, task % num_parts
        table, end = block_tables[row], seq_lens[row]
        start = max(0, end - window)
        first_block, last_block = start // block_size, (end - 1) // block_size
        skip, num_slots = start - first_block * block_size, end - first_block * block_size
        scores = np.empty((num_heads, num_slots), np.float32)
        rows = np.empty((num_heads, head_dim), np.float32)  # queries, then the mixed values
        columns = slice(part * num_heads * head_dim, (part + 1) * num_heads * head_dim)
        first_column = part * num_kv_heads * head_dim  # of the part's KV heads
        _scale(query[row, columns], scaling, rows.reshape(-1))
        for index in range(first_block, last_block + 1):
            place = (index - first_block) * block_size
            block, ahead = keys[table[index]], keys[table[min(index + 1, last_block)]]
            _score(rows, group, block, ahead, first_column, scores[:, place : place + block_size])
        for head in range(num_heads):
            sink = sinks[part * num_heads + head : part * num_heads + head + 1]
            scores[head, :skip] = np.float32(0.0)
            _softmax(scores[head, skip:], sink)
        rows[:] = np.float32(0.0)
        for index in range(first_block, last_block + 1):
            place = (index - first_block) * block_size
            block, ahead = values[table[index]], values[table[min(index + 1, last_block)]]
            _mix(rows, group, block, ahead, first_column, scores[:, place : place + block_size])
        _write(rows.reshape(-1), out[row, columns])


@njit(inline="always")
def _scale(values, scaling, out):
    for d in range(len(out)):
        out[d] = widen(values[d]) * scaling


@njit(inline="always")
def _write(values, out):
    for d in range(len(out)):
        out[d] = narrow(values[d], out[0])


@njit(inline="always")
def _prefetch_four(ahead, slot, column, end):
    for place in range(column, end, LINE_BYTES // ahead.itemsize):
        prefetch(ahead, slot, place)
        prefetch(ahead, slot + 1, place)
        prefetch(ahead, slot + 2, place)
        prefetch(ahead, slot + 3, place)


@njit(inline="always")
def _score(queries, group, block, ahead, first_column, scores):
    """``scores`` [num_heads, num_slots] of a block's first slots. ``block`` and ``ahead``, the next one,
    [block_size, >= num_kv_heads * head_dim]; the queries' KV heads begin at ``first_column``."""
    head_dim, num_slots = queries.shape[1], scores.shape[1]
    num_fours = num_slots // 4 * 4
    for slot in range(0, num_fours, 4):
        for kv_head in range(len(queries) // group):
            column = first_column + kv_head * head_dim
            end = column + head_dim
            _prefetch_four(ahead, slot, column, end)
            first, second = block[slot, column:end], block[slot + 1, column:end]
            third, fourth = block[slot + 2, column:end], block[slot + 3, column:end]
            for head in range(kv_head * group, kv_head * group + group):
                query = queries[head]
                a = b = c = e = np.float32(0.0)
                for d in range(head_dim):
                    a += query[d] * widen(first[d])
                    b += query[d] * widen(second[d])
                    c += query[d] * widen(third[d])
                    e += query[d] * widen(fourth[d])
                scores[head, slot] = a
                scores[head, slot + 1] = b
                scores[head, slot + 2] = c
                scores[head, slot + 3] = e
    for slot in range(num_fours, num_slots):
        for head in range(len(queries)):
            column = first_column + head // group * head_dim
            key = block[slot, column : column + head_dim]
            score = np.float32(0.0)
            for d in range(head_dim):
                score += queries[head, d] * widen(key[d])
            scores[head, slot] = score


@njit(inline="always")
def _softmax(scores, sink):
    """In place; ``sink`` holds one logit more, or none."""
    highest, total = np.float32(-np.inf), np.float32(0.0)
    for index in range(len(scores)):
        highest = max(highest, scores[index])
    if len(sink):
        highest = max(highest, sink[0])
        total = exp(sink[0] - highest)
    for index in range(len(scores)):
        weight = exp(scores[index] - highest)
        scores[index] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for index in range(len(scores)):
        scores[index] *= inverse


@njit(inline="always")
def _mix(mixed, group, block, ahead, first_column, weights):
    """Adds to ``mixed`` [num_heads, head_dim] a block's first slots, times ``weights`` [num_heads, num_slots]."""
    head_dim, num_slots = mixed.shape[1], weights.shape[1]
    num_fours = num_slots // 4 * 4
    for slot in range(0, num_fours, 4):
        for kv_head in range(len(mixed) // group):
            column = first_column + kv_head * head_dim
            end = column + head_dim
            _prefetch_four(ahead, slot, column, end)
            first, second = block[slot, column:end], block[slot + 1, column:end]
            third, fourth = block[slot + 2, column:end], block[slot + 3, column:end]
            for head in range(kv_head * group, kv_head * group + group):
                one = mixed[head]
                a, b = weights[head, slot], weights[head, slot + 1]
                c, e = weights[head, slot + 2], weights[head, slot + 3]
                for d in range(head_dim):
                    one[d] += a * widen(first[d]) + b * widen(second[d]) + c * widen(third[d]) + e * widen(fourth[d])
    for slot in range(num_fours, num_slots):
        for head in range(len(mixed)):
            column = first_column + head // group * head_dim
            value = block[slot, column : column + head_dim]
            for d in range(head_dim):
                mixed[head, d] += weights[head, slot] * widen(value[d])
