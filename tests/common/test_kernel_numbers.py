"""What kernels are built on: numbers in the order of integers, threads that are torch's, code that is not stale."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numba import prange

from common.kernels import compiler
from common.kernels.compiler import as_array, kernel
from common.kernels.numbers import as_ordered, exp2, from_ordered


@kernel
def largest(values, out):
    for row in prange(len(values)):
        most = as_ordered(values[row, 0])
        for column in range(values.shape[1]):
            most = max(most, as_ordered(values[row, column]))
        out[row] = from_ordered(most)


@kernel
def powers_of_two(values, like, out):
    for index in prange(len(values)):
        out[index] = exp2(values[index], like[0])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-7), (torch.bfloat16, 6e-5)])
def test_powers_of_two_are_as_exact_as_their_type_needs(dtype, limit):
    values = np.linspace(-125, 127, 100_001, dtype=np.float32)
    out = np.empty_like(values)
    powers_of_two(values, as_array(torch.zeros(1, dtype=dtype)), out)
    np.testing.assert_allclose(out, np.exp2(values.astype(np.float64)), rtol=limit)
    powers_of_two(np.array([0, -1e4, -np.inf], np.float32), as_array(torch.zeros(1, dtype=dtype)), out)
    assert out[0] == 1 and out[1] < 1e-37 and out[2] < 1e-37


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_order_numbers(dtype):
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values * 10.0**e for e in (-30, 0, 30)]).to(dtype)
    values = torch.cat([values, torch.tensor([[-0.0, -1.0, -torch.inf], [0.0, 1.0, torch.inf]]).to(dtype)])
    out = np.empty(len(values), np.float32)
    largest(as_array(values), out)
    assert torch.equal(torch.from_numpy(out), values.amax(1).float())


def test_the_first_kernel_leaves_torch_its_threads():
    """In a process of its own, because the first happens once."""
    source = (
        "import torch; torch.set_num_threads(1)\n"
        "from common.kernels.compiler import share_threads\n"
        "print(share_threads(1 << 20), torch.get_num_threads())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env={**os.environ, "NUMBA_NUM_THREADS": "4"}
    )
    assert shown.stdout == "1 1\n", shown.stderr


def test_kept_code_is_stale_when_what_it_is_made_of_changes(monkeypatch):
    monkeypatch.setattr(compiler, "_stamp_of_helpers", lambda: "of another release")
    now, then = stamp_of(kernel(function_of(largest))), stamp_of(largest)
    assert now != then and now[0] == then[0]


def function_of(kernel_: Any) -> Any:
    return kernel_.py_func


def stamp_of(kernel_: Any) -> Any:
    return kernel_._cache._cache_file._source_stamp
