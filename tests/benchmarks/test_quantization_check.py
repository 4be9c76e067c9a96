"""The whole check on the smallest shape, and that it can fail: what it does on a card it does here."""

import json

import pytest
import torch

from benchmarks import quantization
from benchmarks.quantization import Finding, main, measure_layers, too_far
from common.model import fp8
from language_server.fp8_linear import Fp8Linear


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantization, "_DECODE_TOKENS", 2)
    monkeypatch.setattr(quantization, "_PREFILL_TOKENS", 16)
    assert main(["--shape=tiny", "--device=cpu", f"--results={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*-quantization-tiny-bfloat16.json")
    figures = json.loads(file.read_text())["figures"]
    assert [each["quantization"] for each in figures["models"]] == [
        "none",
        "bitsandbytes",
        "fp8 (weights only)",
        "none (FP8 dequantised)",
        "none (FP8 dequantised)",
        "fp8 (weights only)",
    ]
    plain, int8 = figures["models"][:2]
    assert plain["deviation"] == 0 < int8["deviation"] and int8["weight_bytes"] < plain["weight_bytes"]
    assert "FP8 is multiplied as it is on cpu: False" in capsys.readouterr().out


def test_scales_that_are_mixed_up_are_found(monkeypatch):
    forward = Fp8Linear.forward

    def with_wrong_scales(layer, rows):
        scales = layer.weight_scale_inv.clone()
        layer.weight_scale_inv.copy_(scales.flatten().roll(1).view_as(scales))
        product = forward(layer, rows)
        layer.weight_scale_inv.copy_(scales)
        return product

    monkeypatch.setattr(Fp8Linear, "forward", with_wrong_scales)
    deviations = [each.deviation for each in measure_layers(torch.device("cpu"), torch.bfloat16)]
    assert all(deviation > quantization.LAYER_LIMIT for deviation in deviations[1:])  # the first has one block only


def test_what_is_too_far_off_is_told():
    layer, model = Finding("layer", "fp8", 0.1), Finding("model", "fp8", 0.1)
    assert too_far([layer], [model]) == ["too far off: layer (fp8): 0.1000"]
    assert too_far([], [Finding("model", "bitsandbytes", float("nan"))]) == ["too far off: model (bitsandbytes): nan"]


@pytest.mark.parametrize("shape", [(128, 128), (100, 300)])
def test_factors_differ_from_block_to_block_only(shape):
    factors = quantization._factors(shape, (64, 64), torch.Generator().manual_seed(0))
    assert factors.shape == shape
    assert len(factors.unique()) == torch.Size(fp8.scale_shape(shape[0], shape[1], (64, 64))).numel()
