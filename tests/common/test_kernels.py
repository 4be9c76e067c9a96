"""What kernels are made of: numbers that round and grow as torch's do, and a compiler that needs no directory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import prange

from common.kernels.compiler import as_array, kernel, share_threads
from common.kernels.numbers import exp, narrow, widen
from common.kernels.softmax import NO_SINKS, NO_WINDOW, softmax_without_division


@kernel
def exp_of(values, out):
    for index in prange(len(values)):
        out[index] = exp(values[index])


@kernel
def rounded(values, out):
    for index in prange(len(values)):
        out[index] = narrow(values[index], out[0])


@kernel
def widened(values, out):
    for index in prange(len(values)):
        out[index] = widen(values[index])


def test_the_exponential_is_one():
    values = np.linspace(-87, 88, 100_000, dtype=np.float32)
    out = np.empty_like(values)
    exp_of(values, out)
    np.testing.assert_allclose(out, np.exp(values.astype(np.float64)), rtol=1e-5)
    near = np.abs(values) < 1
    np.testing.assert_allclose(out[near], np.exp(values[near].astype(np.float64)), rtol=3e-7)
    exp_of(np.array([0, -1e4, -np.inf], np.float32), out)
    assert out[0] == 1 and out[1] < 1e-37 and out[2] < 1e-37


def test_bfloat16_is_rounded_as_torch_rounds():
    values = torch.cat([torch.randn(10_000) * 10.0**e for e in (-30, 0, 30)] + [torch.tensor([0.0, -0.0, 1.00390625])])
    out = torch.empty(len(values), dtype=torch.bfloat16)
    rounded(values.numpy(), as_array(out))
    assert torch.equal(out, values.bfloat16())
    back = np.empty(len(values), np.float32)
    widened(as_array(out), back)
    assert torch.equal(torch.from_numpy(back), out.float())


def test_they_work_where_nothing_can_be_kept(tmp_path):
    """A read-only installation and no home: compiled for this process only."""
    source = tmp_path / "alone.py"
    source.write_text(
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from common.kernels.compiler import kernel\n"
        "from numba import prange\n"
        "@kernel\ndef double(x):\n    for i in prange(len(x)):\n        x[i] *= 2\n"
        "x = np.ones(2)\ndouble(x)\nprint(x.sum())\n"
    )
    shown = subprocess.run([sys.executable, str(source)], capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert shown.stdout == "4.0\n", shown.stderr


@pytest.mark.parametrize("num_rows", [3, 500])
def test_the_softmax_of_scores_far_apart(num_rows):
    scores = torch.linspace(-3e4, 3e4, 200).repeat(num_rows, 1)
    expected = torch.softmax(scores * 0.01, dim=-1)
    inverse_sums = torch.empty(num_rows, 1)
    share_threads(scores.numel())
    arguments = (np.float32(0.01), num_rows, 200, NO_WINDOW, NO_SINKS, inverse_sums.numpy())
    softmax_without_division(as_array(scores), *arguments)
    torch.testing.assert_close(scores * inverse_sums, expected, atol=1e-6, rtol=1e-4)
