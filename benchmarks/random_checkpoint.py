"""A checkpoint in the shape of a released InternVL3.5 model, with random weights: what serving costs is in the shape.

    write_checkpoint(Path("/scratch/8B"), SHAPES["8B"])

InternVL's own format, BF16, shard by shard, so that 38 billion parameters need the memory of one shard. Shapes:
INTERNVL.md sections 3.1 to 3.3. Answers are nonsense; nothing here knows how a model is served.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.workload import Workload, prompt_text, recipes

_SHARD_BYTES: Final = 2 * 2**30
_POOL_VALUES: Final = 2**24
_STD: Final = 0.02
_LAYER_SCALE: Final = 0.1
_TILE_SIDE, _PATCH_SIDE, _SHUFFLE = 448, 14, 2
_INDEX: Final = "model.safetensors.index.json"
_END: Final = "<|im_end|>"
_SPECIAL_TOKENS: Final = (
    "<|endoftext|>", "<|im_start|>", _END, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>",
    "<box>", "</box>",
)  # fmt: skip
_NUM_TEXTS: Final = 200

Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class VisionShape:
    """InternViT. ``is_6b``: RMS norms, no bias in qkv, norms of q and k."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    is_6b: bool = False


@dataclass(frozen=True, slots=True)
class TextShape:
    """A dense Qwen3."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int = 151_936


@dataclass(frozen=True, slots=True)
class Shape:
    """``is_flash``: with a resolution router, which sends about half of the tiles of a picture with fewer tokens."""

    vision: VisionShape
    text: TextShape
    is_flash: bool = False

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in tensors(self))


_VIT_300M: Final = VisionShape(1024, 24, 16, 4096)
_VIT_6B: Final = VisionShape(3200, 45, 25, 12_800, is_6b=True)
SHAPES: Final[Mapping[str, Shape]] = {
    "tiny": Shape(VisionShape(64, 2, 2, 128), TextShape(64, 2, 4, 2, 16, 128, vocab=2048)),
    "1B": Shape(_VIT_300M, TextShape(1024, 28, 16, 8, 128, 3072)),
    "8B": Shape(_VIT_300M, TextShape(4096, 36, 32, 8, 128, 12_288)),
    "8B-Flash": Shape(_VIT_300M, TextShape(4096, 36, 32, 8, 128, 12_288), is_flash=True),
    "14B": Shape(_VIT_300M, TextShape(5120, 40, 40, 8, 128, 17_408)),
    "38B": Shape(_VIT_6B, TextShape(5120, 64, 64, 8, 128, 25_600)),
}


def write_checkpoint(path: Path, shape: Shape) -> None:
    """Fill ``path``, unless it holds a complete checkpoint already."""
    if (path / _INDEX).exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer(shape.text.vocab)
    tokenizer.save(str(path / "tokenizer.json"))
    end = tokenizer.token_to_id(_END)
    assert end is not None  # it is one of those the tokenizer was trained with
    _write_json(path / "config.json", _config(shape, end))
    _write_json(path / "generation_config.json", {"eos_token_id": end})
    _write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END})
    _write_shards(path, shape)


def tensors(shape: Shape) -> Tensors:
    """Name and shape of every tensor."""
    yield from _vision_tensors(shape.vision)
    yield from _projector_tensors(shape)
    if shape.is_flash:
        yield from _flash_tensors(shape)
    yield from _text_tensors(shape.text)


def _vision_tensors(vision: VisionShape) -> Tensors:
    hidden, prefix = vision.hidden, "vision_model.embeddings."
    yield f"{prefix}class_embedding", (1, 1, hidden)
    yield f"{prefix}position_embedding", (1, 1 + (_TILE_SIDE // _PATCH_SIDE) ** 2, hidden)
    yield f"{prefix}patch_embedding.weight", (hidden, 3, _PATCH_SIDE, _PATCH_SIDE)
    yield f"{prefix}patch_embedding.bias", (hidden,)
    for index in range(vision.layers):
        prefix = f"vision_model.encoder.layers.{index}."
        yield f"{prefix}attn.qkv.weight", (3 * hidden, hidden)
        yield from _linear(f"{prefix}attn.proj", hidden, hidden)
        yield from _linear(f"{prefix}mlp.fc1", hidden, vision.mlp)
        yield from _linear(f"{prefix}mlp.fc2", vision.mlp, hidden)
        names = ["ls1", "ls2", "norm1.weight", "norm2.weight"]
        names += ["attn.q_norm.weight", "attn.k_norm.weight"] if vision.is_6b else ["norm1.bias", "norm2.bias"]
        yield from ((f"{prefix}{name}", (hidden,)) for name in names)
        if not vision.is_6b:
            yield f"{prefix}attn.qkv.bias", (3 * hidden,)


def _projector_tensors(shape: Shape) -> Tensors:
    width = shape.vision.hidden * _SHUFFLE**2
    yield from _norm("mlp1.0", width)
    yield from _linear("mlp1.1", width, shape.text.hidden)
    yield from _linear("mlp1.3", shape.text.hidden, shape.text.hidden)


def _flash_tensors(shape: Shape) -> Tensors:
    """The second projector, pooling and gating; the third and fourth attention are stored and never used."""
    size, text = shape.vision.hidden, shape.text.hidden
    width = size * (2 * _SHUFFLE) ** 2
    yield from _norm("mlp2.0", width)
    yield from _linear("mlp2.1", width, 2 * text)
    yield from _linear("mlp2.4", 2 * text, 2 * text)
    yield from _linear("mlp2.7", 2 * text, text)
    yield "pooling_before_gating.query_token", (1, size)
    for index in range(1, 5):
        prefix = f"pooling_before_gating.attn{index}."
        yield f"{prefix}in_proj_weight", (3 * size, size)
        yield f"{prefix}in_proj_bias", (3 * size,)
        yield from _linear(f"{prefix}out_proj", size, size)
        yield from _norm(f"pooling_before_gating.norm{index}", size)
        yield from _linear(f"gating.block{index}.0", size, 4 * size)
        yield from _linear(f"gating.block{index}.3", 4 * size, size)
        yield from _norm(f"gating.block{index}.5", size)
    yield from _norm("gating.gate.0", size)
    yield from _linear("gating.gate.1", size, 2)


def _text_tensors(text: TextShape) -> Tensors:
    hidden, prefix = text.hidden, "language_model."
    yield f"{prefix}model.embed_tokens.weight", (text.vocab, hidden)
    yield f"{prefix}model.norm.weight", (hidden,)
    yield f"{prefix}lm_head.weight", (text.vocab, hidden)
    for index in range(text.layers):
        prefix = f"language_model.model.layers.{index}."
        for name, heads in (("q", text.heads), ("k", text.kv_heads), ("v", text.kv_heads)):
            yield f"{prefix}self_attn.{name}_proj.weight", (heads * text.head_dim, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, text.heads * text.head_dim)
        yield f"{prefix}self_attn.q_norm.weight", (text.head_dim,)
        yield f"{prefix}self_attn.k_norm.weight", (text.head_dim,)
        yield f"{prefix}mlp.gate_proj.weight", (text.mlp, hidden)
        yield f"{prefix}mlp.up_proj.weight", (text.mlp, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, text.mlp)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)


def _linear(name: str, width_in: int, width_out: int) -> Tensors:
    yield f"{name}.weight", (width_out, width_in)
    yield f"{name}.bias", (width_out,)


def _norm(name: str, width: int) -> Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _write_shards(path: Path, shape: Shape) -> None:
    """The index comes last: with it the checkpoint is complete."""
    shards = list(_shards(shape))
    pool = torch.randn(_POOL_VALUES, generator=torch.Generator().manual_seed(0)).mul_(_STD).to(torch.bfloat16)
    offsets = itertools.count(0, 7_919)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _draw(name, names[name], pool, next(offsets)) for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(path / _INDEX, {"metadata": {"total_size": 2 * shape.num_parameters}, "weight_map": weight_map})


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    room = _SHARD_BYTES
    for name, its_shape in tensors(shape):
        num_bytes = 2 * math.prod(its_shape)
        if shard and num_bytes > room:
            yield shard
            shard, room = {}, _SHARD_BYTES
        shard[name] = its_shape
        room -= num_bytes
    yield shard


def _draw(name: str, shape: tuple[int, ...], pool: torch.Tensor, offset: int) -> torch.Tensor:
    """BF16. Cut from one pool of random values, each tensor from another place: drawing billions takes minutes."""
    if name.rpartition(".")[2] in ("ls1", "ls2"):
        return torch.full(shape, _LAYER_SCALE, dtype=torch.bfloat16)
    if len(shape) == 1:
        return torch.zeros(shape, dtype=torch.bfloat16) if name.endswith("bias") else torch.ones(shape).bfloat16()
    num_values = math.prod(shape)
    values = pool.roll(-(offset % len(pool)))
    return values.repeat(-(-num_values // len(pool)))[:num_values].view(shape)


def _make_tokenizer(vocab_size: int) -> Tokenizer:
    """Trained on what the benchmark will ask, so that its words are one token each, as in the released vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 2048),
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (prompt_text(recipe) for recipe in itertools.islice(recipes(Workload(), seed=0), _NUM_TEXTS))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _config(shape: Shape, end: int) -> dict[str, Any]:
    vision, text = shape.vision, shape.text
    flash = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.0}
    return {
        **(flash if shape.is_flash else {}),
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "system_message": "",  # the template's own is Chinese, which this tokenizer spells byte by byte
        "downsample_ratio": 1 / _SHUFFLE,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": _TILE_SIDE,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "tie_word_embeddings": False,
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": text.hidden,
            "intermediate_size": text.mlp,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "attention_bias": False,
            "eos_token_id": end,
        },
        "vision_config": {
            "hidden_size": vision.hidden,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": _TILE_SIDE,
            "patch_size": _PATCH_SIDE,
            "norm_type": "rms_norm" if vision.is_6b else "layer_norm",
            "qkv_bias": not vision.is_6b,
            "qk_normalization": vision.is_6b,
        },
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
