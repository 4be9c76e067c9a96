"""The extra modules of a Flash checkpoint, plain and unoptimised, as published: the model that ours is compared with.

Transcribed from the description of ``modeling_internvl_chat.py`` in ``OpenGVLab/InternVL3_5-*-Flash`` (INTERNVL.md 2):
both projectors run for every tile, attention is that of torch, the third and fourth are stored and never used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_HEADS = 16
RELATIVE_THRESHOLD = 0.4
ABSOLUTE_THRESHOLD = 0.3


class Pooling(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, size))
        for index in range(1, 5):
            self.add_module(f"attn{index}", nn.MultiheadAttention(size, NUM_HEADS, batch_first=True))
            self.add_module(f"norm{index}", nn.LayerNorm(size))

    def forward(self, patches: Tensor) -> Tensor:
        query = self.query_token.expand(len(patches), 1, -1)
        for index in (1, 2, 2, 2):
            mixed, _ = self.get_submodule(f"attn{index}")(query, patches, patches)
            query = self.get_submodule(f"norm{index}")(mixed)
        return query[:, 0]


class Gating(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        for index in range(1, 5):
            block = (nn.Linear(size, 4 * size), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * size, size), nn.Dropout(0.1))
            self.add_module(f"block{index}", nn.Sequential(*block, nn.LayerNorm(size)))
        self.gate = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2))

    def forward(self, pooled: Tensor) -> Tensor:
        for index in range(1, 5):
            pooled = pooled + self.get_submodule(f"block{index}")(pooled)
        return torch.softmax(self.gate(pooled), dim=-1)


@dataclass
class Routed:
    """``features[i]`` [64 or 256, hidden] of tile i, and its probability to be compressed."""

    features: list[Tensor]
    scores: Tensor


class FlashModules(nn.Module):
    """What a Flash checkpoint has beside a base one, with random weights, but for ``mlp1``, which is that of the base.

    Scores of random weights spread over (0, 1), so that some tiles are compressed and some are not.
    """

    def __init__(self, vision_size: int, text_size: int, seed: int = 0) -> None:
        super().__init__()
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(16 * vision_size),
            nn.Linear(16 * vision_size, 2 * text_size),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * text_size, 2 * text_size),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * text_size, text_size),
        )
        self.pooling_before_gating = Pooling(vision_size)
        self.gating = Gating(vision_size)
        self.requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            spread = 0.02 if is_norm or name.endswith("bias") else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if is_norm else 0.0, spread, generator=generator)

    def score(self, patches: Tensor) -> Tensor:
        """``[n, 1024, vision]`` -> probability to be compressed ``[n]``."""
        return self.gating(self.pooling_before_gating(patches))[:, 0]

    def route(self, patches: Tensor, mlp1: nn.Module, request_scores: Tensor | None = None) -> Routed:
        """Features of the tiles of one call; with scores of the whole request where this is a part of it."""
        scores = self.score(patches)
        over = scores if request_scores is None else request_scores
        threshold = torch.quantile(over.float(), RELATIVE_THRESHOLD).to(scores.dtype)
        long, short = mlp1(shuffled(patches, 2)), self.mlp2(shuffled(patches, 4))
        features = [
            short[tile] if score > threshold and score >= ABSOLUTE_THRESHOLD else long[tile]
            for tile, score in enumerate(scores)
        ]
        return Routed(features, scores)


def shuffled(patches: Tensor, factor: int) -> Tensor:
    """Pixel shuffle v2, one token at a time."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(1, (side, side))
    tokens = [
        grid[:, row : row + factor, column : column + factor].flatten(1)
        for row in range(0, side, factor)
        for column in range(0, side, factor)
    ]
    return torch.stack(tokens, dim=1)
