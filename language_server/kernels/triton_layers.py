"""What lies between the matrix products of a decoder layer, for GPUs. Arithmetic is float32, rounded at the end."""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def rms_norm(hidden, weight, out, eps, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """One row of ``hidden`` [num_rows, WIDTH], contiguous as ``out``: grid [num_rows]."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, WIDTH_PAD)
    is_column = columns < WIDTH
    row = tl.load(hidden + start + columns, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    weights = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (row * scale * weights).to(out.dtype.element_ty), mask=is_column)


@triton.jit
def rotate_and_cache(
    qkv, head_norms, cos, sin, slots, keys, values, eps,
    HAS_NORMS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):  # fmt: skip
    """One head of one token: grid [num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS].

    Query heads are normed and rotated where they lie; key heads go to the cache, too, and value heads as they are.

    Args:
        qkv: [num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, 2 * HALF], contiguous.
        head_norms: [2, 2 * HALF], weights of query and key heads; read only where ``HAS_NORMS``.
        cos, sin: [num_tokens, 2 * HALF].
        slots: [num_tokens] int64.
        keys, values: [num_slots, NUM_KV_HEADS, 2 * HALF].
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    steps = tl.arange(0, HALF_PAD)
    is_step = steps < HALF
    place = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * (2 * HALF) + steps
    a = tl.load(place, mask=is_step, other=0.0).to(tl.float32)
    b = tl.load(place + HALF, mask=is_step, other=0.0).to(tl.float32)
    if head < NUM_HEADS + NUM_KV_HEADS:
        if HAS_NORMS:
            scale = tl.rsqrt(tl.sum(a * a + b * b, 0) / (2 * HALF) + eps)
            weights = head_norms + (head >= NUM_HEADS).to(tl.int32) * (2 * HALF) + steps
            a *= scale * tl.load(weights, mask=is_step, other=0.0).to(tl.float32)
            b *= scale * tl.load(weights + HALF, mask=is_step, other=0.0).to(tl.float32)
        angles = token * (2 * HALF) + steps
        cos_a = tl.load(cos + angles, mask=is_step, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + angles, mask=is_step, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + angles + HALF, mask=is_step, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + angles + HALF, mask=is_step, other=0.0).to(tl.float32)
        rotated = a * cos_a - b * sin_a
        b = b * cos_b + a * sin_b
        a = rotated
    first, second = a.to(qkv.dtype.element_ty), b.to(qkv.dtype.element_ty)
    slot = tl.load(slots + token)
    if head < NUM_HEADS:
        tl.store(place, first, mask=is_step)
        tl.store(place + HALF, second, mask=is_step)
    elif head < NUM_HEADS + NUM_KV_HEADS:
        target = keys + (slot * NUM_KV_HEADS + head - NUM_HEADS) * (2 * HALF) + steps
        tl.store(target, first, mask=is_step)
        tl.store(target + HALF, second, mask=is_step)
    else:
        target = values + (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * (2 * HALF) + steps
        tl.store(target, first, mask=is_step)
        tl.store(target + HALF, second, mask=is_step)


@triton.jit
def silu_and_multiply(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """``gate_up`` [num_rows, 2 * WIDTH] -> ``out`` [num_rows, WIDTH], contiguous: grid [num_rows, WIDTH / TILE]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = columns < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + columns, mask=is_column, other=0.0).to(tl.float32)
    mixed = gate * tl.sigmoid(gate) * up
    tl.store(out + row * WIDTH + columns, mixed.to(out.dtype.element_ty), mask=is_column)
