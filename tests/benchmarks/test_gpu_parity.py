"""The whole script on a CPU: what it compares on a card, with the backends that are here."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks import gpu_parity, gpu_parity_vision, random_checkpoint
from benchmarks.gpu_parity import LIMITS, main
from benchmarks.random_checkpoint import SHAPES
from benchmarks.vision_subjects import random_tiles
from vision_server.encoder import VisionEncoder, VisionModel


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_parity, "_BATCHES", {"decode": ([1, 1], [3, 90]), "mixed": ([1, 30], [9, 41])})
    monkeypatch.setattr(gpu_parity, "vision_cases", lambda device: [])
    assert main(["--device=cpu", f"--results={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*-gpu_parity.json")
    cases = json.loads(file.read_text())["figures"]
    assert [case["what"].partition(",")[0] for case in cases[-3:]] == ["graphs", "compiled", "fused"]
    assert len(cases) == 2 * 2 * 2 * 2 + 3  # backends, precisions, batches, kinds of call
    assert "OFF" not in capsys.readouterr().out


def test_what_is_off_is_told(monkeypatch, capsys):
    monkeypatch.setattr(gpu_parity, "_BATCHES", {"one": ([1], [9])})
    monkeypatch.setattr(gpu_parity, "model_cases", lambda device: [])
    monkeypatch.setattr(gpu_parity, "vision_cases", lambda device: [])
    assert main(["--device=cpu"]) == 0
    monkeypatch.setitem(LIMITS, torch.bfloat16, 1e-9)
    assert main(["--device=cpu"]) == 1
    assert "OFF" in capsys.readouterr().out


TINY = SHAPES["tiny"]
FLASH, RMS_NORMS = replace(TINY, is_flash=True), replace(TINY, vision=replace(TINY.vision, is_6b=True))


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    """Training one takes longer than all the rest, and features need none."""
    monkeypatch.setattr(random_checkpoint, "_make_tokenizer", cache(random_checkpoint._make_tokenizer))
    monkeypatch.setattr(gpu_parity_vision, "_BATCHES", (1, 3))
    monkeypatch.setattr(gpu_parity_vision, "_MAX_TILES", 2)


def off(cases):
    return [case["what"] for case in cases if not case["error"] <= case["limit"]]


def test_vision(monkeypatch):
    monkeypatch.setattr(gpu_parity_vision, "SHAPES", {"300M": TINY, "Flash": FLASH, "6B": RMS_NORMS})
    cases = list(gpu_parity_vision.vision_cases(torch.device("cpu")))
    assert off(cases) == []
    assert len(cases) == 3 * 8 + 2  # eager, flash attention, two batches, overlap, three in the invariant mode; routes
    assert sum(case["limit"] == 0 for case in cases) == 3 * 4


def test_towers_have_the_width_of_released_ones():
    assert {shape.vision.hidden for shape in gpu_parity_vision.SHAPES.values()} == {1024, 3200}
    assert any(shape.is_flash for shape in gpu_parity_vision.SHAPES.values())


def test_features_that_are_off_are_told(monkeypatch):
    """A little noise in the projector, different each time: neither near what is right, nor the same bits twice."""
    monkeypatch.setattr(gpu_parity_vision, "SHAPES", {"300M": TINY})
    project = VisionModel.project

    def noisy(self, patches, *, compressed=False):
        features = project(self, patches, compressed=compressed)
        return features + 0.2 * torch.randn_like(features)

    monkeypatch.setattr(VisionModel, "project", noisy)
    told = off(gpu_parity_vision.vision_cases(torch.device("cpu")))
    assert {"300M, eager", "300M, two batches under way", "300M, batch-invariant, graphs"} <= set(told)


def test_a_layout_that_flash_attention_does_not_take_is_told(monkeypatch):
    def refuse(*args):
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(VisionEncoder, "launch", refuse)
    encoder = VisionEncoder.__new__(VisionEncoder)
    assert gpu_parity_vision._with_flash_attention(encoder, "features", random_tiles(1, 14)).isnan().all()
