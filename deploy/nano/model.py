"""The nano model: its configuration, its start, a forward pass over kept cells, its files.

`see` and `read` run the modules of transformers on a subset of a tile's image tokens, at their true
positions; with all 256 cells they equal the model's own forward pass.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from deploy.nano import data
from deploy.nano.tokenizer import TEMPLATE, VOCAB_SIZE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as the published checkpoints
NUM_CELLS = data.GRID**2  # 256 image tokens per tile
WIDTH = 128


def make_config(tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    """ViT 128 x 4 and Qwen3 128 x 3, otherwise as the published InternVL3.5 checkpoints."""
    vision = InternVLVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=512,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
        use_mean_pooling=True,
        layer_scale_init_value=1.0,
    )
    text = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=NUM_CELLS,
        downsample_ratio=0.5,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=True,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> InternVLForConditionalGeneration:
    """A seeded start: matrices of std 0.5 / sqrt(fan in), sine-cosine position embeddings."""
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(make_config(tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed_tokens" not in name:
            nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[1]))
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embeddings.projection.weight, std=1 / math.sqrt(588))
    nn.init.normal_(embeddings.cls_token, std=0.02)
    embeddings.position_embeddings.data[0, 1:] = sine_cosine(WIDTH)
    model.generation_config.do_sample = False  # a reader of pictures, not a poet
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def sine_cosine(width: int, side: int = 32) -> torch.Tensor:
    """2-D position embeddings [side * side, width], half for the row and half for the column."""
    frequency = torch.logspace(0, -2, width // 4, 10.0) * 1.5
    angle = torch.arange(side)[:, None] * frequency  # [side, width / 4]
    line = torch.cat((angle.sin(), angle.cos()), 1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    return torch.cat((rows, columns), 2).reshape(side * side, width) * 0.5


def see(model: InternVLForConditionalGeneration, images: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Image tokens [N, K, 128] of kept cells: images uint8 [N, K * 4, 588], cells int [N, K].

    The four patches of a cell lie side by side in `images`, so that joining them is the pixel
    shuffle v2 of the published checkpoints.
    """
    tower, dtype = model.model.vision_tower, model.lm_head.weight.dtype
    scale = (1 / (torch.tensor(STD) * 255)).repeat_interleave(196)
    shift = -(torch.tensor(MEAN) / torch.tensor(STD)).repeat_interleave(196)
    pixels = torch.addcmul(shift, images.float(), scale).to(dtype)
    projection = tower.embeddings.patch_embeddings.projection
    patches = F.linear(pixels, projection.weight.flatten(1), projection.bias)
    corner = (cells // data.GRID) * 64 + (cells % data.GRID) * 2 + 1  # upper left patch, after CLS
    index = (corner[:, :, None] + torch.tensor((0, 1, 32, 33))).flatten(1)
    positions = tower.embeddings.position_embeddings[0]
    first = (tower.embeddings.cls_token + positions[:1]).expand(len(images), -1, -1)
    hidden = torch.cat((first, patches + F.embedding(index, positions)), 1)
    for layer in tower.encoder.layer:
        hidden = layer(hidden)
    return model.model.multi_modal_projector(hidden[:, 1:].reshape(*cells.shape, 4 * WIDTH))


def read(language: Qwen3Model, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Language model over embeddings [B, S, 128] at their true `positions` [B, S]; causal."""
    length = hidden.shape[1]
    rotary = language.rotary_emb(hidden, positions)
    mask = torch.full((1, 1, length, length), -1e4, dtype=hidden.dtype).triu(1)
    for layer in language.layers:
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return language.norm(hidden)


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention [B, heads, S, D] as two products: trained on CPU, faster than the fused kernel here."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


def export(model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face folder: BF16 weights, configs, tokenizer, template, preprocessor.

    Files are written aside and renamed, so a reader never meets half a file.
    """
    folder = out / ".new"
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_json(folder / "preprocessor_config.json", _preprocessor())
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": NUM_CELLS}
    write_json(folder / "processor_config.json", processor)
    for path in folder.iterdir():
        path.chmod(0o644)
        path.rename(out / path.name)
    folder.rmdir()


def _preprocessor() -> dict[str, object]:
    """The published image processor's values: 448 px tiles, at most 12, ImageNet mean and std."""
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "do_resize": True,
        "size": {"height": 448, "width": 448},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """A config file as the published checkpoints have them."""
    path.write_text(json.dumps(content, indent=2) + "\n")
