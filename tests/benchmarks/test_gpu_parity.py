"""The whole script on a CPU: what it compares on a card, with the backends that are here."""

import json

import pytest
import torch

from benchmarks import gpu_parity
from benchmarks.gpu_parity import LIMITS, main


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_parity, "_BATCHES", {"decode": ([1, 1], [3, 90]), "mixed": ([1, 30], [9, 41])})
    assert main(["--device=cpu", f"--results={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*-gpu_parity.json")
    cases = json.loads(file.read_text())["figures"]
    assert [case["what"].partition(",")[0] for case in cases[-3:]] == ["graphs", "compiled", "fused"]
    assert len(cases) == 2 * 2 * 2 * 2 + 3  # backends, precisions, batches, kinds of call
    assert "OFF" not in capsys.readouterr().out


def test_what_is_off_is_told(monkeypatch, capsys):
    monkeypatch.setattr(gpu_parity, "_BATCHES", {"one": ([1], [9])})
    monkeypatch.setattr(gpu_parity, "model_cases", lambda device: [])
    assert main(["--device=cpu"]) == 0
    monkeypatch.setitem(LIMITS, torch.bfloat16, 1e-9)
    assert main(["--device=cpu"]) == 1
    assert "OFF" in capsys.readouterr().out
