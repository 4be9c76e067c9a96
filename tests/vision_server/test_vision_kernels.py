"""Kernels of the tower compute what torch computes, rounded once."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.kernels.compiler import as_array, share_threads
from vision_server import kernels
from vision_server.cpu_tower import Norm, PatchProduct

EPS = 1e-6
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Relative: a bfloat16 that was rounded once is off by 2**-9 of itself at most."""


@pytest.fixture(params=LIMITS, ids=str)
def dtype(request):
    return request.param


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_norm(size: int, is_centred: bool, dtype: torch.dtype) -> nn.Module:
    norm = (nn.LayerNorm if is_centred else nn.RMSNorm)(size, eps=EPS)
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data = draw(size, dtype=torch.float32, seed=seed + 10)
    return norm.to(dtype).requires_grad_(False)


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=LIMITS[found.dtype], atol=1e-5)


@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (300, 96)])
def test_norms(dtype, shape, is_centred):
    hidden = draw(*shape, dtype=dtype) * 3 + 5  # a mean that differs from zero
    norm = make_norm(shape[1], is_centred, dtype)
    exact = norm.double()(hidden.double())
    assert_rounded_once(Norm(norm.to(dtype))(hidden), exact)


def test_a_norm_of_some_columns_in_place(dtype):
    rows = draw(70, 3 * 32, dtype=dtype)
    norm = make_norm(32, False, dtype)
    exact = norm.double()(rows[:, 32:64].double())
    before = rows.clone()
    Norm(norm.to(dtype)).in_place(rows, 32)
    assert_rounded_once(rows[:, 32:64], exact)
    assert torch.equal(rows[:, :32], before[:, :32]) and torch.equal(rows[:, 64:], before[:, 64:])


@pytest.mark.parametrize("is_centred", [True, False])
def test_a_residual_behind_layer_scale_and_the_norm_of_the_sum(dtype, is_centred):
    hidden, delta, scale = draw(300, 96, dtype=dtype), draw(300, 96, dtype=dtype, seed=1), draw(96, dtype=dtype, seed=2)
    norm = make_norm(96, is_centred, dtype)
    exact_sum = hidden.double() + delta.double() * scale.double()
    alone = hidden.clone()
    share_threads(alone.numel())
    kernels.add_scaled(as_array(alone), as_array(delta), as_array(scale))
    normed = Norm(norm).after_adding(hidden, delta, as_array(scale))
    assert torch.equal(hidden, alone)
    assert_rounded_once(hidden, exact_sum)
    assert_rounded_once(normed, norm.double()(hidden.double()))


def test_scaled_rows_are_put_into_their_columns(dtype):
    rows, out = draw(65, 16, dtype=dtype), torch.zeros(65, 64, dtype=dtype)
    scale = np.linspace(0.5, 2, 65, dtype=np.float32)[:, None]
    kernels.put_scaled(as_array(rows), scale, 16, as_array(out))
    assert_rounded_once(out[:, 16:32], rows.double() * torch.from_numpy(scale).double())
    assert not out[:, :16].any() and not out[:, 32:].any()


@pytest.mark.parametrize("side", [2, 14])
def test_the_patch_embedding_is_a_convolution(dtype, side):
    pixels = draw(2, 3, 6 * side, 4 * side, dtype=dtype)
    convolution = nn.Conv2d(3, 24, kernel_size=side, stride=side).to(dtype).requires_grad_(False)
    assert convolution.bias is not None
    weight, bias = convolution.weight.double(), convolution.bias.double()
    exact = F.conv2d(pixels.double(), weight, bias, stride=side).flatten(2).transpose(1, 2)
    with torch.inference_mode():
        found = PatchProduct(convolution)(pixels)
    torch.testing.assert_close(found.double(), exact, rtol=LIMITS[dtype], atol={torch.float32: 1e-5}.get(dtype, 2e-2))
