"""FP8 weights on disk: read as they are where the parameter is FP8, elsewhere times their scales, tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from common.model import fp8, memory
from common.model.checkpoint import Checkpoint, load_role
from common.model.config import load_config
from common.service.errors import CheckpointError
from tests import fp8 as plain
from tests.checkpoints import make_checkpoint

K_PROJ = "model.language_model.layers.0.self_attn.k_proj.weight"


def unset(parameters):
    return {name: torch.full_like(parameter, float("nan")) for name, parameter in parameters.items()}


def load(path, role, parameters):
    load_role(Checkpoint.open(path), load_config(path), role, parameters)
    return parameters


def rewrite(path, change):
    """``change`` gets the tensors of the one shard by name."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 7), (1, 1), (8, 3), (12, 18)])
def test_blocks_of_any_matrix(rows, columns):
    matrix, block = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), (4, 6)
    values, scales = fp8.quantize(matrix, block)
    expected_values, expected_scales = plain.quantize(matrix, block)
    assert torch.equal(scales, expected_scales) and scales.shape == fp8.scale_shape(rows, columns, block)
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
    found = fp8.dequantize(values, scales, block)
    assert torch.equal(found, plain.dequantize(values, scales, block))
    assert torch.equal(fp8.dequantize(values[3:], scales, block, first_row=3), found[3:])
    assert ((found - matrix).abs() <= matrix.abs() / 16 + scales.max() / 512).all()


def test_every_number_of_eight_bits():
    values = torch.arange(256, dtype=torch.uint8).view(fp8.DTYPE)
    values = values[~values.float().isnan()].unsqueeze(0)
    assert values.numel() == 254
    assert torch.equal(fp8.dequantize(values, torch.ones(1, 1), (1, 254)), values.float())


def test_a_block_of_zeros():
    values, scales = fp8.quantize(torch.zeros(3, 3), (2, 2))
    assert torch.equal(fp8.dequantize(values, scales, (2, 2)), torch.zeros(3, 3))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "family"), [("hf", "qwen3"), ("github", "qwen3_moe"), ("github", "qwen2")])
def test_language_weights_are_what_transformers_makes_of_them(tmp_path, monkeypatch, layout, family, scale_dtype):
    """transformers wants whole blocks, so these are; a small staging buffer cuts through them."""
    monkeypatch.setattr("common.model.checkpoint.STAGING_BYTES", 1024)
    made = make_checkpoint(tmp_path, layout=layout, text=family)
    expected = made.parameters("language")
    plain.quantize_checkpoint(tmp_path, (8, 8), scale_dtype=scale_dtype)
    disk = load_file(tmp_path / "model.safetensors")
    found = load(tmp_path, "language", unset(expected))
    changed = 0
    for name, scales in disk.items():
        if name.endswith("_scale_inv"):
            weight = name.removesuffix("_scale_inv")
            pair = {"weight": disk[weight], "weight_scale_inv": scales.float()}
            changed += dequantized_part(found, weight, Fp8Dequantize(None).convert(pair)["weight"])
    assert changed == sum(name.endswith("_scale_inv") for name in disk) > 0


def dequantized_part(parameters, name_on_disk, expected):
    """1 if ``expected`` is a part of the parameter that the name on disk belongs to."""
    rest = name_on_disk.partition("layers.")[2].split(".")
    if "experts" not in rest:
        return torch.equal(parameters[f"model.layers.{'.'.join(rest)}"], expected)
    fused = "down_proj" if rest[-2] == "down_proj" else "gate_up_proj"
    experts = parameters[f"model.layers.{rest[0]}.mlp.experts.{fused}"][int(rest[3])]
    halves = experts.chunk(2) if fused == "gate_up_proj" else [experts]
    return any(torch.equal(half, expected) for half in halves)


def test_an_fp8_parameter_takes_values_and_scales_as_they_are(tmp_path):
    expected = make_checkpoint(tmp_path).parameters("language")
    plain.quantize_checkpoint(tmp_path, (8, 12))
    disk = load_file(tmp_path / "model.safetensors")
    name = K_PROJ.replace("language_model.", "")
    parameters = unset(expected) | {
        name: torch.empty_like(disk[K_PROJ]),
        f"{name}_scale_inv": torch.empty_like(disk[f"{K_PROJ}_scale_inv"]),
    }
    load(tmp_path, "language", parameters)
    assert torch.equal(parameters[name].view(torch.uint8), disk[K_PROJ].view(torch.uint8))
    assert torch.equal(parameters[f"{name}_scale_inv"], disk[f"{K_PROJ}_scale_inv"])


@pytest.mark.parametrize("layout", ["hf", "github"])
def test_vision_weights_that_are_fp8_too(tmp_path, layout):
    """Fused from three matrices with scales of their own, or one matrix on disk already."""
    expected = make_checkpoint(tmp_path, layout=layout).parameters("vision")
    plain.quantize_checkpoint(tmp_path, (20, 28), which=lambda name: "encoder" in name and name.endswith("j.weight"))
    found = load(tmp_path, "vision", unset(expected))
    differ = {name for name in expected if not torch.equal(found[name], expected[name])}
    assert differ and all(name.endswith(("qkv.weight", "proj.weight")) for name in differ)
    assert all((found[name] - expected[name]).abs().max() < 0.1 * expected[name].abs().max() for name in expected)


def test_vision_does_not_see_what_became_of_the_language_model(tmp_path):
    expected = make_checkpoint(tmp_path).parameters("vision")
    plain.quantize_checkpoint(tmp_path, (16, 16))
    assert all(torch.equal(found, expected[name]) for name, found in load(tmp_path, "vision", unset(expected)).items())
    checkpoint = Checkpoint.open(tmp_path)
    assert memory.weight_bytes(checkpoint, "vision", torch.bfloat16) == 2 * sum(map(torch.numel, expected.values()))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


SCALES = f"{K_PROJ}_scale_inv"
BROKEN = [
    (drop(SCALES), rf"tensor '{K_PROJ}' in shard '.*': FP8, but its scales '{SCALES}' are missing"),
    (put(SCALES, torch.ones(3, 5)), rf"tensor '{SCALES}' in shard '.*': expected shape \[2, 4\], found \[3, 5\]"),
    (put(SCALES, torch.ones(2, 4).int()), rf"tensor '{SCALES}' in shard '.*': expected one of F32, .*, found I32"),
    (put(K_PROJ, torch.ones(32, 56)), rf"tensor '{SCALES}' in shard '.*' is extra"),
    (
        put("model.language_model.norm.weight", torch.ones(56).to(torch.float8_e4m3fn)),
        r"tensor 'model.language_model.norm.weight' in shard '.*': FP8, but its scales .* are missing",
    ),
]


@pytest.mark.parametrize(("change", "complaint"), BROKEN)
def test_what_does_not_fit_is_named(tmp_path, change, complaint):
    parameters = make_checkpoint(tmp_path).parameters("language")
    plain.quantize_checkpoint(tmp_path, (16, 16))
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=complaint):
        load(tmp_path, "language", parameters)


def test_fp8_without_a_word_in_the_config(tmp_path):
    parameters = make_checkpoint(tmp_path).parameters("language")
    plain.quantize_checkpoint(tmp_path, (16, 16))
    plain.declare(tmp_path, {"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"FP8, but config.json has no quantization_config"):
        load(tmp_path, "language", parameters)


@pytest.mark.parametrize(("layout", "key"), [("hf", None), ("hf", "text_config"), ("github", "llm_config")])
def test_blocks_are_declared_at_the_top_or_with_the_language_model(tmp_path, layout, key):
    make_checkpoint(tmp_path, layout=layout)
    assert load_config(tmp_path).fp8_block is None
    plain.quantize_checkpoint(tmp_path, (20, 28), config_key=key)
    assert load_config(tmp_path).fp8_block == (20, 28)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"weight_block_size": [128]}, "weight_block_size: expected rows and columns of a block, found .128."),
        ({"weight_block_size": [128, 0]}, "weight_block_size: expected rows and columns"),
        ({}, "weight_block_size: missing, expected list"),
        ({"weight_block_size": [8, 8], "activation_scheme": "static"}, "activation_scheme: expected one of dynamic"),
    ],
)
def test_a_declaration_that_means_nothing(tmp_path, values, complaint):
    make_checkpoint(tmp_path)
    plain.declare(tmp_path, {"quant_method": "fp8", **values})
    with pytest.raises(CheckpointError, match=rf"config.json: quantization_config.{complaint}"):
        load_config(tmp_path)


@pytest.mark.parametrize("value", ["mxfp4", {"quant_method": "mxfp4"}, None])
def test_other_declarations_are_how_somebody_once_ran_the_model(tmp_path, value):
    make_checkpoint(tmp_path)
    plain.declare(tmp_path, value)
    assert load_config(tmp_path).fp8_block is None


def test_the_fingerprint_knows_the_blocks(tmp_path):
    """Two servers that disagree about them must not work together."""
    make_checkpoint(tmp_path)
    plain.quantize_checkpoint(tmp_path, (16, 16))
    checkpoint = Checkpoint.open(tmp_path)
    before = checkpoint.fingerprint(load_config(tmp_path))
    plain.declare(tmp_path, {"quant_method": "fp8", "weight_block_size": [8, 32]})
    assert checkpoint.fingerprint(load_config(tmp_path)) != before
