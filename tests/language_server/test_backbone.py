"""From a checkpoint to a model that computes what transformers computes, with the weights in memory once."""

import pytest
import torch
from transformers import Qwen3ForCausalLM

from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from common.service.errors import CheckpointError
from language_server.backbone import build_model, load_backbone
from tests.checkpoints import make_checkpoint
from tests.language_server.models import FAMILIES, paged_logits, reference_logits, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen2", "hf"), ("qwen3_moe", "github"), ("gpt_oss", "github"), ("internlm3", "github")]
)
def test_a_loaded_checkpoint_computes_what_it_should(tmp_path, family, layout):
    checkpoint = make_checkpoint(tmp_path, text=family, layout=layout, shards=2)
    seen = []
    backbone = load_backbone(
        Checkpoint.open(tmp_path),
        load_config(tmp_path),
        dtype=torch.float32,
        device=CPU,
        progress=lambda done, total: seen.append((done, total)),
    )
    token_ids = torch.arange(20, 100)
    expected = reference_logits(checkpoint.reference(), token_ids)
    assert (paged_logits(backbone, token_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert seen[-1][0] == seen[-1][1] > 0


def test_tied_embeddings_are_held_once(tmp_path):
    checkpoint = make_checkpoint(tmp_path, tie_word_embeddings=True)
    backbone = load_backbone(Checkpoint.open(tmp_path), load_config(tmp_path), dtype=torch.float32, device=CPU)
    assert backbone.model.lm_head.weight is backbone.model.model.embed_tokens.weight
    token_ids = torch.arange(20, 60)
    expected = reference_logits(checkpoint.reference(), token_ids)
    assert (paged_logits(backbone, token_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_on_meta_and_computed_buffers_are_right(family):
    model, _ = tiny_model(family)
    built = build_model(model.config.text_config.to_dict(), False, dtype=torch.float32, device=CPU)
    expected = dict(model.model.language_model.named_buffers())
    actual = {name.removeprefix("model."): buffer for name, buffer in built.named_buffers()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in built.parameters())


def test_bfloat16_weights_keep_rotary_frequencies_in_float32():
    model, _ = tiny_model("qwen3")
    built = build_model(model.config.text_config.to_dict(), False, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert dict(built.named_buffers())["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_how_somebody_once_ran_the_model_is_ignored():
    """Published text configs carry run-time keys; transformers would act on them, or fail."""
    model, _ = tiny_model("qwen3")
    once = {
        "_attn_implementation_autoset": True,
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"},
        "quantization_config": {"quant_method": "mxfp4"},
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bad_words_ids": None,
        "pruned_heads": {},
    }
    built = build_model(model.config.text_config.to_dict() | once, False, dtype=torch.float32, device=CPU)
    assert isinstance(built, Qwen3ForCausalLM)
    assert built.config._attn_implementation == "dvd_paged"
    assert built.dtype == torch.float32


def test_an_unknown_text_model_is_refused():
    with pytest.raises(CheckpointError, match="'mamba' is not supported"):
        build_model({"model_type": "mamba"}, False, dtype=torch.float32, device=CPU)


def test_a_text_config_that_transformers_refuses_is_told():
    model, _ = tiny_model("internlm3")
    text = model.config.text_config.to_dict() | {"num_attention_heads": 5}
    with pytest.raises(CheckpointError, match=r"transformers refuses text config 'internlm3': .*multiple"):
        build_model(text, False, dtype=torch.float32, device=CPU)
