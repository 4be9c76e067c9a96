"""Layers for GPUs, in Triton's interpreter, compute what transformers' layers compute, and hold weights once."""

import pytest
import torch

from language_server.attention import triton_paged
from language_server.backbone import LanguageBackbone
from language_server.fused import FUSED_MODEL_TYPES
from language_server.fused_cuda import fuse_layers_for_cuda
from tests.language_server import backends  # noqa: F401  mends the interpreter
from tests.language_server.models import paged_logits, reference_logits, tiny_model, unfused

if triton_paged.is_available():
    TOKEN_IDS = torch.arange(20, 45)

    def logits(built):
        return paged_logits(LanguageBackbone(built), TOKEN_IDS)

    @pytest.mark.parametrize("family", sorted(FUSED_MODEL_TYPES))
    def test_fused_layers_compute_what_transformers_computes(family):
        model, _ = tiny_model(family)
        built = unfused(model)
        fuse_layers_for_cuda(built)
        expected = reference_logits(model, TOKEN_IDS)
        assert (logits(built) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not any("layers" in name and "proj" in name for name, _ in built.named_parameters())

    @pytest.mark.parametrize("family", sorted(FUSED_MODEL_TYPES))
    def test_in_bfloat16_they_round_no_worse_than_transformers(family):
        model, _ = tiny_model(family)
        built = unfused(model, torch.bfloat16)
        expected = reference_logits(model, TOKEN_IDS)
        before = (logits(built) - expected).abs().mean()
        fuse_layers_for_cuda(built)
        assert (logits(built) - expected).abs().mean() <= 1.2 * before
