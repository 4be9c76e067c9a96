"""What torch's block-scaled product is given: it runs on a GPU only, so a plain one that is as strict stands for it."""

import pytest
import torch
from torch.nn import functional as F

from common.model import fp8
from language_server.fp8_linear import BLOCK, Fp8Linear, can_multiply

SHAPES = [(1, 128, 128), (3, 896, 256), (4, 512, 384), (17, 1024, 128)]


def strict_scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, output_dtype):
    """Refuses what torch and cuBLAS refuse on compute capability 9.0. a [M, K], b [K, N]."""
    (num_rows, width_in), width_out = a.shape, b.shape[1]
    num_blocks = width_in // 128
    assert (recipe_a, recipe_b) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.t().is_contiguous()
    assert num_rows % 4 == width_in % 128 == width_out % 128 == 0
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.shape == (num_rows, num_blocks)
    assert scale_b.shape == ((num_blocks + 3) // 4 * 4, width_out // 128)
    for scale in (scale_a, scale_b):
        assert scale.stride(0) == 1 and (scale.stride(1) == scale.shape[0] or scale.shape[1] == 1)
    rows = a.float() * scale_a.repeat_interleave(128, 1)
    weight = b.t().float() * scale_b.t()[:, :num_blocks].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (rows @ weight.t()).to(output_dtype)


def make_layer(width_in, width_out, *, multiplies, bias=True):
    """Block after block another magnitude, so that no two scales are alike."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(width_in, width_out, bias).requires_grad_(False)
    if bias:
        linear.bias.copy_(torch.arange(width_out))
    layer = Fp8Linear(linear, BLOCK, multiplies)
    shape = fp8.scale_shape(width_out, width_in, BLOCK)
    magnitudes = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
    weight = torch.randn(width_out, width_in, generator=generator)
    weight *= magnitudes.repeat_interleave(128, 0).repeat_interleave(128, 1)[:width_out, :width_in]
    values, scales = fp8.quantize(weight, BLOCK)
    layer.weight.copy_(values)
    layer.weight_scale_inv.copy_(scales)
    return layer


@pytest.mark.parametrize(("num_rows", "width_in", "width_out"), SHAPES)
def test_a_product_of_fp8_is_that_of_the_dequantised_weight(monkeypatch, num_rows, width_in, width_out):
    """Rows whose groups differ in magnitude, rounded as FP8 rounds them: to 1/16 at most."""
    monkeypatch.setattr(F, "scaled_mm", strict_scaled_mm, raising=False)
    rows = torch.randn(1, num_rows, width_in, generator=torch.Generator().manual_seed(1))
    rows *= torch.arange(1.0, 1 + width_in // 128).repeat_interleave(128)
    found = make_layer(width_in, width_out, multiplies=True)(rows)
    expected = make_layer(width_in, width_out, multiplies=False)(rows)
    assert found.shape == expected.shape == (1, num_rows, width_out)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_rows_of_zeros_stay_numbers(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", strict_scaled_mm, raising=False)
    assert not make_layer(256, 128, multiplies=True, bias=False)(torch.zeros(2, 256)).any()


@pytest.mark.parametrize(("width_in", "width_out"), [(100, 128), (128, 100)])
def test_edges_are_dequantised_everywhere(width_in, width_out):
    """cuBLAS takes whole blocks only."""
    layer = make_layer(width_in, width_out, multiplies=True)
    assert not layer.can_multiply and layer(torch.ones(2, width_in)).shape == (2, width_out)


def test_a_cpu_does_not_multiply_fp8():
    assert not can_multiply(torch.device("cpu"), torch.bfloat16)
