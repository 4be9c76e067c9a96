"""Layers that the compiler traces whole compute what they did, and are compiled once for all."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from common.model.config import load_config
from common.service.errors import ConfigError
from tests.checkpoints import VISION_6B, VISION_300M, make_checkpoint
from vision_server.compiled_tower import compile_tower
from vision_server.encoder import VisionEncoder
from vision_server.internvit import InternViT


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [VISION_300M, VISION_6B])
def test_a_compiled_tower_equals_itself(tmp_path, shape):
    """``fullgraph`` fails where a layer does not trace in one piece."""
    tower = InternViT(load_config(make_checkpoint(tmp_path, vision=shape).path).vision)
    generator = torch.Generator().manual_seed(1)
    for parameter in tower.requires_grad_(False).parameters():
        parameter.normal_(0, 0.05, generator=generator)
    batches = [torch.randn(num_tiles, 3, 448, 448, generator=generator) for num_tiles in (1, 2, 3)]
    counter = CompileCounterWithBackend("aot_eager")
    with torch.inference_mode():
        expected = [tower(pixels) for pixels in batches]
        compile_tower(tower, counter)
        found = [tower(pixels) for pixels in batches]
    for states, right in zip(found, expected, strict=True):
        torch.testing.assert_close(states, right, atol=1e-5, rtol=1e-5)
    # Graphs without inputs are the compiler's own.
    assert sum(any(node.op == "placeholder" for node in graph.graph.nodes) for graph in counter.graphs) == 2


def test_a_cpu_has_nothing_to_compile(checkpoint):
    with pytest.raises(ConfigError, match="fused already"):
        VisionEncoder(load_config(checkpoint.path), "cpu", compile_layers=True)
