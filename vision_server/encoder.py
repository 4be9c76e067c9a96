"""The vision model on its device: 8-bit tiles in, features in host memory out.

Synchronous, one caller at a time. Knows nothing of requests, queues or sockets.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.model.checkpoint import Checkpoint, load_role
from common.model.config import InternVLConfig
from common.model.device import DtypeName, choose_device, choose_dtype
from vision_server.internvit import InternViT
from vision_server.projector import make_mlp1, pixel_shuffle, shuffle_factor
from vision_server.side_by_side import SideBySide
from vision_server.tiling import Tiles

log = logging.getLogger(__name__)


class VisionModel(nn.Module):
    """Tower and projector under the names a GitHub checkpoint uses."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.vision_model = InternViT(config.vision, config.select_layer)
        self.mlp1 = make_mlp1(config)
        self.shuffle_factor = shuffle_factor(config)
        self.ps_version = config.ps_version

    def forward(self, pixels: Tensor, on_layer: Callable[[], None] = lambda: None) -> Tensor:
        """Normalised pixels ``[n, 3, S, S]`` -> ``[n, tokens per tile, text hidden]``."""
        patches = self.vision_model(pixels, on_layer)
        features: Tensor = self.mlp1(pixel_shuffle(patches, self.shuffle_factor, self.ps_version))
        return features


class VisionEncoder:
    """Owns the weights. Construction allocates nothing; ``load`` takes one copy of the weights and no more.

    Args:
        device: ``auto`` (CUDA where there is one), or what ``torch.device`` takes.
        dtype: of weights and arithmetic; ``auto`` is bfloat16 where the device computes in it, else float32.
        on_progress: called between layers, so that a long batch is not taken for a hung device.
    """

    def __init__(
        self,
        config: InternVLConfig,
        device: str = "auto",
        dtype: DtypeName = "auto",
        *,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self._on_progress = on_progress
        with torch.device("meta"):
            self._model = VisionModel(config).to(self.dtype).requires_grad_(False).eval()
        self._mean = torch.tensor(config.image_mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(config.image_std, device=self.device).view(1, 3, 1, 1)
        num_threads = torch.get_num_threads()
        # A core gains nothing from batching and loses its caches to it; an accelerator needs it. Tried with two layers
        # of the 300M shape on one core in FP32: 731, 752, 824 ms per tile for 1, 2, 4 tiles.
        self.preferred_batch_tiles = 32 if self.device.type != "cpu" else num_threads
        self._side_by_side = SideBySide(lambda tile: self._model(tile, self._on_progress), num_threads)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def load(self, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the weights from a checkpoint directory, tensor by tensor; the language half stays on disk.

        Args:
            progress: called with (bytes done, bytes in all).

        Raises:
            CheckpointError: the checkpoint does not fit the config.
        """
        self._model.to_empty(device=self.device)
        load_role(Checkpoint.open(path), self.config, "vision", dict(self._model.named_parameters()), progress=progress)

    def warm_up(self) -> None:
        """First calls compile kernels and fill allocators: let no request pay for that."""
        side = self.config.tiling.tile_size
        self.encode(np.zeros((1, side, side, 3), dtype=np.uint8))

    @torch.inference_mode()
    def encode(self, tiles: Tiles) -> Tensor:
        """Tiles ``[n, S, S, 3]`` uint8 -> features ``[n, tokens per tile, text hidden]`` in ``dtype``, in host memory.

        A tile's features do not depend on its neighbours in the batch beyond rounding.
        """
        pixels = self._pixels(tiles)
        if self.device.type == "cpu":
            return self._side_by_side(pixels)
        return _to_host(self._model(pixels, self._on_progress))

    def _pixels(self, tiles: Tiles) -> Tensor:
        """Upload as bytes, then ``(x / 255 - mean) / std`` in float32 as the reference transform does."""
        host = torch.from_numpy(tiles)
        if self.device.type == "cuda":
            host = host.pin_memory()
        pixels = host.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32)
        return pixels.div_(255).sub_(self._mean).div_(self._std).to(self.dtype)

    def release_memory(self) -> None:
        """Give cached device memory back, after the device ran out of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _to_host(features: Tensor) -> Tensor:
    """Copy through pinned memory; the only point where the host waits for the device."""
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    torch.cuda.current_stream(features.device).synchronize()
    return host
