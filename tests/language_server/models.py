"""Tiny language models of every family: the transformers module as reference, and our backbone with its weights."""

from functools import lru_cache

import torch

from language_server import backbone
from language_server.attention import choose_backend
from language_server.attention.base import BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.backbone import build_model
from tests import checkpoints

# Tiny matrices: a second thread only waits for the first, and on a busy machine it waits for whole time slices.
torch.set_num_threads(1)

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3")


@lru_cache(maxsize=len(FAMILIES))
def tiny_model(family):
    """(InternVLForConditionalGeneration, LanguageBackbone), float32, the same weights."""
    vision = checkpoints.VisionShape(16, 1, 1, 16, "300m", image_size=28)
    config = checkpoints._make_config(vision, family, checkpoints.make_tokenizer(), 512, False, {})
    model = checkpoints._make_model(config, seed=0, dtype=torch.float32)
    return model, make_backbone(model)


def make_backbone(model, dtype=torch.float32):
    return backbone.make_backbone(unfused(model, dtype))


def unfused(model, dtype=torch.float32):
    """A filled ``*ForCausalLM`` with transformers' own layers."""
    text = model.config.text_config.to_dict()
    built = build_model(text, tie_word_embeddings=False, dtype=dtype, device=torch.device("cpu"))
    source = {name.replace("model.language_model.", "model."): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(source[name])
    return built


def reference_logits(model, token_ids):
    """[num_tokens, vocab_size] of the undivided model with eager attention."""
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        return model(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0]


def paged_logits(language_backbone, token_ids):
    """[num_tokens, vocab_size] of one prompt in one step."""
    num_tokens = len(token_ids)
    layout = BatchLayout([num_tokens], [num_tokens], torch.arange(num_tokens), torch.arange(8).unsqueeze(0), 16)
    cache = KVCache(language_backbone.kv_shape, 8, 16, language_backbone.device)
    with torch.inference_mode():
        context = ForwardContext.of(layout, cache, choose_backend(language_backbone.device))
        return language_backbone.logits(language_backbone.forward(language_backbone.embed(token_ids), context))
