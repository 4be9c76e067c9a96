"""Features equal those of transformers within 1e-5 in FP32, whatever the layout, the shape and the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.model.config import load_config
from common.service.errors import ConfigError
from tests.checkpoints import VISION_6B, VISION_300M, VisionShape, make_checkpoint
from vision_server.encoder import VisionEncoder, VisionModel
from vision_server.internvit import InternViT
from vision_server.projector import pixel_shuffle

TOLERANCE = 1e-5
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SHAPES = {
    "300m, 3 heads": VISION_300M,
    "300m, 1 head, other widths": VisionShape(32, 1, 1, 130, "300m"),
    "6b, 5 heads": VISION_6B,
    "6b, 7 heads, 3 layers": VisionShape(56, 3, 7, 64, "6b"),
}


def random_tiles(num_tiles: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_tiles, 448, 448, 3), dtype=np.uint8)


def expected_features(checkpoint, tiles: np.ndarray):
    pixels = (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    with torch.no_grad():
        return checkpoint.reference().get_image_features(pixels).pooler_output


def loaded_encoder(path, dtype="float32", **changes) -> VisionEncoder:
    encoder = VisionEncoder(replace(load_config(path), **changes), "cpu", dtype)
    encoder.load(path)
    return encoder


@pytest.mark.parametrize("layout", ["github", "hf", "hf_legacy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_features_equal_transformers(tmp_path, layout, shape):
    checkpoint = make_checkpoint(tmp_path, layout=layout, vision=SHAPES[shape], shards=2)
    tiles = random_tiles(2)
    features = loaded_encoder(checkpoint.path).encode(tiles)
    torch.testing.assert_close(features, expected_features(checkpoint, tiles), atol=TOLERANCE, rtol=0)


def test_a_bfloat16_checkpoint_computed_in_float32(tmp_path):
    checkpoint = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    features = loaded_encoder(checkpoint.path).encode(random_tiles(1))
    torch.testing.assert_close(features, expected_features(checkpoint, random_tiles(1)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", [VISION_300M, VISION_6B])
def test_bfloat16_follows_float32(tmp_path, shape):
    checkpoint = make_checkpoint(tmp_path, vision=shape)
    features = loaded_encoder(checkpoint.path, "bfloat16").encode(random_tiles(1))
    assert features.dtype == torch.bfloat16
    expected = expected_features(checkpoint, random_tiles(1))
    similarity = torch.cosine_similarity(features.float().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.999


@pytest.mark.parametrize("shape", ["300m, 3 heads", "6b, 5 heads"])
def test_in_bfloat16_features_are_as_exact_as_those_of_transformers(tmp_path, shape):
    checkpoint = make_checkpoint(tmp_path, vision=SHAPES[shape], dtype=torch.bfloat16)
    tiles = random_tiles(1)
    exact = expected_features(checkpoint, tiles)
    pixels = ((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).bfloat16()
    with torch.no_grad():
        eager = checkpoint.reference().bfloat16().get_image_features(pixels).pooler_output
    features = loaded_encoder(checkpoint.path, "bfloat16").encode(tiles)
    assert (features - exact).abs().mean() <= 1.05 * (eager - exact).abs().mean()


@pytest.mark.parametrize("select_layer", [-1, 1, 0])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("style", [VISION_300M, VISION_6B])
def test_a_packed_tower_computes_what_its_modules_do(checkpoint, style, activation, select_layer):
    config = replace(
        load_config(checkpoint.path).vision,
        **{key: getattr(style, key) for key in ("hidden_size", "num_attention_heads", "intermediate_size")},
        hidden_act=activation,
        norm_type="layer_norm" if style is VISION_300M else "rms_norm",
        qkv_bias=style is VISION_300M,
        qk_normalization=style is not VISION_300M,
    )
    torch.manual_seed(0)
    tower = InternViT(config, select_layer).requires_grad_(False).eval()
    for parameter in tower.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    pixels = torch.randn(2, 3, 56, 56)
    beats: list[None] = []
    with torch.inference_mode():
        expected = tower(pixels)
        tower.pack()
        tower.pack()  # nothing is left to do
        found = tower(pixels, lambda: beats.append(None))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert len(beats) == select_layer % 3


def test_a_tower_elsewhere_is_not_packed(checkpoint):
    with torch.device("meta"):
        tower = InternViT(load_config(checkpoint.path).vision).requires_grad_(False)
        tower.pack()
        assert tower(torch.empty(1, 3, 448, 448)).shape == (1, 1025, 48)


def test_packed_weights_are_in_memory_once(checkpoint):
    encoder = VisionEncoder(load_config(checkpoint.path), "cpu", "float32")
    before = encoder.weight_bytes
    encoder.load(checkpoint.path)
    encoder.encode(random_tiles(1))
    assert encoder.weight_bytes == before


def test_neighbours_in_a_batch_do_not_matter(checkpoint):
    encoder = loaded_encoder(checkpoint.path)
    tiles = random_tiles(7)
    together = encoder.encode(tiles)
    alone = torch.cat([encoder.encode(tiles[number : number + 1]) for number in range(7)])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("select_layer", [-1, -2, 1, 0])
def test_select_layer_picks_a_hidden_state(tmp_path, select_layer):
    checkpoint = make_checkpoint(tmp_path, layout="github", github_config={"select_layer": select_layer})
    tiles = random_tiles(1)
    pixels = (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    model = checkpoint.reference().model
    with torch.no_grad():
        tower = model.vision_tower
        states = [tower.embeddings(pixels)]
        for layer in tower.encoder.layer:
            states.append(layer(states[-1]))
        shuffled = model.pixel_shuffle(states[select_layer][:, 1:].unflatten(1, (32, 32)))
        expected = model.multi_modal_projector(shuffled.flatten(1, 2))
    features = loaded_encoder(checkpoint.path).encode(tiles)
    torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)


def test_a_tile_size_other_than_the_trained_one_resizes_the_positions(tmp_path):
    """``force_image_size`` 448 over a tower trained at 224: bicubic, as transformers does it."""
    checkpoint = make_checkpoint(
        tmp_path,
        layout="github",
        vision=replace(VISION_300M, image_size=224),
        github_config={"force_image_size": 448},
    )
    tiles = random_tiles(1)
    features = loaded_encoder(checkpoint.path).encode(tiles)
    torch.testing.assert_close(features, expected_features(checkpoint, tiles), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_follows_its_definition(version, factor):
    """INTERNVL.md 4.2, element by element."""
    side, channels = 8, 3
    hidden = torch.randn(2, side * side, channels)
    shuffled = pixel_shuffle(hidden, factor, version)
    cells = side // factor
    for row in range(cells):
        for col in range(cells):
            token = row * cells + col if version == "v2" else col * cells + row
            for a in range(factor):
                for b in range(factor):
                    first = (a * factor + b) * channels
                    patch = hidden[:, (factor * row + a) * side + factor * col + b]
                    assert torch.equal(shuffled[:, token, first : first + channels], patch)


def test_version_1_transposes_the_tokens_of_version_2(checkpoint):
    tiles = random_tiles(1)
    v1 = loaded_encoder(checkpoint.path, ps_version="v1").encode(tiles)
    v2 = loaded_encoder(checkpoint.path, ps_version="v2").encode(tiles)
    transposed = v2.unflatten(1, (16, 16)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(v1, transposed, atol=TOLERANCE, rtol=0)


def test_nothing_is_allocated_before_load(checkpoint):
    config = load_config(checkpoint.path)
    encoder = VisionEncoder(config, "cpu", "float32")
    assert {parameter.device.type for parameter in encoder._model.parameters()} == {"meta"}
    assert encoder.weight_bytes == sum(4 * parameter.numel() for parameter in VisionModel(config).parameters())


def test_loading_reports_its_progress(checkpoint):
    steps: list[tuple[int, int]] = []
    encoder = VisionEncoder(load_config(checkpoint.path), "cpu", "float32")
    encoder.load(checkpoint.path, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (encoder.weight_bytes, encoder.weight_bytes)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_long_batches_show_signs_of_life(checkpoint):
    beats: list[None] = []
    encoder = VisionEncoder(load_config(checkpoint.path), "cpu", "float32", on_progress=lambda: beats.append(None))
    encoder.load(checkpoint.path)
    encoder.encode(random_tiles(1))
    assert len(beats) == VISION_300M.num_hidden_layers


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_a_config_error(checkpoint, device):
    with pytest.raises(ConfigError, match="device"):
        VisionEncoder(load_config(checkpoint.path), device)
