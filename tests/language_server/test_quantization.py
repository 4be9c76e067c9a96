"""Eight-bit weights: the libraries' own numbers, no more memory than promised, and one line where it cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from common.model import fp8, memory
from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from common.service.errors import CheckpointError, ConfigError
from language_server.backbone import load_backbone
from language_server.fp8_linear import Fp8Linear
from language_server.quantization import choose_quantization
from tests.checkpoints import make_checkpoint
from tests.fp8 import declare, quantize_checkpoint
from tests.language_server.models import paged_logits, reference_logits

CPU = torch.device("cpu")
TOKEN_IDS = torch.arange(20, 100)
DENSE = ("qwen2", "qwen3", "internlm3")
MEBIBYTE = 2**20


def choose(path, name, dtype=torch.float32):
    return choose_quantization(name, Checkpoint.open(path), load_config(path), dtype=dtype, device=CPU)


def load(path, name, dtype=torch.float32):
    quantization = choose(path, name, dtype)
    return load_backbone(Checkpoint.open(path), load_config(path), dtype=dtype, device=CPU, quantization=quantization)


def linears(model):
    """The reference's linear layers of the decoder, by our name of them."""
    found = model.model.language_model.named_modules()
    return {f"model.{name}": module for name, module in found if isinstance(module, nn.Linear)}


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def dequantize_reference(model, path):
    """Give the undivided model the weights that transformers makes of a checkpoint's FP8."""
    disk = load_file(path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{name}_scale_inv" in disk:
                pair = {"weight": disk[name], "weight_scale_inv": disk[f"{name}_scale_inv"]}
                parameter.copy_(Fp8Dequantize(None).convert(pair)["weight"])


@pytest.mark.parametrize("family", DENSE)
def test_an_fp8_checkpoint_is_dequantised_where_fp8_is_not_multiplied(tmp_path, family):
    made = make_checkpoint(tmp_path, text=family)
    before = reference_logits(made.reference(), TOKEN_IDS)
    quantize_checkpoint(tmp_path, (8, 8))
    dequantize_reference(made.reference(), tmp_path)
    expected = reference_logits(made.reference(), TOKEN_IDS)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    for name in ("auto", "none"):
        assert str(choose(tmp_path, name)) == "none (FP8 dequantised)"
        assert_close(paged_logits(load(tmp_path, name), TOKEN_IDS), expected)


@pytest.mark.parametrize("block", [(8, 8), (20, 28), (128, 128)])
def test_fp8_weights_stay_fp8_when_asked(tmp_path, block):
    """Dequantised at each use they are what they would be after dequantising once, whole blocks or not."""
    make_checkpoint(tmp_path)
    quantize_checkpoint(tmp_path, block)
    backbone = load(tmp_path, "fp8")
    kept = [module for module in backbone.model.modules() if isinstance(module, Fp8Linear)]
    assert len(kept) == 2 * 7 and {module.weight.dtype for module in kept} == {fp8.DTYPE}
    assert str(choose(tmp_path, "fp8")) == "fp8 (weights only)"
    assert_close(paged_logits(backbone, TOKEN_IDS), paged_logits(load(tmp_path, "none"), TOKEN_IDS))


@pytest.mark.parametrize(("block", "said"), [((128, 128), "fp8"), ((8, 8), "none (FP8 dequantised)")])
def test_auto_keeps_what_the_device_multiplies(tmp_path, monkeypatch, block, said):
    monkeypatch.setattr("language_server.quantization.can_multiply", lambda device, dtype: True)
    make_checkpoint(tmp_path)
    assert str(choose(tmp_path, "auto")) == "none"
    quantize_checkpoint(tmp_path, block)
    assert str(choose(tmp_path, "auto")) == said


def test_experts_of_an_fp8_checkpoint_are_dequantised_beside_layers_that_stay(tmp_path):
    made = make_checkpoint(tmp_path, text="qwen3_moe", layout="github")
    quantize_checkpoint(tmp_path, (8, 8))
    backbone = load(tmp_path, "fp8")
    assert str(choose(tmp_path, "fp8")) == "fp8 (weights only, the rest dequantised)"
    layer = backbone.model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, Fp8Linear) and layer.mlp.experts.down_proj.dtype == torch.float32
    expected = paged_logits(load(tmp_path, "auto"), TOKEN_IDS)
    assert_close(paged_logits(backbone, TOKEN_IDS), expected)
    assert (expected - reference_logits(made.reference(), TOKEN_IDS)).abs().max() > 1e-3 * expected.abs().max()


def test_weights_become_fp8_while_they_are_read(tmp_path, monkeypatch):
    """Chunk by chunk as all at once."""
    monkeypatch.setattr("common.model.checkpoint.STAGING_BYTES", 1024)
    monkeypatch.setattr("language_server.quantization.BLOCK", (16, 24))
    made = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path, "fp8", torch.bfloat16).model
    for name, linear in linears(made.reference()).items():
        values, scales = fp8.quantize(linear.weight, (16, 24))
        held = model.get_submodule(name)
        assert torch.equal(held.weight.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(held.weight_scale_inv, scales)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", DENSE)
def test_int8_is_what_bitsandbytes_computes(tmp_path, family):
    """Its own layers, quantised by themselves, in transformers' own model. Rounding of activations may flip."""
    made = make_checkpoint(tmp_path, text=family)
    backbone, reference = load(tmp_path, "bitsandbytes"), made.reference()
    exact = reference_logits(reference, TOKEN_IDS)
    for name, linear in linears(reference).items():
        has_bias = linear.bias is not None
        layer = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, has_bias, has_fp16_weights=False, threshold=6.0
        )
        layer.load_state_dict(linear.state_dict())
        layer = layer.to("cpu").eval()
        ours = backbone.model.get_submodule(name)
        assert torch.equal(ours.weight.CB, layer.weight.CB) and torch.equal(ours.weight.SCB, layer.weight.SCB)
        assert ours.state.threshold == layer.state.threshold and not ours.training
        reference.model.language_model.set_submodule(name.removeprefix("model."), layer)
    found = paged_logits(backbone, TOKEN_IDS)
    assert_close(found, reference_logits(reference, TOKEN_IDS), 0.02)
    assert 0.02 * exact.abs().max() < (found - exact).abs().max() < 0.3 * exact.abs().max()


def test_int8_in_bfloat16(tmp_path):
    """Biases, too, and it does not warn at each product."""
    make_checkpoint(tmp_path, text="qwen2")
    backbone = load(tmp_path, "bitsandbytes", torch.bfloat16)
    expected = paged_logits(load(tmp_path, "bitsandbytes"), TOKEN_IDS)
    assert_close(paged_logits(backbone, TOKEN_IDS), expected, 0.3)
    assert backbone.model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert backbone.model.lm_head.weight.dtype == torch.bfloat16


CASES = [
    ("qwen2", "bitsandbytes", None),
    ("internlm3", "bitsandbytes", None),
    ("qwen3", "fp8", None),
    ("qwen2", "fp8", (20, 28)),
    ("qwen3_moe", "fp8", (8, 8)),
    ("qwen3_moe", "auto", (8, 8)),
]


@pytest.mark.parametrize(("family", "name", "block"), CASES)
def test_memory_is_what_the_headers_promised(tmp_path, family, name, block):
    make_checkpoint(tmp_path, text=family, layout="github")
    if block:
        quantize_checkpoint(tmp_path, block)
    promised = memory.weight_bytes(
        Checkpoint.open(tmp_path), "language", torch.bfloat16, choose(tmp_path, name, torch.bfloat16).num_bytes
    )
    model = load(tmp_path, name, torch.bfloat16).model
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(parameter.SCB.nbytes for parameter in model.parameters() if hasattr(parameter, "SCB"))
    assert promised == held


@pytest.mark.parametrize("name", ["bitsandbytes", "fp8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_of_experts_is_refused(tmp_path, family, name):
    """Its linear layers are a small part of it, so that hardly any memory would be saved."""
    make_checkpoint(tmp_path, text=family)
    with pytest.raises(ConfigError, match=rf"^--quantization {name} .* '{family}' are mostly experts: use .* none$"):
        choose(tmp_path, name)


def test_fp8_is_not_quantised_once_more(tmp_path):
    make_checkpoint(tmp_path)
    quantize_checkpoint(tmp_path, (16, 16))
    with pytest.raises(ConfigError, match="this checkpoint's weights are FP8; allowed: auto, none, fp8"):
        choose(tmp_path, "bitsandbytes")


def test_fp8_of_unknown_blocks_is_refused_before_anything_is_read(tmp_path):
    make_checkpoint(tmp_path)
    quantize_checkpoint(tmp_path, (16, 16))
    declare(tmp_path, {"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.*' is FP8, but no quantization_config says"):
        choose(tmp_path, "auto")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.setattr("language_server.quantization.is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^--quantization bitsandbytes needs .*: pip install 'dvd-serve\[bitsandbytes\]'$"
    ):
        choose(tmp_path, "bitsandbytes")


LOAD_IN_A_FRESH_PROCESS = """
import json, pathlib, sys
import torch
from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from language_server.backbone import load_backbone
from language_server.quantization import choose_quantization

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

CPU = torch.device("cpu")

def load(path, name):
    checkpoint, config = Checkpoint.open(path), load_config(path)
    quantization = choose_quantization(name, checkpoint, config, dtype=torch.bfloat16, device=CPU)
    return load_backbone(checkpoint, config, dtype=torch.bfloat16, device=CPU, quantization=quantization)

small, large, name = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
load(small, name)  # libraries take memory when they are first used
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
backbone = load(large, name)
held = sum(parameter.nbytes for parameter in backbone.model.parameters())
print(json.dumps({"held": held, "peak": status("VmHWM") - before}))
"""


def test_loading_takes_the_quantised_weights_and_what_is_staged(tmp_path):
    """98 MiB of linear weights in BF16 never lie in memory. A tiny checkpoint warms up."""
    small, large = tmp_path / "small", tmp_path / "large"
    make_checkpoint(small)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    make_checkpoint(large, dtype=torch.bfloat16, text_config=shape)
    command = [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS, str(small), str(large), "bitsandbytes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, check=True, timeout=100, cwd=root, env=environment, stdout=subprocess.PIPE)
    found = json.loads(result.stdout)
    assert 49 * MEBIBYTE < found["held"] < 54 * MEBIBYTE
    assert 0.95 * found["held"] < found["peak"] < found["held"] + 40 * MEBIBYTE
