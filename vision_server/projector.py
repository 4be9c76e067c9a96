"""From patches of the tower to tokens of the language model: pixel shuffle, then ``mlp1``, or ``mlp2`` for fewer.

Source: INTERNVL.md 4.2 (shuffle order) and 2.2 (``mlp1``, ``mlp2``). Knows nothing of tiles, images or batches.
"""

import math
from typing import Literal

from torch import Tensor, nn

from common.model.config import InternVLConfig
from vision_server.internvit import make_activation

_LAYER_NORM_EPS = 1e-5  # of the projector; the tower has its own


def pixel_shuffle(hidden: Tensor, factor: int, version: Literal["v1", "v2"]) -> Tensor:
    """Fold each ``factor x factor`` square of patches into one token.

    ``[n, side * side, channels]``, row-major -> ``[n, (side / factor)**2, factor**2 * channels]``. Output channel
    ``(a * factor + b) * channels + d`` is channel d of the patch at row offset a, column offset b. Tokens are row-major
    in v2, column-major in v1. Not the channel order of ``torch.nn.PixelUnshuffle``.
    """
    num_tiles, num_patches, channels = hidden.shape
    cells = math.isqrt(num_patches) // factor
    squares = hidden.reshape(num_tiles, cells, factor, cells, factor, channels)  # n, R, a, Q, b, d
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return squares.permute(order).reshape(num_tiles, cells * cells, factor * factor * channels)


def make_mlp1(config: InternVLConfig) -> nn.Sequential:
    """``[n, tokens, factor**2 * vision hidden]`` -> ``[n, tokens, text hidden]``; the indices are checkpoint names."""
    shuffled_size = config.vision.hidden_size * shuffle_factor(config) ** 2
    return nn.Sequential(
        nn.LayerNorm(shuffled_size, eps=_LAYER_NORM_EPS),
        nn.Linear(shuffled_size, config.text_hidden_size),
        make_activation(config.projector_act),
        nn.Linear(config.text_hidden_size, config.text_hidden_size),
    )


def make_mlp2(config: InternVLConfig) -> nn.Sequential:
    """The projector of compressed tiles in Flash checkpoints: ``[n, tokens, (2 * factor)**2 * vision hidden]`` ->
    ``[n, tokens, text hidden]``."""
    shuffled_size = config.vision.hidden_size * (2 * shuffle_factor(config)) ** 2
    size = config.text_hidden_size
    return nn.Sequential(
        nn.LayerNorm(shuffled_size, eps=_LAYER_NORM_EPS),
        nn.Linear(shuffled_size, 2 * size),
        nn.GELU(),
        nn.Identity(),  # dropout in training, as behind the next one
        nn.Linear(2 * size, 2 * size),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(2 * size, size),
    )


def shuffle_factor(config: InternVLConfig) -> int:
    """Side of the square of patches behind one token: 2 for a downsample ratio of 0.5."""
    return round(1 / config.downsample_ratio)
