"""Attention of one new token per sequence, read straight from the blocks of the KV cache."""

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import prange

from common.kernels.compiler import kernel
from common.kernels.numbers import exp, narrow, widen


@kernel
def paged_attention(query, keys, values, block_tables, seq_lens, window, scaling, sinks, out):
    """Softmax over each sequence's keys, in float32.

    Args:
        query: [num_tokens, >= num_heads * head_dim], row ``i`` belongs to sequence ``i``.
        keys, values: [num_blocks, block_size, num_kv_heads, head_dim].
        block_tables: [num_seqs, max_blocks] int64.
        seq_lens: [num_seqs] int64, the new token included.
        window: how many of the last keys are seen.
        scaling: float32, multiplies the scores.
        sinks: [num_heads] float32, logits of a key without value; empty: none.
        out: [num_tokens, num_heads * head_dim], written for the first num_seqs rows.
    """
    num_seqs = len(seq_lens)
    block_size, num_kv_heads, head_dim = keys.shape[1], keys.shape[2], keys.shape[3]
    num_heads = out.shape[1] // head_dim
    group = num_heads // num_kv_heads
    for task in prange(num_seqs * num_kv_heads):
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        end = seq_lens[row]
        start = max(0, end - window)
        scores = np.empty((group, end - start), np.float32)
        highest = np.full(group, -np.inf, np.float32)
        scaled = np.empty((group, head_dim), np.float32)
        for head in range(group):
            offset = (kv_head * group + head) * head_dim
            heads = query[row, offset : offset + head_dim]
            for d in range(head_dim):
                scaled[head, d] = widen(heads[d]) * scaling
        for position in range(start, end):
            key = keys[block_tables[row, position // block_size], position % block_size, kv_head]
            for head in range(group):
                score = np.float32(0.0)
                for d in range(head_dim):
                    score += scaled[head, d] * widen(key[d])
                scores[head, position - start] = score
                highest[head] = max(highest[head], score)
        for head in range(group):
            total = np.float32(0.0)
            if len(sinks):
                sink = sinks[kv_head * group + head]
                highest[head] = max(highest[head], sink)
                total = exp(sink - highest[head])
            for index in range(end - start):
                weight = exp(scores[head, index] - highest[head])
                scores[head, index] = weight
                total += weight
            scaled[head, :] = np.float32(0.0)
            highest[head] = np.float32(1.0) / total
        for position in range(start, end):
            value = values[block_tables[row, position // block_size], position % block_size, kv_head]
            for head in range(group):
                weight = scores[head, position - start]
                for d in range(head_dim):
                    scaled[head, d] += weight * widen(value[d])
        for head in range(group):
            offset = (kv_head * group + head) * head_dim
            mixed = out[row, offset : offset + head_dim]
            for d in range(head_dim):
                mixed[d] = narrow(scaled[head, d] * highest[head], query[0, 0])
