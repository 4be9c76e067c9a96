"""The nano-flash model: nano with a second projector, `mlp2`, and the router that says which tiles it takes.

Modules and their names are those of the published Flash checkpoints; the vision half is the server's own. The forward
pass here is plain: whole prompts, no cache, every image of a batch with the same number of tokens.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.model.checkpoint import Checkpoint, load_role
from common.model.config import InternVLConfig, load_config
from deploy.nano.batches import Speech
from deploy.nano.model import read, write_json
from vision_server.internvit import InternViT
from vision_server.projector import make_mlp1, make_mlp2
from vision_server.vir import Gating, Pooling

FULL: Final = 256
"""Tokens of a tile as nano sees it."""
COMPRESSED: Final = 64
RELATIVE_THRESHOLD: Final = 0.0
"""The quantile a tile must exceed: with 0, all but the least likely of a request's tiles may be compressed."""
NANO: Final = Path(__file__).parent
NANO_FLASH: Final = Path(__file__).parents[1] / "nano-flash"


@dataclass(frozen=True)
class ImageTokens:
    """Tokens ``[B, kept, 128]`` of one image each, their places int ``[B, kept]`` on a tile of ``num_tokens``."""

    values: Tensor
    places: Tensor
    num_tokens: int


class FlashNano(nn.Module):
    """Tower, both projectors, router and language model, under the names of a GitHub checkpoint."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config.vision)
        self.mlp1 = make_mlp1(config)
        self.mlp2 = make_mlp2(config)
        self.pooling_before_gating = Pooling(config.vision.hidden_size)
        self.gating = Gating(config.vision.hidden_size)
        self.language_model = Qwen3ForCausalLM(Qwen3Config(**config.text, attn_implementation="plain"))

    def see(self, pixels: Tensor, squares: Tensor) -> Tensor:
        """The tower's last hidden state without CLS ``[n, K * 16, 128]`` of kept squares, at their true positions.

        ``pixels`` uint8 ``[n, K * 16, 588]``, the 16 patches of a square side by side; ``squares`` int ``[n, K]``. With
        all 64 this is a whole tile.
        """
        mean, std = (torch.tensor(x).repeat_interleave(196) for x in (self.config.image_mean, self.config.image_std))
        embeddings = self.vision_model.embeddings
        weight, bias = embeddings.patch_embedding.weight.flatten(1), embeddings.patch_embedding.bias
        patches = F.linear(((pixels.float() / 255 - mean) / std).to(self.dtype), weight, bias)
        corners = (squares // 8) * 128 + (squares % 8) * 4  # upper left patch
        inside = (torch.arange(4)[:, None] * 32 + torch.arange(4)).flatten()
        positions = embeddings.position_embedding[0]
        patches = patches + F.embedding((corners[:, :, None] + inside).flatten(1) + 1, positions)
        first = (embeddings.class_embedding + positions[:1]).expand(len(pixels), -1, -1)
        hidden = torch.cat((first, patches), 1)
        for layer in self.vision_model.encoder.layers:
            hidden = layer(hidden)
        return hidden[:, 1:]

    def tokens(self, patches: Tensor, squares: Tensor, num_tokens: int) -> ImageTokens:
        """Patches ``[B, K * 16, 128]`` of ``squares`` ``[B, K]``, with FULL or COMPRESSED tokens per tile."""
        by_square = patches.unflatten(1, (-1, 16))
        if num_tokens == COMPRESSED:
            return ImageTokens(self.mlp2(by_square.flatten(2)), squares, COMPRESSED)
        cells = by_square.unflatten(2, (2, 2, 2, 2)).transpose(3, 4)  # row, column of the cell, then those inside it
        tokens = self.mlp1(cells.flatten(1, 3).flatten(2))
        corners = (squares // 8) * 32 + (squares % 8) * 2
        places, order = (corners[:, :, None] + torch.tensor((0, 1, 16, 17))).flatten(1).sort()
        return ImageTokens(tokens.take_along_dim(order[:, :, None], 1), places, FULL)

    def scores(self, patches: Tensor) -> Tensor:
        """How likely tiles ``[n, 1024, 128]`` are to be compressed: ``[n]``. The order of patches does not matter."""
        return self.gating(self.pooling_before_gating(patches))

    def logits(self, images: Sequence[ImageTokens], tail: Tensor, speech: Speech) -> Tensor:
        """Next-token logits ``[B, L, vocabulary]`` over ``tail`` ``[B, L]``, what follows the last image token.

        ``images`` holds the first image of every question, then the second. Positions are those of the prompt with
        whole tiles, contiguous, however many tokens a tile has.
        """
        embed, count = self.language_model.model.embed_tokens, len(tail)
        parts, positions, offset = [], [], 0
        for image in images:
            ids = speech.middle if parts else speech.head
            parts += [embed(torch.tensor(ids)).expand(count, -1, -1), image.values]
            positions.append(torch.arange(offset, offset + len(ids)).expand(count, -1))
            positions.append(image.places + offset + len(ids))
            offset += len(ids) + image.num_tokens
        positions.append(torch.arange(offset, offset + tail.shape[1]).expand(count, -1))
        hidden = read(self.language_model.model, torch.cat([*parts, embed(tail)], 1), torch.cat(positions, 1))
        return self.language_model.lm_head(hidden[:, -tail.shape[1] :])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mlp1.parameters()).dtype


def load_flash(directory: Path, dtype: torch.dtype = torch.bfloat16) -> FlashNano:
    """The model in ``directory``, nano-flash or nano. What nano lacks is drawn."""
    config = load_config(directory)
    model = FlashNano(config)
    rotary = copy.deepcopy(model.language_model.model.rotary_emb)
    model = model.to(dtype).requires_grad_(False).eval()
    model.language_model.model.rotary_emb = rotary  # float32, as after from_pretrained(dtype=bfloat16)
    checkpoint = Checkpoint.open(directory)
    vision = {name: p for name, p in model.named_parameters() if not name.startswith("language_model.")}
    if config.flash is None:
        draw_flash(model)
        vision = {name: p for name, p in vision.items() if name.startswith(("vision_model.", "mlp1."))}
    load_role(checkpoint, config, "vision", vision)
    load_role(checkpoint, config, "language", dict(model.language_model.named_parameters()))
    return model


def draw_flash(model: FlashNano) -> None:
    """A start for what nano lacks: matrices of std 1 / sqrt(fan in), nothing else changed by a layer."""
    torch.manual_seed(0)
    for part in (model.mlp2, model.pooling_before_gating, model.gating):
        for name, parameter in part.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
            else:
                nn.init.constant_(parameter, float(_is_norm_weight(part, name)))


def _is_norm_weight(part: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last == "weight" and isinstance(part.get_submodule(owner), nn.LayerNorm)


def save_parts(model: FlashNano, prefixes: Sequence[str], path: Path) -> None:
    """Write the parameters whose names start so; never half a file."""
    aside = path.with_suffix(".new")
    save_file({name: p.detach() for name, p in _parts(model, tuple(prefixes))}, aside)
    aside.rename(path)


def load_parts(model: FlashNano, path: Path) -> None:
    """Continue from what `save_parts` wrote."""
    weights = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        weights[name].data.copy_(tensor)


def _parts(model: FlashNano, prefixes: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose names start so; a tied head is its embedding and appears as that."""
    return [(name, parameter) for name, parameter in model.named_parameters() if name.startswith(prefixes)]


def export(model: FlashNano, out: Path, absolute_threshold: float) -> None:
    """Write the GitHub folder: BF16 weights, config, tokenizer, generation defaults, image processor.

    Files are written aside and renamed, so a reader never meets half a file. The attentions and norms that published
    checkpoints hold and never use are here, too: copies of the second.
    """
    folder = out / ".new"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
    for name in [
        name for name in tensors if name.startswith(("pooling_before_gating.attn2", "pooling_before_gating.norm2"))
    ]:
        for unused in ("3", "4"):
            tensors[name.replace("2.", f"{unused}.", 1)] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(NANO / name, folder / name)
    write_json(folder / "config.json", github_config(model.config, absolute_threshold))
    write_json(folder / "preprocessor_config.json", _preprocessor(model.config))
    for path in folder.iterdir():
        path.chmod(0o644)
        path.rename(out / path.name)
    folder.rmdir()


def github_config(config: InternVLConfig, absolute_threshold: float) -> dict[str, object]:
    """The keys of a published Flash checkpoint's ``config.json``. A null system message: none, as nano's."""
    vision, tiling = asdict(config.vision), config.tiling
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": config.template,
        "system_message": None,
        "downsample_ratio": config.downsample_ratio,
        "ps_version": config.ps_version,
        "select_layer": -1,
        "force_image_size": tiling.tile_size,
        "dynamic_image_size": True,
        "min_dynamic_patch": tiling.min_tiles,
        "max_dynamic_patch": tiling.max_tiles,
        "use_thumbnail": tiling.use_thumbnail,
        "pad2square": False,
        "flash_mode": True,
        "flash_relative_threshold": RELATIVE_THRESHOLD,
        "flash_absolute_threshold": absolute_threshold,
        "eos_token_id": config.text["eos_token_id"],
        "pad_token_id": config.text["pad_token_id"],
        "tie_word_embeddings": True,
        "llm_config": {**config.text, "architectures": ["Qwen3ForCausalLM"]},
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **vision},
    }


def _preprocessor(config: InternVLConfig) -> dict[str, object]:
    size = config.tiling.tile_size
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": size,
        "size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "resample": 3,
    }
