"""The resolution router equals the published one: scores within 1e-5 in FP32, and exactly the same tiles compressed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model.config import load_config
from tests.checkpoints import VISION_6B, VISION_300M, VisionShape, make_checkpoint
from tests.flash import ABSOLUTE_THRESHOLD, RELATIVE_THRESHOLD
from vision_server.encoder import Seen, VisionEncoder
from vision_server.vir import VirChoice

SHAPES = {"300m": VISION_300M, "300m, wider": VisionShape(64, 2, 4, 96, "300m"), "6b": VisionShape(80, 2, 5, 80, "6b")}
PUBLISHED = VirChoice("auto", "image", RELATIVE_THRESHOLD, ABSOLUTE_THRESHOLD)


def random_tiles(num_tiles: int, seed: int = 0) -> np.ndarray:
    """Tiles that differ in contrast, so that their scores do."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (num_tiles, 448, 448, 3))
    return (noise * np.linspace(0.1, 1, num_tiles)[:, None, None, None]).astype(np.uint8)


def loaded(path, dtype="float32", **options) -> VisionEncoder:
    encoder = VisionEncoder(load_config(path), "cpu", dtype, **options)
    encoder.load(path)
    return encoder


def seen_by(encoder: VisionEncoder, tiles: np.ndarray) -> Seen:
    (seen,) = encoder.launch("patches", [tiles]).result()
    assert isinstance(seen, Seen)
    return seen


def plain(checkpoint, tiles):
    """Patches and routed features as the published code makes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        patches = checkpoint.reference().model.vision_tower(pixels).last_hidden_state[:, 1:]
        return patches, checkpoint.flash.route(patches, checkpoint.reference().model.multi_modal_projector)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_flash_path_equals_a_plain_transcription(tmp_path, shape):
    checkpoint = make_checkpoint(tmp_path, layout="github", vision=SHAPES[shape], flash=True)
    tiles = random_tiles(6)
    encoder = loaded(tmp_path)
    seen = seen_by(encoder, tiles)
    _, expected = plain(checkpoint, tiles)
    torch.testing.assert_close(seen.scores, expected.scores, atol=1e-5, rtol=0)
    compressed = PUBLISHED.compressed(seen.scores)
    assert compressed == [len(rows) == 64 for rows in expected.features]
    assert 0 < sum(compressed) < 6
    projected = encoder.project(list(seen.patches), compressed).result()
    assert projected.tokens_per_tile == tuple(len(rows) for rows in expected.features)
    torch.testing.assert_close(projected.rows, torch.cat(expected.features), atol=1e-5, rtol=1e-5)


def test_uncompressed_features_are_those_of_the_base_model(tmp_path):
    checkpoint = make_checkpoint(tmp_path, layout="github", flash=True)
    tiles = random_tiles(2)
    encoder = loaded(tmp_path)
    with torch.no_grad():
        patches, _ = plain(checkpoint, tiles)
        expected = checkpoint.reference().model.multi_modal_projector(_shuffled_by_transformers(checkpoint, patches))
    torch.testing.assert_close(encoder.encode(tiles), expected, atol=1e-5, rtol=0)


def _shuffled_by_transformers(checkpoint, patches):
    square = patches.unflatten(1, (32, 32))
    return checkpoint.reference().model.pixel_shuffle(square, scale_factor=0.5).flatten(1, 2)


def test_only_the_projector_that_is_needed_runs(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, layout="github", vision=VISION_300M, flash=True)
    encoder = loaded(tmp_path)
    seen = seen_by(encoder, random_tiles(3))
    ran: list[tuple[str, int]] = []
    for name in ("mlp1", "mlp2"):
        module = encoder._model.get_submodule(name)
        module.register_forward_hook(lambda _, inputs, __, name=name: ran.append((name, len(inputs[0]))))
    encoder.project(list(seen.patches), [True, False, True]).result()
    assert sorted(ran) == [("mlp1", 1), ("mlp2", 2)]


def test_bfloat16_follows_float32(tmp_path):
    make_checkpoint(tmp_path, layout="github", flash=True)
    tiles = random_tiles(4)
    exact, rounded = (seen_by(loaded(tmp_path, dtype), tiles).scores for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0)


# --- the choice


def rule(scores: list[float], over: list[float], relative: float, absolute: float, dtype: torch.dtype) -> list[bool]:
    """INTERNVL.md 2.3, steps 4 and 5, a tile at a time."""
    threshold = torch.quantile(torch.tensor(over, dtype=dtype).float(), relative).to(dtype)
    values = torch.tensor(scores, dtype=dtype)
    return [bool(value > threshold and value >= torch.tensor(absolute, dtype=dtype)) for value in values]


probabilities = st.floats(0, 1, width=32)


@given(st.lists(probabilities, min_size=1, max_size=12), probabilities, probabilities, st.booleans())
def test_the_published_rule(scores, relative, absolute, is_bfloat16):
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    choice = VirChoice("auto", "image", relative, absolute)
    assert choice.compressed(torch.tensor(scores, dtype=dtype)) == rule(scores, scores, relative, absolute, dtype)


@given(st.lists(probabilities, min_size=2, max_size=12), st.integers(1, 11), probabilities)
def test_an_image_of_a_request_is_routed_as_in_the_whole_request(scores, cut, relative):
    """Images apart, with the scores of all, choose what one call over all tiles would."""
    cut = min(cut, len(scores) - 1)
    together = VirChoice("auto", "image", relative, 0.2).compressed(torch.tensor(scores))
    apart = VirChoice("auto", "request", relative, 0.2, tuple(torch.tensor(scores).tolist()))
    assert apart.compressed(torch.tensor(scores[:cut])) + apart.compressed(torch.tensor(scores[cut:])) == together


@given(st.lists(probabilities, min_size=1, max_size=12), probabilities)
def test_scope_absolute_looks_at_each_tile_alone(scores, absolute):
    choice = VirChoice("auto", "absolute", 0.99, absolute)
    exact = torch.tensor(absolute).item()
    assert choice.compressed(torch.tensor(scores)) == [score >= exact for score in torch.tensor(scores).tolist()]
    assert not choice.needs_all_tiles


@pytest.mark.parametrize(("mode", "expected"), [("off", False), ("force64", True)])
def test_a_mode_that_decides_looks_at_nothing(mode, expected):
    choice = VirChoice(mode, "image", 0.5, 0.5)
    assert choice.compressed(torch.tensor([0.0, 1.0])) == [expected] * 2
    assert not choice.needs_all_tiles


def test_a_single_tile_is_never_compressed_under_a_relative_threshold():
    assert VirChoice("auto", "image", 0.0, 0.0).compressed(torch.tensor([0.99])) == [False]


@pytest.mark.parametrize("shape", [VISION_300M, VISION_6B])
def test_batch_company_changes_no_bit_in_batch_invariant_mode(tmp_path, shape):
    make_checkpoint(tmp_path, layout="github", vision=shape, flash=shape is VISION_300M)
    encoder = loaded(tmp_path, "bfloat16", is_batch_invariant=True)
    tiles = random_tiles(5)
    together = encoder.encode(tiles)
    for tile in range(5):
        assert torch.equal(encoder.encode(tiles[tile : tile + 1])[0], together[tile])
    assert torch.equal(encoder.encode(tiles[[3, 1]]), together[[3, 1]])
