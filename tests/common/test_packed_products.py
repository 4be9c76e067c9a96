"""Packed products are products, with the activation that was asked for, also where nothing can be packed."""

import pytest
import torch
from torch.nn import functional as F

from common.kernels import packed
from common.kernels.packed import PackedProduct, pack

ACTIVATIONS = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def can_pack(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(packed, "pack", lambda weight: None)
    return request.param


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_definition(can_pack, dtype, activation, has_bias):
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((37, 48), (20, 48), (20,)))
    rows, weight, bias = rows.to(dtype), (weight / 7).to(dtype), bias.to(dtype)
    product = PackedProduct(weight, bias if has_bias else None, activation)
    exact = ACTIVATIONS[activation](F.linear(rows.double(), weight.double(), bias.double() if has_bias else None))
    with torch.inference_mode():
        error = (product(rows).double() - exact).abs().max()
    assert error < {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]


def test_a_weight_elsewhere_stays_as_it_is():
    weight = torch.empty(4, 8, device="meta")
    assert pack(weight) is None
    assert PackedProduct(weight, None).weight is weight
