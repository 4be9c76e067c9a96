"""Paged attention equals attention: against the formula, and through whole models against transformers."""

import math

import pytest
import torch

from language_server.attention import choose_backend, cpu, paged, sdpa
from language_server.attention.base import BatchLayout, KVCache, KVShape, LayerCall
from language_server.attention.cpu import CpuBackend
from language_server.attention.paged import ForwardContext
from tests.language_server.backends import BACKENDS
from tests.language_server.models import FAMILIES, reference_logits, tiny_model

BLOCK = 4


class Batch:
    """Random sequences in shuffled blocks; every slot that belongs to no token holds NaN."""

    def __init__(
        self,
        query_lens,
        seq_lens,
        *,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        block_size=BLOCK,
        seed=0,
    ):
        self.block_size = block_size
        generator = torch.Generator().manual_seed(seed)
        tables = self._tables(seq_lens, generator)
        num_blocks = sum(map(len, tables)) + 3
        self.cache = KVCache(KVShape(1, num_kv_heads, head_dim, dtype), num_blocks, block_size, torch.device("cpu"))
        self.cache.keys[0].fill_(math.nan)
        self.cache.values[0].fill_(math.nan)
        self.keys = [torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype) for length in seq_lens]
        self.values = [
            torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype) for length in seq_lens
        ]
        self.query = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator).to(dtype)
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.layout = self._layout(query_lens, seq_lens, tables)
        everything = self._layout(seq_lens, seq_lens, tables)
        self.cache.write(0, torch.cat(self.keys), torch.cat(self.values), everything.slot_mapping)

    def _tables(self, seq_lens, generator):
        counts = [-(-length // self.block_size) for length in seq_lens]
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        return [[order.pop() for _ in range(count)] for count in counts]

    def _layout(self, query_lens, seq_lens, tables):
        positions = [
            p for query, length in zip(query_lens, seq_lens, strict=True) for p in range(length - query, length)
        ]
        width = max(map(len, tables))
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables])
        return BatchLayout(query_lens, seq_lens, torch.tensor(positions), padded, self.block_size)

    def attend(self, call, backend=None):
        backend = backend or sdpa.SdpaBackend()
        return backend.attend(self.query, self.cache.keys[0], self.cache.values[0], backend.plan(self.layout), call)

    def expected(self, call):
        """Token by token, from the definition."""
        rows, position = [], 0
        for index, (num_queries, length) in enumerate(zip(self.query_lens, self.seq_lens, strict=True)):
            for offset in range(num_queries):
                last = length - num_queries + offset
                first = 0 if call.sliding_window is None else max(0, last + 1 - call.sliding_window)
                keys, values = (x[index][first : last + 1].double() for x in (self.keys, self.values))
                rows.append(_attend_one(self.query[position].double(), keys, values, call))
                position += 1
        return torch.stack(rows)


def _attend_one(query, keys, values, call):
    group = query.shape[0] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,khd->hk", query, keys) * call.scaling
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.double().unsqueeze(1)], dim=1)
    weights = scores.softmax(dim=-1)[:, : len(keys)]
    return torch.einsum("hk,khd->hd", weights, values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        ([1], [1]),
        ([1, 1, 1], [9, 9, 9]),
        ([1, 1, 1, 1], [3, 40, 1, 17]),
        ([12], [12]),
        ([5], [30]),
        ([1, 1, 7, 20], [8, 21, 31, 20]),
    ],
    ids=["first-token", "even", "uneven", "prompt", "chunk", "mixed"],
)
def test_backends_equal_the_definition(query_lens, seq_lens, window, has_sinks, backend):
    batch = Batch(query_lens, seq_lens)
    call = LayerCall(0.3, window, torch.linspace(-1, 2, 6) if has_sinks else None)
    actual = batch.attend(call, BACKENDS[backend]())
    torch.testing.assert_close(actual.double(), batch.expected(call), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("offset", [0, 3])
def test_query_heads_may_lie_among_others(offset):
    """As they do in a product that gave query, key and value heads at once."""
    batch = Batch([1, 1, 6], [9, 30, 11])
    heads = torch.full((8, 6 + 5, 8), math.nan)
    heads[:, offset : offset + 6] = batch.query
    batch.query = heads[:, offset : offset + 6]
    call = LayerCall(0.3, None, None)
    torch.testing.assert_close(batch.attend(call, CpuBackend()).double(), batch.expected(call), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block_size", [1, 3, 6, 16])
@pytest.mark.parametrize("window", [None, 7])
def test_blocks_of_any_size(block_size, window):
    batch = Batch([1, 1, 1], [3, 33, 16], block_size=block_size)
    call = LayerCall(0.3, window, torch.linspace(-1, 2, 6))
    torch.testing.assert_close(batch.attend(call, CpuBackend()).double(), batch.expected(call), atol=2e-6, rtol=1e-5)


def test_a_long_history_is_shared_among_threads():
    batch = Batch([1] * 3, [4000, 7, 2500], head_dim=16)
    call = LayerCall(0.3, None, None)
    torch.testing.assert_close(batch.attend(call, CpuBackend()).double(), batch.expected(call), atol=2e-6, rtol=1e-5)


def test_sequences_are_grouped_by_length_and_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(sdpa, "_CPU_GROUP_TOKENS", 40)
    batch = Batch([1] * 7, [3, 40, 4, 17, 5, 39, 20])
    groups = batch_groups(batch)
    assert groups == [[0, 2, 4], [3, 6], [5], [1]]
    call = LayerCall(0.3, None, None)
    torch.testing.assert_close(batch.attend(call).double(), batch.expected(call), atol=2e-6, rtol=1e-5)


def batch_groups(batch):
    return [group.rows.tolist() for group in sdpa._decode_groups(batch.layout, None, torch.float32)]


def test_score_matrices_with_sinks_are_built_in_slices(monkeypatch):
    monkeypatch.setattr(sdpa, "_MAX_SCORES", 200)
    batch = Batch([1, 20], [9, 33])
    call = LayerCall(0.3, 7, torch.linspace(-1, 2, 6))
    torch.testing.assert_close(batch.attend(call).double(), batch.expected(call), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("is_long", [False, True])
def test_bfloat16(is_long, window, has_sinks, backend, monkeypatch):
    if is_long:
        monkeypatch.setattr(cpu, "_MIN_SCORES", 1)
        monkeypatch.setattr(cpu, "_QUERIES_AT_ONCE", 8)
    batch = Batch([1, 1, 9, 30], [7, 30, 25, 30], dtype=torch.bfloat16)
    call = LayerCall(0.3, window, torch.linspace(-1, 2, 6).bfloat16() if has_sinks else None)
    out = batch.attend(call, BACKENDS[backend]())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), batch.expected(call), atol=2e-2, rtol=2e-2)


def test_a_cpu_reads_the_history_in_place():
    assert isinstance(choose_backend(torch.device("cpu")), CpuBackend)


class Prompts:
    """Several prompts run through a model's paged cache, in whatever chunks."""

    def __init__(self, backbone, prompts):
        self.backbone, self.prompts = backbone, prompts
        self.backend = choose_backend(backbone.device)
        self.cache = KVCache(backbone.kv_shape, 64, BLOCK, backbone.device)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.fill_(math.nan)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
        self.tables = [[order.pop() for _ in range(12)] for _ in prompts]

    @torch.inference_mode()
    def run(self, chunks):
        """``chunks``: (prompt, start, end), single tokens first. Returns logits of each chunk."""
        tokens = torch.cat([self.prompts[index][start:end] for index, start, end in chunks])
        layout = BatchLayout(
            [end - start for _, start, end in chunks],
            [end for _, _, end in chunks],
            torch.cat([torch.arange(start, end) for _, start, end in chunks]),
            torch.tensor([self.tables[index] for index, _, _ in chunks]),
            BLOCK,
        )
        context = ForwardContext.of(layout, self.cache, self.backend)
        logits = self.backbone.logits(self.backbone.forward(self.backbone.embed(tokens), context))
        return logits.split(layout.query_lens)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_eager(family):
    """Alone and whole, alone in chunks, and both prompts batched with one in decode while the other is prefilled."""
    model, backbone = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 400, (length,), generator=generator) for length in (45, 30)]
    expected = [reference_logits(model, prompt) for prompt in prompts]

    whole = Prompts(backbone, prompts).run([(0, 0, 45)])[0]
    assert_same_logits(whole, expected[0])

    alone = Prompts(backbone, prompts)
    parts = [alone.run([(0, start, end)])[0] for start, end in ((0, 1), (1, 33), (33, 44), (44, 45))]
    assert_same_logits(torch.cat(parts), expected[0])

    batched = Prompts(backbone, prompts)
    first = batched.run([(0, 0, 40), (1, 0, 9)])
    rest = [batched.run([(0, 40 + i, 41 + i), (1, 9 + 4 * i, 13 + 4 * i)]) for i in range(5)]
    assert_same_logits(torch.cat([first[0], *(step[0] for step in rest)]), expected[0])
    assert_same_logits(torch.cat([first[1], *(step[1] for step in rest)]), expected[1][:29])


def assert_same_logits(actual, expected):
    """To 1e-5 of the largest logit: the test models have logits around 7."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_registration_is_repeatable():
    paged.register()
    paged.register()
