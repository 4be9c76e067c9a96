"""Fused layers compute what transformers' layers compute, for every family that has them, and hold weights once."""

import pytest
import torch

from language_server import fused, packed_linear
from language_server.backbone import LanguageBackbone
from language_server.packed_linear import PackedLinear
from tests.language_server.models import paged_logits, reference_logits, tiny_model, unfused

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("family", sorted(fused.FUSED_MODEL_TYPES))
def test_fused_layers_compute_what_transformers_computes(family, is_packed, monkeypatch):
    if not is_packed:
        monkeypatch.setattr(packed_linear, "pack", lambda weight: None)
    model, _ = tiny_model(family)
    built = unfused(model)
    assert fused.can_fuse(built.config)
    fused.fuse_layers(built)
    token_ids = torch.arange(20, 100)
    expected = reference_logits(model, token_ids)
    actual = paged_logits(LanguageBackbone(built), token_ids)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", sorted(fused.FUSED_MODEL_TYPES))
def test_in_bfloat16_they_round_no_worse_than_transformers(family):
    model, _ = tiny_model(family)
    built = unfused(model, torch.bfloat16)
    token_ids = torch.arange(20, 100)
    expected = reference_logits(model, token_ids)
    before = (paged_logits(LanguageBackbone(built), token_ids) - expected).abs().mean()
    fused.fuse_layers(built)
    after = (paged_logits(LanguageBackbone(built), token_ids) - expected).abs().mean()
    assert after <= 1.2 * before


def test_the_weights_of_a_layer_are_held_once():
    model, _ = tiny_model("qwen2")
    built = unfused(model)
    fused.fuse_layers(built)
    assert not any("layers" in name and "proj" in name for name, _ in built.named_parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_other_families_keep_their_layers(family):
    model, _ = tiny_model(family)
    assert not fused.can_fuse(model.config.text_config)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
def test_a_packed_product_is_the_product(num_rows, bias):
    linear = torch.nn.Linear(96, 40, bias=bias)
    packed = PackedLinear(linear.weight.data, linear.bias.data if bias else None)
    rows = torch.randn(num_rows, 192)[:, ::2] if num_rows > 1 else torch.randn(num_rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows), linear(rows), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_multiplied_plainly(monkeypatch):
    def refuse(*_):
        raise RuntimeError("this processor cannot")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    weight = torch.randn(4, 8)
    packed = PackedLinear(weight, None)
    assert not packed.is_packed
    rows = torch.randn(3, 8)
    torch.testing.assert_close(packed(rows), rows @ weight.T)
