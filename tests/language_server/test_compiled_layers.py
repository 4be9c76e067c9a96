"""Layers that the compiler traces whole compute what they did, and layers that look alike are compiled once."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from common.service.errors import ConfigError
from language_server.attention.base import BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.attention.sdpa import SdpaBackend
from language_server.backbone import LanguageBackbone
from language_server.compiled_layers import compile_layers
from tests.language_server.models import FAMILIES, reference_logits, tiny_model, unfused

BLOCK, NUM_BLOCKS = 4, 12
WINDOWS = {"gpt_oss": 2}  # with a window and without: two kinds of layer


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_equal_transformers(family):
    """A first token, a prompt, and tokens one by one. ``fullgraph`` fails where a layer does not trace in one piece."""
    model, _ = tiny_model(family)
    backbone = LanguageBackbone(unfused(model))
    cache = KVCache(backbone.kv_shape, NUM_BLOCKS, BLOCK, backbone.device)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(math.nan)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(backbone.model, cache, counter)
    token_ids = torch.randint(0, 400, (45,), generator=torch.Generator().manual_seed(1))
    logits = [run(backbone, cache, token_ids, *part) for part in ((0, 1), (1, 33), (33, 43), (43, 44), (44, 45))]
    expected = reference_logits(model, token_ids)
    assert (torch.cat(logits) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert num_compiled(counter) == 2 * WINDOWS.get(family, 1)  # for one token, and for several


def num_compiled(counter):
    """Graphs without inputs are the compiler's own."""
    return sum(any(node.op == "placeholder" for node in graph.graph.nodes) for graph in counter.graphs)


@torch.inference_mode()
def run(backbone, cache, token_ids, start, end):
    layout = BatchLayout([end - start], [end], torch.arange(start, end), torch.arange(NUM_BLOCKS).unsqueeze(0), BLOCK)
    context = ForwardContext.of(layout, cache, SdpaBackend())
    return backbone.logits(backbone.forward(backbone.embed(token_ids[start:end]), context))


def test_fused_layers_are_not_compiled():
    _, backbone = tiny_model("qwen3")
    with pytest.raises(ConfigError, match="fused already"):
        compile_layers(backbone.model, KVCache(backbone.kv_shape, 1, BLOCK, backbone.device))
