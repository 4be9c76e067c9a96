"""A checkpoint that no server can tell from a released one, except by its answers."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.random_checkpoint import SHAPES, tensors, write_checkpoint
from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from language_server.backbone import load_backbone
from vision_server.encoder import VisionEncoder


@pytest.mark.parametrize(
    "name, vision, projector, language",  # INTERNVL.md sections 3.2 and 3.3
    [
        ("1B", 304_012_288, 5.25e6, 0.7516e9),
        ("8B", 304_012_288, 33.57e6, 8.1907e9),
        ("14B", 304_012_288, 47.20e6, 14.7683e9),
        ("38B", 5_536_496_000, 91.79e6, 32.7621e9),
    ],
)
def test_a_shape_has_as_many_parameters_as_the_released_model(name, vision, projector, language):
    sums = {"vision_model": 0, "mlp1": 0, "language_model": 0}
    for tensor, shape in tensors(SHAPES[name]):
        sums[tensor.partition(".")[0]] += math.prod(shape)
    assert sums["vision_model"] == vision
    assert [sums["mlp1"], sums["language_model"]] == pytest.approx([projector, language], rel=2e-3)


def test_a_flash_shape_has_what_the_released_model_has_beside_the_base(tmp_path):
    """INTERNVL.md section 2.7; what is loaded of it scores and projects tiles."""
    sums = dict.fromkeys(("mlp2", "pooling_before_gating", "gating"), 0)
    base = {name for name, _ in tensors(SHAPES["8B"])}
    for tensor, shape in tensors(SHAPES["8B-Flash"]):
        if tensor not in base:
            sums[tensor.partition(".")[0]] += math.prod(shape)
    assert list(sums.values()) == pytest.approx([235.0e6, 16.80e6, 33.59e6], rel=2e-3)
    tiny = SHAPES["tiny"]
    write_checkpoint(tmp_path, replace(tiny, is_flash=True))
    encoder = VisionEncoder(load_config(tmp_path), "cpu", "float32")
    encoder.load(tmp_path)
    encoder.warm_up()


def test_both_sides_load_it_and_compute_numbers(tmp_path):
    path = tmp_path / "tiny"
    write_checkpoint(path, SHAPES["tiny"])
    config, checkpoint = load_config(path), Checkpoint.open(path)
    assert config.system_message == ""
    encoder = VisionEncoder(config, "cpu", "float32")
    encoder.load(path)
    encoder.warm_up()
    load_backbone(checkpoint, config, dtype=torch.float32, device=torch.device("cpu"))
    assert set(checkpoint.entries) == {name for name, _ in tensors(SHAPES["tiny"])}


def test_a_checkpoint_that_is_complete_is_not_written_again(tmp_path):
    write_checkpoint(tmp_path, SHAPES["tiny"])
    (tmp_path / "config.json").write_text("{}")
    write_checkpoint(tmp_path, SHAPES["tiny"])
    assert (tmp_path / "config.json").read_text() == "{}"
