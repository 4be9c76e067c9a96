"""Kernels compute what torch computes, in both of the types a model may have."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.kernels.compiler import as_array, share_threads
from language_server.kernels import layers

DTYPES = [torch.float32, torch.bfloat16]
EPS = np.float32(1e-6)
ROWS = [1, 5, 700]  # 700: more than one thread takes part


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """``actual`` is ``exact`` (float64) rounded to its type, give or take one unit in the last place."""
    relative = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[actual.dtype]
    torch.testing.assert_close(actual.double(), exact, rtol=relative, atol=1e-6)


def norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return rows * (rows.square().mean(-1, keepdim=True) + float(EPS)).rsqrt() * weight.double()


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, num_rows):
    hidden, weight = torch.randn(num_rows, 100).to(dtype), torch.rand(100).to(dtype)
    out = torch.empty_like(hidden)
    share_threads(hidden.numel())
    layers.rms_norm(as_array(hidden), as_array(weight), EPS, as_array(out))
    assert_rounded(out, norm(hidden, weight))


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype, num_rows):
    hidden, delta, weight = (torch.randn(*shape).to(dtype) for shape in ((num_rows, 100), (num_rows, 100), (100,)))
    total, out = hidden + delta, torch.empty_like(hidden)
    share_threads(hidden.numel())
    layers.add_rms_norm(as_array(hidden), as_array(delta), as_array(weight), EPS, as_array(out))
    assert torch.equal(hidden, total)
    assert_rounded(out, norm(total, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_multiply(dtype):
    gate_up = torch.cat([torch.linspace(-200, 200, 1000), torch.randn(1000)]).repeat(3, 1).to(dtype)
    out = gate_up.new_empty(3, 1000)
    layers.silu_and_multiply(as_array(gate_up), as_array(out))
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_rounded(out, F.silu(gate) * up)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_and_cache(dtype, has_norm):
    num_heads, num_kv_heads, head_dim, slots = 4, 2, 16, torch.tensor([7, 0, 4])
    heads = torch.randn(3, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    weights = torch.rand(num_heads + num_kv_heads, head_dim).to(dtype)
    cos, sin = (torch.randn(3, head_dim).to(dtype) for _ in range(2))
    keys, values = (torch.zeros(9, num_kv_heads, head_dim, dtype=dtype) for _ in range(2))

    rotated = heads[:, :-num_kv_heads].double()
    rotated = norm(rotated, weights) if has_norm else rotated
    swapped = torch.cat([-rotated[..., head_dim // 2 :], rotated[..., : head_dim // 2]], dim=-1)
    expected = rotated * cos.double().unsqueeze(1) + swapped * sin.double().unsqueeze(1)

    qkv = heads.flatten(1).clone()
    signed_sin = torch.cat([-sin[:, : head_dim // 2], sin[:, head_dim // 2 :]], dim=-1)
    arrays = [as_array(tensor) for tensor in (cos, signed_sin, slots, keys, values)]
    layers.rotate_and_cache(as_array(qkv), as_array(weights if has_norm else weights[:0]), EPS, *arrays)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    queries = qkv.view(heads.shape)[:, :num_heads]
    torch.testing.assert_close(queries.double(), expected[:, :num_heads], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(keys[slots].double(), expected[:, num_heads:], atol=tolerance, rtol=tolerance)
    assert torch.equal(values[slots], heads[:, -num_kv_heads:])
    assert keys.count_nonzero() == values.count_nonzero() == 3 * num_kv_heads * head_dim
