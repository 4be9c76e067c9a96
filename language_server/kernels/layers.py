"""What a decoder layer does around its matrix products, one pass over the rows each."""

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import prange

from common.kernels.compiler import kernel
from common.kernels.numbers import exp, narrow, widen


@kernel
def rms_norm(hidden, weight, eps, out):
    """``out = hidden / rms(hidden) * weight``, rounded once. Both [num_tokens, hidden_size]; arXiv 1910.07467."""
    num_tokens, size = hidden.shape
    for row in prange(num_tokens):
        squares = np.float32(0.0)
        for i in range(size):
            squares += widen(hidden[row, i]) * widen(hidden[row, i])
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[row, i] = narrow(widen(hidden[row, i]) * scale * widen(weight[i]), weight[0])


@kernel
def add_rms_norm(hidden, delta, weight, eps, out):
    """``hidden += delta`` in place, then ``rms_norm(hidden)`` into ``out``. All [num_tokens, hidden_size]."""
    num_tokens, size = hidden.shape
    for row in prange(num_tokens):
        squares = np.float32(0.0)
        for i in range(size):
            total = narrow(widen(hidden[row, i]) + widen(delta[row, i]), weight[0])
            hidden[row, i] = total
            squares += widen(total) * widen(total)
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[row, i] = narrow(widen(hidden[row, i]) * scale * widen(weight[i]), weight[0])


@kernel
def rotate_and_cache(qkv, norms, eps, cos, signed_sin, slots, keys, values):
    """Norm and rotate the query and key heads of ``qkv`` in place; put keys and values into the cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], query, key and value heads.
        norms: [num_heads + num_kv_heads, head_dim], weights of each head's RMS norm; no rows: no norm.
        cos, signed_sin: [num_tokens, head_dim]; the sine of the first half of a head is negated already.
        slots: [num_tokens] int64, place of each token in the cache.
        keys, values: [num_slots, num_kv_heads, head_dim].
    """
    num_tokens = len(qkv)
    num_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    num_rotated = qkv.shape[1] // head_dim - num_kv_heads
    half = head_dim // 2
    for row in prange(num_tokens):
        head_values = np.empty(head_dim, np.float32)
        for head in range(num_rotated):
            # Slices, because indices that begin at 0 make loops that vectorise.
            heads = qkv[row, head * head_dim : (head + 1) * head_dim]
            for d in range(head_dim):
                head_values[d] = widen(heads[d])
            if len(norms):
                squares = np.float32(0.0)
                for d in range(head_dim):
                    squares += head_values[d] * head_values[d]
                scale = np.float32(1.0) / np.sqrt(squares / np.float32(head_dim) + eps)
                for d in range(head_dim):
                    head_values[d] *= scale * widen(norms[head, d])
            first, second = head_values[:half], head_values[half:]
            low, high = heads[:half], heads[half:]
            high_cos, high_sin = cos[row, half:], signed_sin[row, half:]
            for d in range(half):
                low[d] = narrow(first[d] * widen(cos[row, d]) + second[d] * widen(signed_sin[row, d]), qkv[0, 0])
                high[d] = narrow(second[d] * widen(high_cos[d]) + first[d] * widen(high_sin[d]), qkv[0, 0])
        slot = slots[row]
        for head in range(num_kv_heads):
            key = (num_rotated - num_kv_heads + head) * head_dim
            value = (num_rotated + head) * head_dim
            keys[slot, head] = qkv[row, key : key + head_dim]
            values[slot, head] = qkv[row, value : value + head_dim]


@kernel
def silu_and_multiply(gate_up, out):
    """``silu(gate) * up`` of [num_tokens, 2 * size], gates first, into ``out`` [num_tokens, size]."""
    num_tokens, size = out.shape
    for row in prange(num_tokens):
        gates, ups = gate_up[row, :size], gate_up[row, size:]  # indices that begin at 0 make loops that vectorise
        for i in range(size):
            gate, up = widen(gates[i]), widen(ups[i])
            # exp overflows beyond 88: a gate so far below zero is zero either way.
            weight = np.float32(1.0) / (np.float32(1.0) + exp(min(-gate, np.float32(80.0))))
            out[row, i] = narrow(gate * weight * up, gate_up[0, 0])
