"""Attention over the blocks of the KV cache, for GPUs: one token per sequence, and prompts.

Softmax runs in float32 and in powers of two, so ``scaling`` and sinks come multiplied by log2(e). Slots beyond a
sequence's last token are never read. Head dimensions and groups of heads are padded to what the matrix units take.
Source of the split over keys: Flash-Decoding (Dao et al. 2023); of the tiles: FlashAttention-2 (arXiv 2307.08691).
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def _slots(table, positions, is_valid, BLOCK_SIZE: tl.constexpr):
    """Where in the cache the tokens at ``positions`` of a sequence lie."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_valid, other=0).to(tl.int64)
    return blocks * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit(
    do_not_specialize=["window", "table_stride"], do_not_specialize_on_alignment=["block_tables", "seq_lens", "tiles"]
)
def decode_splits(
    query, keys, values, block_tables, seq_lens, partials, partial_logs,
    scaling, window, query_stride, head_stride, table_stride, slot_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One sequence, one KV head, one of ``NUM_SPLITS`` pieces of its keys: grid [num_seqs, num_kv_heads, NUM_SPLITS].

    Args:
        query: [num_seqs, num_heads, HEAD_DIM] with strides.
        keys, values: [num_slots, num_kv_heads, HEAD_DIM], contiguous.
        block_tables: [num_seqs, max_blocks], rows ``table_stride`` apart.
        seq_lens: [num_seqs] int32, the new token included.
        partials: [num_seqs, num_heads, NUM_SPLITS, HEAD_DIM] float32, what each piece gives by itself.
        partial_logs: [num_seqs, num_heads, NUM_SPLITS] float32, log2 of its softmax sum; -inf: it has no key.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    end = tl.load(seq_lens + row)
    first = tl.maximum(end - window, 0)
    length = tl.cdiv(end - first, NUM_SPLITS * TILE) * TILE
    start = first + split * length
    stop = tl.minimum(start + length, end)

    heads, dims = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD)
    is_head, is_dim = heads < GROUP, dims < HEAD_DIM
    is_query = is_head[:, None] & is_dim[None, :]
    query_heads = kv_head * GROUP + heads
    offsets = row.to(tl.int64) * query_stride + query_heads[:, None] * head_stride + dims[None, :]
    q = tl.load(query + offsets, mask=is_query, other=0.0)

    highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    mixed = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for tile in range(start, stop, TILE):
        positions = tile + tl.arange(0, TILE)
        is_key = positions < stop
        slots = _slots(block_tables + row.to(tl.int64) * table_stride, positions, is_key, BLOCK_SIZE)
        places = slots * slot_stride + kv_head * HEAD_DIM
        k = tl.load(keys + places[None, :] + dims[:, None], mask=is_dim[:, None] & is_key[None, :], other=0.0)
        v = tl.load(values + places[:, None] + dims[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)
        scores = tl.where(is_key[None, :], tl.dot(q, k, input_precision="ieee") * scaling, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher

    places = (row.to(tl.int64) * num_kv_heads * GROUP + query_heads) * NUM_SPLITS + split
    has_keys = start < stop
    safe_total = tl.where(has_keys, total, 1.0)
    tl.store(partial_logs + places, tl.where(has_keys, highest + tl.log2(safe_total), float("-inf")), mask=is_head)
    where = places[:, None] * HEAD_DIM + dims[None, :]
    tl.store(partials + where, mixed / safe_total[:, None], mask=is_query & has_keys)


@triton.jit
def join_splits(
    partials, partial_logs, sinks, out,
    HAS_SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """The pieces of ``decode_splits`` as one softmax: grid [num_seqs, num_heads].

    Args:
        sinks: [num_heads], logits of a key without value, not multiplied; read only where ``HAS_SINKS``.
        out: [num_seqs, num_heads, HEAD_DIM], contiguous.
    """
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    place = tl.program_id(0).to(tl.int64) * num_heads + head
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, DIM_PAD)
    logs = tl.load(partial_logs + place * NUM_SPLITS + splits)
    highest = tl.max(logs, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    weights = tl.exp2(logs - highest)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - highest)
    offsets = (place * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :]
    is_written = (logs > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    pieces = tl.load(partials + offsets, mask=is_written, other=0.0)
    mixed = tl.sum(weights[:, None] * pieces, 0) / total
    tl.store(out + place * HEAD_DIM + dims, mixed.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def _attend_tile(
    q, highest, total, mixed, keys, values, table, positions, query_positions, kv_head, dims,
    end, scaling, window, slot_stride,
    IS_EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One more tile of keys. ``IS_EDGE``: some query must not see some of them."""
    is_key, is_dim = positions < end, dims < HEAD_DIM
    places = _slots(table, positions, is_key, BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
    k = tl.load(keys + places[None, :] + dims[:, None], mask=is_dim[:, None] & is_key[None, :], other=0.0)
    v = tl.load(values + places[:, None] + dims[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scaling
    if IS_EDGE:
        ahead = query_positions[:, None] - positions[None, :]
        scores = tl.where((ahead >= 0) & (ahead < window), scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    # A query that has seen no key yet has no highest score.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total, mixed


@triton.jit(
    do_not_specialize=["window", "table_stride"], do_not_specialize_on_alignment=["block_tables", "seq_lens", "tiles"]
)
def prefill_tiles(
    query, keys, values, block_tables, tiles, sinks, out,
    scaling, window, query_stride, head_stride, table_stride, slot_stride,
    HAS_SINKS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, QUERY_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Up to ``QUERY_TILE`` queries of one sequence and one head: grid [num_heads, num_tiles].

    Args:
        query: [num_tokens, num_heads, HEAD_DIM] with strides.
        keys, values, block_tables: as in ``decode_splits``.
        tiles: [num_tiles, 4] int32: row of the sequence, first token in ``query``, its position in the sequence, and
            how many queries.
        sinks: as in ``join_splits``.
        out: [num_tokens, num_heads, HEAD_DIM], contiguous.
    """
    head, tile = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(0)
    row, first_token = tl.load(tiles + tile * 4).to(tl.int64), tl.load(tiles + tile * 4 + 1)
    first_position, num_queries = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    rows, dims = tl.arange(0, QUERY_TILE), tl.arange(0, DIM_PAD)
    is_query = (rows < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (first_token + rows).to(tl.int64)
    q = tl.load(query + tokens[:, None] * query_stride + head * head_stride + dims[None, :], mask=is_query, other=0.0)

    if HAS_SINKS:  # a key without value, which every query has seen
        highest = tl.zeros([QUERY_TILE], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([QUERY_TILE], 1.0, tl.float32)
    else:
        highest = tl.full([QUERY_TILE], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_TILE], tl.float32)
    mixed = tl.zeros([QUERY_TILE, DIM_PAD], tl.float32)

    table, kv_head = block_tables + row * table_stride, head // GROUP
    query_positions, steps = first_position + rows, tl.arange(0, TILE)
    end = first_position + num_queries
    first = tl.maximum(first_position - window + 1, 0) // TILE * TILE
    # Below ``whole`` every query sees every key.
    whole = tl.where(window >= end, (first_position + 1) // TILE * TILE, first)
    for start in range(first, whole, TILE):
        highest, total, mixed = _attend_tile(
            q, highest, total, mixed, keys, values, table, start + steps, query_positions, kv_head, dims,
            end, scaling, window, slot_stride, False, HEAD_DIM, BLOCK_SIZE,
        )  # fmt: skip
    for start in range(whole, end, TILE):
        highest, total, mixed = _attend_tile(
            q, highest, total, mixed, keys, values, table, start + steps, query_positions, kv_head, dims,
            end, scaling, window, slot_stride, True, HEAD_DIM, BLOCK_SIZE,
        )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    offsets = (tokens[:, None] * num_heads + head) * HEAD_DIM + dims[None, :]
    tl.store(out + offsets, mixed.to(out.dtype.element_ty), mask=is_query)
