"""Encoding in fixed numbers of tiles equals encoding as it comes. Without a GPU a graph computes once more."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model.config import load_config
from common.model.graphs import Repeat
from tests.checkpoints import VISION_300M, VisionShape, make_checkpoint
from vision_server.encoder import Seen, VisionEncoder, VisionModel
from vision_server.tile_graphs import TileGraphs, batch_sizes, divide, quick_sizes

CPU = torch.device("cpu")
SHAPES = {"300m": VISION_300M, "6b": VisionShape(80, 2, 5, 80, "6b")}
TOLERANCE = 1e-5


class Replayed:
    """Counts how often it was asked."""

    def __init__(self, compute):
        self.graph, self.num_replays = Repeat(compute), 0

    def replay(self):
        self.num_replays += 1
        self.graph.replay()


class Captures:
    """Keeps what it captured."""

    def __init__(self):
        self.graphs: list[Replayed] = []

    def __call__(self, compute):
        self.graphs.append(Replayed(compute))
        return self.graphs[-1]

    @property
    def num_replays(self):
        """Of each, in the order of the captures: largest first."""
        return [graph.num_replays for graph in self.graphs]


def random_tiles(num_tiles: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_tiles, 448, 448, 3), dtype=np.uint8)


def loaded(path, dtype="float32", **options) -> VisionEncoder:
    encoder = VisionEncoder(load_config(path), "cpu", dtype, **options)
    encoder.load(path)
    return encoder


@pytest.fixture(scope="module", params=SHAPES)
def flash(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, layout="github", vision=SHAPES[request.param], flash=True)


# --- which sizes


def test_sizes_are_powers_of_two_and_the_largest():
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(32) == [1, 2, 4, 8, 16, 32]


def test_no_replay_is_longer_than_a_router_is_patient():
    sizes = batch_sizes(32)
    assert quick_sizes(sizes, 0.004) == sizes
    assert quick_sizes(sizes, 0.1) == [1, 2, 4, 8]
    assert quick_sizes(sizes, 5.0) == [1]
    assert quick_sizes([8], 5.0) == [8]  # batch-invariant: bits must not depend on the device's speed


def test_a_batch_is_divided_into_what_takes_the_least_time():
    linear = {1: 1.0, 2: 2.0, 4: 4.0}
    assert sum(divide(7, linear)) == 7
    with_overhead = {1: 1.0, 2: 1.1, 4: 1.2, 8: 2.1}
    assert divide(3, with_overhead) == [4]
    assert divide(5, with_overhead) == [8]
    assert divide(12, with_overhead) == [8, 4]
    assert divide(9, {4: 1.0}) == [4, 4, 4]


@given(
    st.dictionaries(st.sampled_from([1, 2, 3, 4, 8]), st.floats(0.01, 10), min_size=1),
    st.integers(1, 9),
)
def test_no_other_division_is_quicker(seconds, num_tiles):
    found = divide(num_tiles, seconds)
    assert sum(found) >= num_tiles and sum(found[:-1]) < num_tiles and found == sorted(found, reverse=True)
    others = (
        sizes
        for count in range(1, num_tiles + 1)
        for sizes in combinations_with_replacement(seconds, count)
        if sum(sizes) >= num_tiles
    )
    least = min(sum(seconds[size] for size in sizes) for sizes in others)
    assert sum(seconds[size] for size in found) == pytest.approx(least)


# --- what they compute


class Graphs:
    """Of a computation that tells tiles apart, with every size as dear as the test says."""

    def __init__(self, sizes, seconds=None, **options):
        self.captures = Captures()
        self.graphs = TileGraphs(self.compute, sizes, 4, CPU, self.captures, **options)
        if seconds:
            self.graphs.seconds.update(seconds)

    def compute(self, tiles):
        values = tiles.float().flatten(1)
        return values.sum(1), values[:, :3] * 2

    def check(self, num_tiles):
        tiles = torch.randint(256, (num_tiles, 4, 4, 3), dtype=torch.uint8)
        found = self.graphs.run(tiles)
        for part, expected in zip(found, self.compute(tiles), strict=True):
            assert torch.equal(part, expected)
        return found


def test_each_tile_gets_its_own_whatever_the_batch():
    graphs = Graphs([1, 2, 4])
    for num_tiles in (3, 1, 7, 4, 2, 13, 1):
        graphs.check(num_tiles)


def test_what_came_before_is_not_overwritten():
    graphs = Graphs([4])
    first = graphs.check(3)
    copies = [part.clone() for part in first]
    graphs.check(4)
    assert all(torch.equal(part, copy) for part, copy in zip(first, copies, strict=True))


def test_tiles_that_are_missing_are_black():
    seen = []

    def compute(tiles):
        seen.append(tiles.clone())
        return (tiles.float(),)

    graphs = TileGraphs(compute, [4], 4, CPU, Repeat)
    for num_tiles in (4, 1):
        graphs.run(torch.full((num_tiles, 4, 4, 3), 7, dtype=torch.uint8))
    assert seen[-1].flatten(1).amax(1).tolist() == [7, 0, 0, 0]


def test_the_largest_is_captured_first_and_batches_take_the_quickest():
    graphs = Graphs([1, 2, 4], {1: 1.0, 2: 1.5, 4: 1.75})
    assert list(graphs.graphs.seconds) == [4, 2, 1]
    before = graphs.captures.num_replays
    for num_tiles in (1, 2, 3, 5, 9):  # 1; 2; 4; 4 + 1; 4 + 4 + 1
        graphs.check(num_tiles)
    after = graphs.captures.num_replays
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 1, 3]


def test_signs_of_life_at_the_start_and_behind_each_replay():
    beats = []
    graphs = Graphs([1, 2], {1: 1.0, 2: 1.5}, on_progress=lambda: beats.append("start"))
    assert len(beats) >= 2 * 3  # once alone, then each size, twice
    beats.clear()
    graphs.graphs.run(torch.zeros(3, 4, 4, 3, dtype=torch.uint8), lambda: beats.append("replay"))
    assert beats == ["replay", "replay"]


# --- the encoder with them


@pytest.mark.parametrize("shape", SHAPES)
def test_an_encoder_replays_what_it_computes(tmp_path, shape):
    checkpoint = make_checkpoint(tmp_path, vision=SHAPES[shape])
    encoder, plain = loaded(checkpoint.path), loaded(checkpoint.path)
    captures = Captures()
    encoder.capture_graphs(4, captures)
    measured = sum(captures.num_replays)
    for num_tiles in (1, 3, 6):
        tiles = random_tiles(num_tiles, num_tiles)
        torch.testing.assert_close(encoder.encode(tiles), plain.encode(tiles), atol=TOLERANCE, rtol=0)
    assert len(captures.graphs) == 3 and sum(captures.num_replays) > measured


def test_a_flash_encoder_replays_the_way_to_its_routes(flash):
    encoder, plain = loaded(flash.path), loaded(flash.path)
    encoder.capture_graphs(2, Repeat)
    tiles = random_tiles(3)
    (seen,), (expected,) = (each.launch("patches", [tiles]).result() for each in (encoder, plain))
    assert isinstance(seen, Seen) and isinstance(expected, Seen)
    torch.testing.assert_close(seen.patches, expected.patches, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(seen.scores, expected.scores, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(encoder.encode(tiles), plain.encode(tiles), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["features", "patches", "states"])
def test_batch_invariant_features_come_from_one_size(flash, kind):
    """On a CPU that is one tile: in any company, and with graphs or without, the bits are the same."""
    encoder = loaded(flash.path, "bfloat16", is_batch_invariant=True)
    captures = Captures()
    alone, together = [random_tiles(1)], [random_tiles(1), random_tiles(2, 1)]
    expected = bits(encoder.launch(kind, alone))
    encoder.capture_graphs(4, captures)
    assert len(captures.graphs) == 1
    for batch in (alone, together):
        assert torch.equal(bits(encoder.launch(kind, batch)), expected)


def bits(pending) -> torch.Tensor:
    first, *_ = pending.result()
    return first.patches if isinstance(first, Seen) else first


def test_a_model_that_cannot_be_captured_runs_without(checkpoint, caplog):
    encoder = loaded(checkpoint.path)

    def refuse(_compute):
        raise RuntimeError("operation not permitted when stream is capturing")

    encoder.capture_graphs(2, refuse)
    assert "tiles are encoded without CUDA graphs: operation not permitted" in caplog.text
    tiles = random_tiles(1)
    torch.testing.assert_close(encoder.encode(tiles), loaded(checkpoint.path).encode(tiles), atol=TOLERANCE, rtol=0)


def test_no_graphs_on_a_cpu(checkpoint):
    """They would only divide what a core computes tile by tile."""
    encoder = loaded(checkpoint.path)
    encoder.warm_up(4)
    assert encoder._graphs is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_way_asks_nothing_of_the_device(flash, dtype):
    """Or it could not be captured. On tensors that have a shape and nothing else: who looks at a value fails."""
    config = load_config(flash.path)
    with torch.device("meta"), torch.inference_mode():
        model = VisionModel(config).to(dtype)
        pixels = torch.zeros(2, 3, 448, 448, dtype=dtype)
        patches = model.see(pixels)
        assert model.score(patches).shape == (2,)
        for compressed, num_tokens in ((False, 256), (True, 64)):
            features = model.project(patches, compressed=compressed)
            assert features.shape == (2, num_tokens, config.text_hidden_size)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_reads_and_writes_what_flash_attention_takes_as_it_is(tmp_path, shape, monkeypatch):
    """No mask, heads next to one another in memory, and a result that is one matrix again without a copy."""
    config = load_config(make_checkpoint(tmp_path, vision=SHAPES[shape]).path)
    calls = []

    def attention(query, key, value, **options):
        assert not options
        calls.append([tensor.stride(-1) for tensor in (query, key, value)])
        num_tiles, num_heads, num_tokens, size = query.shape
        return query.new_empty(num_tiles, num_tokens, num_heads, size).transpose(1, 2)  # as flash attention returns it

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.device("meta"), torch.inference_mode():
        VisionModel(config).see(torch.zeros(2, 3, 448, 448))
    assert calls == [[1, 1, 1]] * config.vision.num_hidden_layers
