"""Attention of a tile is attention, on the way that a CPU takes in bfloat16 as on the others."""

import pytest
import torch
from torch.nn import functional as F

from vision_server.attention import attend


@pytest.mark.parametrize("num_tokens", [1, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_definition(dtype, num_tokens):
    generator = torch.Generator().manual_seed(0)
    together = torch.randn(2, num_tokens, 3 * 4 * 16, generator=generator).to(dtype)
    heads = [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in together.chunk(3, dim=-1)]
    exact = F.scaled_dot_product_attention(*(part.double() for part in heads)).transpose(1, 2).flatten(2)
    error = (attend(*heads).double() - exact).abs().max()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


def test_in_bfloat16_it_is_as_exact_as_eager_attention():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 257, 64, generator=generator).bfloat16() for _ in range(3))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double()).transpose(1, 2).flatten(2)
    weights = torch.softmax((query @ key.transpose(-1, -2) * 0.125).float(), dim=-1).bfloat16()
    eager = (weights @ value).transpose(1, 2).flatten(2)
    assert (attend(query, key, value) - exact).abs().mean() <= 1.1 * (eager - exact).abs().mean()
