"""Random-weight InternVL checkpoints in every layout, with the undivided transformers model as reference.

    checkpoint = make_checkpoint(tmp_path, layout="github", vision=VISION_6B, text="qwen3_moe", shards=3)
    checkpoint.path          # a folder any server can be started with
    checkpoint.reference()   # InternVLForConditionalGeneration in FP32 with the same weights

Weights are drawn so that every parameter matters: residual branches are as large as the residual stream, layer
scales are near one and logits are spread, so that greedy tokens vary and a wrong weight changes them.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GptOssConfig,
    InternLM3Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.flash import ABSOLUTE_THRESHOLD, RELATIVE_THRESHOLD, FlashModules

Role = Literal["vision", "language"]
Layout = Literal["hf", "hf_legacy", "github"]
TextFamily = Literal["qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3"]

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
_UNUSED_IDS = 16
"""Ids above the tokenizer's last one, as the released checkpoints have them."""
_CORPUS = (
    "the image shows a red square and two blue circles on a white table",
    "what number is written in the picture? the number is 1234",
    "describe the difference between the first image and the second image",
    "how many shapes are there? there are three triangles and one star",
    "你好，请描述这张图片。 これは何ですか",
    "def main() -> None: return {'answer': 42}",
)


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A small InternViT; ``style`` picks norms and biases as the 300M and the 6B encoder have them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    style: Literal["300m", "6b"]
    image_size: int = 448
    patch_size: int = 14


VISION_300M = VisionShape(48, 2, 3, 96, "300m")
VISION_6B = VisionShape(40, 2, 5, 80, "6b")

_FLASH_CONFIG = {
    "flash_mode": True,
    "flash_relative_threshold": RELATIVE_THRESHOLD,
    "flash_absolute_threshold": ABSOLUTE_THRESHOLD,
}


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """A checkpoint folder and the model it was written from."""

    path: Path
    layout: Layout
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerFast
    model: InternVLForConditionalGeneration
    flash: FlashModules | None = None

    def reference(self) -> InternVLForConditionalGeneration:
        """The undivided model: FP32, evaluation mode, holding exactly the values that are on disk."""
        return self.model

    def parameters(self, role: Role) -> dict[str, torch.Tensor]:
        """The reference's parameters in FP32 under the canonical names that ``load_role`` fills."""
        return _vision_parameters(self.model) if role == "vision" else _language_parameters(self.model)


def make_checkpoint(
    path: Path,
    *,
    layout: Layout = "hf",
    vision: VisionShape = VISION_300M,
    text: TextFamily = "qwen3",
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
    vocab_size: int = 512,
    tie_word_embeddings: bool = False,
    max_tiles: int = 12,
    flash: bool = False,
    github_config: Mapping[str, Any] | None = None,
    text_config: Mapping[str, Any] | None = None,
) -> RandomCheckpoint:
    """Write a random checkpoint into ``path``.

    Args:
        path: folder to fill; created if missing.
        dtype: of the tensors on disk; the reference holds the same values in FP32.
        shards: number of safetensors files; one file is written without an index.
        vocab_size: of the language model; the tokenizer has some ids fewer.
        flash: with the resolution router and its projector: GitHub layout only, and a width that 16 heads can share.
        github_config: top-level keys to add to or replace in a GitHub ``config.json``.
        text_config: arguments to add to or replace in the text config.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocab_size - _UNUSED_IDS, eos_token="<|return|>" if text == "gpt_oss" else "<|im_end|>")
    config = _make_config(vision, text, tokenizer, vocab_size, tie_word_embeddings, dict(text_config or {}))
    model = _make_model(config, seed, dtype)
    extra = FlashModules(vision.hidden_size, config.text_config.hidden_size, seed).to(dtype) if flash else None

    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if tie_word_embeddings:
        del tensors["lm_head.weight"]
    if layout != "hf":
        tensors = _split_experts(tensors) if text == "qwen3_moe" else tensors
        rename = _legacy_name if layout == "hf_legacy" else _github_name
        tensors = {rename(name): tensor for name, tensor in tensors.items()}
    if layout == "github":
        tensors = _fuse_qkv(tensors)
        tensors |= extra.state_dict() if extra is not None else {}
        keys = (_FLASH_CONFIG if flash else {}) | dict(github_config or {})
        _write_json(path / "config.json", _github_config(config, max_tiles) | keys)
    else:
        config.architectures = ["InternVLForConditionalGeneration"]
        config.save_pretrained(path)
    write_shards(path, tensors, shards)
    _write_companions(path, layout, tokenizer, max_tiles)
    return RandomCheckpoint(path, layout, dtype, tokenizer, model, extra.float() if extra is not None else None)


@lru_cache(maxsize=8)
def make_tokenizer(vocab_size: int = 496, eos_token: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with InternVL's special tokens, trained on a few sentences. At most vocab_size ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_shards(path: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """Deal the tensors out to ``shards`` files in turn, so that every shard holds tensors of both roles."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(
        path / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


def _language_parameters(model: InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    named = {f"model.{name}": parameter for name, parameter in model.model.language_model.named_parameters()}
    return named | {"lm_head.weight": model.lm_head.weight}


def _vision_parameters(model: InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Module by module, so that a test of the name tables does not rest on another name table."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    named = {
        "vision_model.embeddings.class_embedding": tower.embeddings.cls_token,
        "vision_model.embeddings.position_embedding": tower.embeddings.position_embeddings,
    }
    modules = {
        "vision_model.embeddings.patch_embedding": tower.embeddings.patch_embeddings.projection,
        "mlp1.0": projector.layer_norm,
        "mlp1.1": projector.linear_1,
        "mlp1.3": projector.linear_2,
    }
    for index, layer in enumerate(tower.encoder.layer):
        prefix = f"vision_model.encoder.layers.{index}"
        attention = layer.attention
        named |= {f"{prefix}.ls1": layer.lambda_1, f"{prefix}.ls2": layer.lambda_2}
        for kind in ("weight", "bias") if attention.q_proj.bias is not None else ("weight",):
            parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            named[f"{prefix}.attn.qkv.{kind}"] = torch.cat(parts)
        modules |= {
            f"{prefix}.attn.q_norm": attention.q_norm,
            f"{prefix}.attn.k_norm": attention.k_norm,
            f"{prefix}.attn.proj": attention.projection_layer,
            f"{prefix}.norm1": layer.layernorm_before,
            f"{prefix}.norm2": layer.layernorm_after,
            f"{prefix}.mlp.fc1": layer.mlp.fc1,
            f"{prefix}.mlp.fc2": layer.mlp.fc2,
        }
    for prefix, module in modules.items():
        named |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    return named


def _make_config(
    vision: VisionShape,
    family: TextFamily,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    tied: bool,
    overrides: dict[str, Any],
) -> InternVLConfig:
    is_6b = vision.style == "6b"
    vision_config = InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        intermediate_size=vision.intermediate_size,
        image_size=[vision.image_size, vision.image_size],
        patch_size=[vision.patch_size, vision.patch_size],
        norm_type="rms_norm" if is_6b else "layer_norm",
        attention_bias=not is_6b,
        use_qk_norm=is_6b,
        layer_scale_init_value=1.0,
    )
    shared = {
        "vocab_size": vocab_size,
        "num_hidden_layers": 2,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return InternVLConfig(
        vision_config=vision_config,
        text_config=_TEXT_CONFIGS[family](**(shared | overrides)),
        image_seq_length=(vision.image_size // vision.patch_size // 2) ** 2,
        downsample_ratio=0.5,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=tied,
    )


def _qwen2(**values: Any) -> Qwen2Config:
    shape = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 96}
    return Qwen2Config(**(shape | {"max_position_embeddings": 16384} | values))


def _qwen3(**values: Any) -> Qwen3Config:
    shape = {"hidden_size": 56, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 96}
    return Qwen3Config(**(shape | {"head_dim": 16, "max_position_embeddings": 16384} | values))


def _qwen3_moe(**values: Any) -> Qwen3MoeConfig:
    shape = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 64}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return Qwen3MoeConfig(**(shape | experts | {"head_dim": 16, "max_position_embeddings": 16384} | values))


def _gpt_oss(**values: Any) -> GptOssConfig:
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 24}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssConfig(**(shape | experts | {"head_dim": 16, "sliding_window": 32} | values))


def _internlm3(**values: Any) -> InternLM3Config:
    shape = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
    return InternLM3Config(**(shape | {"head_dim": 16, "qkv_bias": True, "bias": True} | values))


_TEXT_CONFIGS: dict[TextFamily, Callable[..., PretrainedConfig]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "internlm3": _internlm3,
}


def _make_model(config: InternVLConfig, seed: int, dtype: torch.dtype) -> InternVLForConditionalGeneration:
    model = InternVLForConditionalGeneration(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_draw(name, parameter.shape, generator).to(dtype))
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "self_attn" in name and "norm" in name:
        return 2 + 0.3 * values  # sharp attention: replies depend on what is far away, not on the last token alone
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if "lambda_" in name:
        return 0.8 + 0.1 * values
    if name.endswith("bias") or "sinks" in name:
        return 0.2 * values
    if "embed" in name and "projection" not in name:
        return 0.5 * values
    # Linear weights are [out, in]; GPT-OSS keeps its experts as [expert, in, out].
    is_transposed = "experts" in name and ("gate_up_proj" in name or "down_proj" in name) and len(shape) == 3
    fan_in = math.prod(shape[1:]) if not is_transposed else min(shape[1:])
    return values * 1.5 / math.sqrt(fan_in)


def _split_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps the experts of one layer in two tensors; published checkpoints have three per expert."""
    split: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        for expert in range(len(tensor)) if prefix.endswith(".mlp.experts") else ():
            if last == "gate_up_proj":
                gate, up = tensor[expert].chunk(2)
                split |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
            else:
                split[f"{prefix}.{expert}.down_proj.weight"] = tensor[expert]
        if not prefix.endswith(".mlp.experts"):
            split[name] = tensor
    return split


def _legacy_name(name: str) -> str:
    """The name under which ``save_pretrained`` stores a parameter."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


_GITHUB_RENAMES = (
    ("model.multi_modal_projector.layer_norm", "mlp1.0"),
    ("model.multi_modal_projector.linear_1", "mlp1.1"),
    ("model.multi_modal_projector.linear_2", "mlp1.3"),
    ("model.vision_tower.", "vision_model."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
)


def _github_name(name: str) -> str:
    if name == "lm_head.weight" or name.startswith("model.language_model."):
        return _legacy_name(name)
    for old, new in _GITHUB_RENAMES:
        name = name.replace(old, new)
    return name


def _fuse_qkv(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("vision_model.") or not any(f"attn.{part}_proj" in name for part in "qkv"):
            fused[name] = tensor
        elif "attn.q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return fused


def _github_config(config: InternVLConfig, max_tiles: int) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "template": "internvl3_5_gpt_oss" if text.model_type == "gpt_oss" else "internvl2_5",
        "downsample_ratio": config.downsample_ratio,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": vision.image_size[0],
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": max_tiles,
        "use_thumbnail": True,
        "pad2square": False,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "llm_config": _github_text_config(text),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "num_channels": 3,
            "hidden_act": "gelu",
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
        },
    }


_ARCHITECTURES = {
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "gpt_oss": "GptOss",
    "internlm3": "InternLM3",
}


def _github_text_config(text: PretrainedConfig) -> dict[str, Any]:
    """As transformers 4, which the published checkpoints were written with, spelled rotary embeddings."""
    values: dict[str, Any] = text.to_dict()
    rope = dict(values.pop("rope_parameters"))
    values["architectures"] = [f"{_ARCHITECTURES[text.model_type]}ForCausalLM"]
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return values


def _write_companions(path: Path, layout: Layout, tokenizer: PreTrainedTokenizerFast, max_tiles: int) -> None:
    tokenizer.save_pretrained(path)
    _write_json(
        path / "generation_config.json",
        {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )
    image_processor: dict[str, Any] = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    if layout == "github":
        image_processor |= {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 448, "size": 448}
    else:
        image_processor |= {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "size": {"height": 448, "width": 448},
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": max_tiles,
            "resample": 3,
        }
        _write_json(path / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": 256})
    _write_json(path / "preprocessor_config.json", image_processor)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
