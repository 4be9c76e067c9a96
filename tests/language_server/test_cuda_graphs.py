"""Decode in a fixed number of padded rows equals decode as it comes. Without a GPU a graph computes once more."""

from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common.model.graphs import Repeat
from language_server.attention.base import DecodeLayout, KVCache
from language_server.attention.cpu import CpuBackend
from language_server.attention.paged import ForwardContext
from language_server.attention.triton_paged import TritonBackend
from language_server.backbone import LanguageBackbone, build_model
from language_server.cuda_graphs import batch_sizes, is_decode_only
from language_server.engine import EngineConfig, LanguageEngine
from language_server.model_runner import ModelRunner
from language_server.scheduler import ScheduledChunk
from language_server.sequence import SamplingParams, Sequence
from tests.language_server.backends import BACKENDS
from tests.language_server.models import FAMILIES, tiny_model

BLOCK, MAX_SEQS, MAX_LEN = 4, 10, 40
SAMPLING = SamplingParams(max_tokens=9)


class Replayed:
    """Counts how often it was asked."""

    def __init__(self, compute):
        self.graph, self.num_replays = Repeat(compute), 0

    def replay(self):
        self.num_replays += 1
        self.graph.replay()


class NoImages:
    """For text only."""

    def num_ready_tokens(self, request_id, image_index):
        raise AssertionError("there are no images")

    def rows(self, request_id, image_index, start, stop):
        raise AssertionError("there are no images")


class Pair:
    """The same sequences in two caches: one runner replays graphs, the other does not."""

    def __init__(self, family="qwen3", backend=CpuBackend, max_num_seqs=MAX_SEQS):
        _, backbone = tiny_model(family)
        self.graphs = []
        caches = [KVCache(backbone.kv_shape, 64 + scratch, BLOCK, backbone.device) for scratch in (1, 0)]
        for tensor in (*caches[0].keys, *caches[0].values):
            tensor.fill_(float("nan"))
        self.runners = [ModelRunner(backbone, cache, backend(), NoImages()) for cache in caches]
        self.runners[0].capture_graphs(max_num_seqs, MAX_LEN, self.capture)
        self.blocks = iter(torch.randperm(64, generator=torch.Generator().manual_seed(2)).tolist())

    def capture(self, compute):
        self.graphs.append(Replayed(compute))
        return self.graphs[-1]

    def start(self, *lengths):
        """Sequences whose prompts have been computed, and the first token chosen."""
        sequences = []
        for seq_id, length in enumerate(lengths):
            sequence = Sequence(seq_id, b"r", [(7 * seq_id + i) % 400 for i in range(length)], SAMPLING)
            self.grow(sequence)
            self.run_both([ScheduledChunk(sequence, 0, length)])
            sequence.num_computed_tokens = length
            sequence.append(50 + seq_id)
            sequences.append(sequence)
        return sequences

    def grow(self, sequence):
        while len(sequence.block_table) * BLOCK < sequence.num_tokens + 1:
            sequence.block_table.append(next(self.blocks))

    def run_both(self, chunks):
        return [runner.run([runner.prepare(chunk) for chunk in chunks]) for runner in self.runners]

    def decode(self, sequences):
        """One step of both, the same; the next token of each sequence is made up."""
        chunks = [ScheduledChunk(each, each.num_computed_tokens, each.num_tokens) for each in sequences]
        actual, expected = self.run_both(chunks)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
        for sequence in sequences:
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.append((3 * sequence.num_tokens + sequence.seq_id) % 400)
            self.grow(sequence)

    @property
    def num_replays(self):
        """By size, largest first."""
        return [graph.num_replays for graph in self.graphs]


def test_sizes_grow_by_eight_and_end_with_the_largest():
    assert batch_sizes(1) == [1]
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(30) == [1, 2, 4, 8, 16, 24, 30]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_steps_equal_plain_ones(family):
    """While sequences come, grow past a block, leave and move to other rows."""
    pair = Pair(family)
    first, *others = pair.start(5, 11, 3)
    for _ in range(3):
        pair.decode([first, *others])
    pair.decode(others)
    pair.decode([others[1]])
    pair.decode([others[1], first, others[0]])
    assert pair.num_replays == [0, 0, 4, 1, 1]  # 10, 8, 4, 2 and 1 rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_the_rows(backend):
    pair = Pair(backend=BACKENDS[backend], max_num_seqs=3)
    sequences = pair.start(11, 3)
    pair.decode(sequences)
    pair.decode(sequences[1:])
    assert pair.num_replays == [0, 1, 1]  # 3, 2 and 1 rows


def test_a_preempted_sequence_has_a_new_table():
    pair = Pair()
    (sequence,) = pair.start(9)
    pair.decode([sequence])
    sequence.block_table.clear()
    sequence.num_preemptions += 1
    sequence.num_computed_tokens = 0
    pair.grow(sequence)
    pair.run_both([ScheduledChunk(sequence, 0, 10)])
    sequence.num_computed_tokens = 10
    pair.decode([sequence])
    assert sum(pair.num_replays) == 2


def test_only_steps_without_prompts_are_replayed():
    pair = Pair()
    decoding, other = pair.start(5, 6)
    prompt = Sequence(7, b"r", [3], SAMPLING)
    chunk = ScheduledChunk(decoding, 5, 6)
    assert is_decode_only([chunk, ScheduledChunk(other, 6, 7)])
    assert not is_decode_only([chunk, ScheduledChunk(prompt, 0, 1)])
    pair.grow(prompt)
    actual, expected = pair.run_both([chunk, ScheduledChunk(prompt, 0, 1)])
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    assert sum(pair.num_replays) == 0


def test_the_longest_sequence_fits():
    pair = Pair()
    (sequence,) = pair.start(MAX_LEN - 2)
    assert len(sequence.block_table) == MAX_LEN // BLOCK
    pair.decode([sequence])
    assert sum(pair.num_replays) == 1


def test_a_model_that_cannot_be_captured_runs_without(caplog):
    _, backbone = tiny_model("qwen3")
    runner = ModelRunner(backbone, KVCache(backbone.kv_shape, 9, BLOCK, backbone.device), CpuBackend(), NoImages())

    def refuse(_compute):
        raise RuntimeError("operation not permitted when stream is capturing")

    runner.capture_graphs(MAX_SEQS, MAX_LEN, refuse)
    assert "decode runs without CUDA graphs: operation not permitted" in caplog.text
    sequence = Sequence(0, b"r", [3, 4], SAMPLING, output_token_ids=[5])
    sequence.block_table, sequence.num_computed_tokens = [0], 2
    assert runner.run([runner.prepare(ScheduledChunk(sequence, 2, 3))]).shape == (1, 512)


class WithoutKernels(TritonBackend):
    """Plans as for a GPU."""

    def __init__(self):
        pass

    def attend(self, query, key_cache, value_cache, plan, call):
        return torch.empty_like(query, memory_format=torch.contiguous_format)


def decode_without_values(family, backend):
    """A step on tensors that have a shape and nothing else: who looks at a value fails."""
    model, _ = tiny_model(family)
    text = model.config.text_config.to_dict()
    with FakeTensorMode():
        backbone = LanguageBackbone(build_model(text, False, dtype=torch.bfloat16, device=torch.device("cpu")))
        cache = KVCache(backbone.kv_shape, 9, BLOCK, backbone.device)
        positions, tables = torch.zeros(8, dtype=torch.int64), torch.zeros(8, 4, dtype=torch.int32)
        with torch.inference_mode():
            context = ForwardContext.of(DecodeLayout(positions, tables, BLOCK), cache, backend)
            return backbone.logits(backbone.forward(backbone.embed(positions), context)).shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_asks_nothing_of_the_device(family):
    """Or it could not be captured: transformers' layers, and what our backend plans."""
    assert decode_without_values(family, WithoutKernels()) == (8, 512)


def test_a_backend_that_reads_lengths_back_cannot_be_captured():
    assert not CpuBackend.can_capture
    with pytest.raises(DataDependentOutputException):
        decode_without_values("qwen3", CpuBackend())


def replies(capture, prompts):
    """Of an engine whose memory is too small for all, so that some are preempted."""
    _, backbone = tiny_model("qwen3")
    config = EngineConfig(max_model_len=MAX_LEN, max_num_seqs=6, num_kv_blocks=24, block_size=BLOCK)
    engine = LanguageEngine(config, backbone, [], NoImages(), capture)
    engine.warm_up()
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    for seq_id, prompt in enumerate(prompts):
        engine.add(Sequence(seq_id, b"r", prompt, sampling))
    said = defaultdict(list)
    while engine.has_work():
        for output in engine.step():
            said[output.seq_id].append(output.token_id)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_blocks == 24
    return said


def test_an_engine_says_the_same_with_graphs():
    prompts = [[(31 * seq_id + 7 * i) % 400 for i in range(3 + 2 * seq_id)] for seq_id in range(8)]
    graphs = []

    def capture(compute):
        graphs.append(Replayed(compute))
        return graphs[-1]

    assert replies(capture, prompts) == replies(None, prompts)
    assert sum(graph.num_replays for graph in graphs) > 12
