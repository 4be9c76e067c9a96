# mypy: disable-error-code="no-any-return,no-untyped-call"
"""ViR, the resolution router of Flash checkpoints: how likely a tile is to be compressed, and which tiles are.

Parameter names are those of the published checkpoints. Numerically the published ``modeling_internvl_chat.py``
(INTERNVL.md 2.2 and 2.3), with one difference in how, none in what: a single query looks at 1,024 patches, so keys and
values are never made; the query is carried through their weights instead, which costs a thirtieth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.model.config import VIR_HEADS

NUM_BLOCKS: Final = 4
_LAYER_NORM_EPS: Final = 1e-5
_NUM_REPEATS: Final = 3
"""The second attention and norm run three times; the third and fourth of the checkpoints never do."""


class OneQueryAttention(nn.Module):
    """Multi-head attention of one query for each tile, under the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size))
        self.out_proj = nn.Linear(size, size)

    def forward(self, query: Tensor, patches: Tensor) -> Tensor:
        """Query ``[n, size]``, patches ``[n, num_patches, size]`` -> ``[n, size]``."""
        size = query.shape[-1]
        query_weight, key_weight, value_weight = self.in_proj_weight.view(3, VIR_HEADS, -1, size)
        query_bias, _, value_bias = self.in_proj_bias.view(3, -1)  # the keys' adds the same to every score
        heads = F.linear(query, query_weight.flatten(0, 1), query_bias).unflatten(-1, (VIR_HEADS, -1))
        seen_through_keys = torch.einsum("nhd,hds->nhs", heads, key_weight) * heads.shape[-1] ** -0.5
        weights = torch.softmax(seen_through_keys @ patches.transpose(1, 2), dim=-1)  # [n, heads, num_patches]
        mixed = torch.einsum("nhs,hds->nhd", weights @ patches, value_weight)
        return self.out_proj(mixed.flatten(1) + value_bias)


class Pooling(nn.Module):
    """Patches of a tile -> one vector: ``pooling_before_gating`` of the checkpoints."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, size))
        self.attn1 = OneQueryAttention(size)
        self.norm1 = nn.LayerNorm(size, eps=_LAYER_NORM_EPS)
        self.attn2 = OneQueryAttention(size)
        self.norm2 = nn.LayerNorm(size, eps=_LAYER_NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """``[n, num_patches, size]`` -> ``[n, size]``. No residuals."""
        query = self.norm1(self.attn1(self.query_token.expand(len(patches), -1), patches))
        for _ in range(_NUM_REPEATS):
            query = self.norm2(self.attn2(query, patches))
        return query


class Gating(nn.Module):
    """Pooled vector -> probability to be compressed: ``gating`` of the checkpoints."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for index in range(1, NUM_BLOCKS + 1):
            self.add_module(f"block{index}", _make_block(size))
        self.gate = nn.Sequential(nn.LayerNorm(size, eps=_LAYER_NORM_EPS), nn.Linear(size, 2))

    def forward(self, pooled: Tensor) -> Tensor:
        """``[n, size]`` -> ``[n]``, in the dtype of the model, which is what thresholds are compared in."""
        for index in range(1, NUM_BLOCKS + 1):
            pooled = pooled + self.get_submodule(f"block{index}")(pooled)
        return torch.softmax(self.gate(pooled), dim=-1)[:, 0]


def _make_block(size: int) -> nn.Sequential:
    """The indices are checkpoint names; where training drops out, nothing happens here."""
    return nn.Sequential(
        nn.Linear(size, 4 * size),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(4 * size, size),
        nn.Identity(),
        nn.LayerNorm(size, eps=_LAYER_NORM_EPS),
    )


@dataclass(frozen=True, slots=True)
class VirChoice:
    """How to choose the tiles of an image that are compressed.

    Args:
        scope: ``request``: the relative threshold is a quantile over ``request_scores``; ``image``: over the scores of
            the image itself; ``absolute``: it does not count.
    """

    mode: Literal["off", "auto", "force64"]
    scope: Literal["request", "image", "absolute"] = "image"
    relative_threshold: float = 0.0
    absolute_threshold: float = 0.0
    request_scores: Sequence[float] = ()

    @property
    def needs_all_tiles(self) -> bool:
        """Whether no tile's fate is known before every tile of the image has its score."""
        return self.mode == "auto" and self.scope == "image"

    def compressed(self, scores: Tensor) -> list[bool]:
        """For each of ``scores`` ``[n]``, in the model's dtype: is the tile compressed?

        A quantile in float32, then two comparisons in the model's dtype, the first of them strict, as published: a
        single tile never is compressed under a relative threshold.
        """
        if self.mode != "auto":
            return [self.mode == "force64"] * len(scores)
        is_compressed = scores >= torch.tensor(self.absolute_threshold, dtype=scores.dtype)
        if self.scope != "absolute":
            over = scores.float() if self.scope == "image" else torch.tensor(self.request_scores, dtype=torch.float32)
            is_compressed &= scores > torch.quantile(over, self.relative_threshold).to(scores.dtype)
        return is_compressed.tolist()
