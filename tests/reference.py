"""The undivided model, written down as plainly as possible: what the divided system must reproduce.

Transcribed from INTERNVL.md sections 5 and 6, sharing no code with the servers: a mistake made there is not made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

TILE = 448
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def grid(width: int, height: int, lo: int, hi: int) -> tuple[int, int]:
    grids = sorted(
        {(c, r) for n in range(lo, hi + 1) for c in range(1, n + 1) for r in range(1, n + 1) if lo <= c * r <= hi},
        key=lambda g: (g[0] * g[1], g),
    )
    best, best_gap = (1, 1), float("inf")
    for cols, rows in grids:
        gap = abs(width / height - cols / rows)
        bigger_is_better = width * height > 0.5 * TILE * TILE * cols * rows
        if gap < best_gap or (gap == best_gap and bigger_is_better):
            best, best_gap = (cols, rows), gap
    return best


def tiles(image: Image.Image, lo: int = 1, hi: int = 12, use_thumbnail: bool = True) -> list[Image.Image]:
    image = image.convert("RGB")
    cols, rows = grid(*image.size, lo, hi)
    sheet = image.resize((TILE * cols, TILE * rows))
    cells = [sheet.crop((TILE * c, TILE * r, TILE * (c + 1), TILE * (r + 1))) for r in range(rows) for c in range(cols)]
    if use_thumbnail and len(cells) > 1:
        cells.append(image.resize((TILE, TILE)))
    return cells


def pixel_values(images: Sequence[Image.Image], **budget) -> torch.Tensor:
    """All tiles of all images ``[num_tiles, 3, 448, 448]`` float32, ImageNet-normalised."""
    cells = [np.asarray(cell) for image in images for cell in tiles(image, **budget)]
    pixels = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@dataclass
class Turn:
    """One message: its images stand before its text."""

    role: str
    text: str
    images: list[Image.Image] = field(default_factory=list)


def prompt(turns: Sequence[Turn], system: str | None = None) -> str:
    """Template ``internvl2_5`` with every image expanded to its placeholders."""
    parts = [f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []
    for turn in turns:
        blocks = "".join(f"<img>{'<IMG_CONTEXT>' * 256 * len(tiles(image))}</img>\n" for image in turn.images)
        parts.append(f"<|im_start|>{turn.role}\n{blocks}{turn.text}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


@torch.inference_mode()
def greedy(model, tokenizer, turns: Sequence[Turn], num_tokens: int, system: str | None = None) -> list[int]:
    """Token ids that ``InternVLForConditionalGeneration.generate`` gives, end of sequence included."""
    input_ids = torch.tensor([tokenizer(prompt(turns, system), add_special_tokens=False)["input_ids"]])
    images = [image for turn in turns for image in turn.images]
    inputs = {"pixel_values": pixel_values(images)} if images else {}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        **inputs,
    )
    return output[0, input_ids.shape[1] :].tolist()
