"""The vision model on its device: 8-bit tiles in, features in host memory out.

Synchronous, one caller at a time; what is on its way back from an accelerator is ``Pending``. Knows nothing of
requests, queues or sockets.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.model.checkpoint import Checkpoint, load_role
from common.model.config import InternVLConfig
from common.model.device import DtypeName, choose_device, choose_dtype
from common.model.graphs import Capture, CudaCapture
from common.service.errors import ConfigError
from vision_server.compiled_tower import compile_tower
from vision_server.host_link import Pending, Then, make_link
from vision_server.internvit import InternViT
from vision_server.projector import make_mlp1, make_mlp2, pixel_shuffle, shuffle_factor
from vision_server.side_by_side import SideBySide
from vision_server.tile_graphs import TileGraphs, batch_sizes
from vision_server.tiling import Tiles
from vision_server.vir import Gating, Pooling

log = logging.getLogger(__name__)

Kind = Literal["features", "patches", "states"]
"""Wanted of a tile: rows for a language server, the way there as far as ViR (Flash only), or the tower's last layer."""

_INVARIANT_BATCH: Final = 8
"""Enough for a GPU to be busy, few enough that a single image does not mostly compute black tiles."""


class VisionModel(nn.Module):
    """Tower, projectors and resolution router under the names a GitHub checkpoint uses."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        is_flash = config.flash is not None
        # Published Flash code takes the last layer, whatever the config selects.
        self.vision_model = InternViT(config.vision, -1 if is_flash else config.select_layer)
        self.mlp1 = make_mlp1(config)
        if is_flash:
            self.mlp2 = make_mlp2(config)
            self.pooling_before_gating = Pooling(config.vision.hidden_size)
            self.gating = Gating(config.vision.hidden_size)
        self.shuffle_factor = shuffle_factor(config)
        self.ps_version = config.ps_version

    def forward(self, pixels: Tensor, on_layer: Callable[[], None] = lambda: None) -> Tensor:
        """Normalised pixels ``[n, 3, S, S]`` -> ``[n, tokens per tile, text hidden]``."""
        return self.project(self.see(pixels, on_layer))

    def see(self, pixels: Tensor, on_layer: Callable[[], None] = lambda: None) -> Tensor:
        """Normalised pixels ``[n, 3, S, S]`` -> ``[n, patches, vision hidden]``."""
        states: Tensor = self.vision_model(pixels, on_layer)
        return states[:, 1:]

    def score(self, patches: Tensor) -> Tensor:
        """``[n, patches, vision hidden]`` -> probability to be compressed ``[n]``. Flash checkpoints only."""
        scores: Tensor = self.gating(self.pooling_before_gating(patches))
        return scores

    def project(self, patches: Tensor, *, compressed: bool = False) -> Tensor:
        """``[n, patches, vision hidden]`` -> ``[n, tokens per tile or a quarter of them, text hidden]``."""
        factor, mlp = (2 * self.shuffle_factor, self.mlp2) if compressed else (self.shuffle_factor, self.mlp1)
        features: Tensor = mlp(pixel_shuffle(patches, factor, self.ps_version))
        return features


@dataclass(frozen=True, slots=True)
class Seen:
    """Tiles between tower and projector: ``patches`` ``[n, patches, vision hidden]`` on the encoder's device,
    ``scores`` ``[n]`` in host memory, both in the model's dtype."""

    patches: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Projected:
    """Features ``[sum(tokens_per_tile), text hidden]`` in host memory, tile after tile."""

    rows: Tensor
    tokens_per_tile: tuple[int, ...]


class VisionEncoder:
    """Owns the weights. Construction allocates nothing; ``load`` takes one copy of the weights and no more.

    Args:
        device: ``auto`` (CUDA where there is one), or what ``torch.device`` takes.
        dtype: of weights and arithmetic; ``auto`` is bfloat16 where the device computes in it, else float32.
        is_batch_invariant: a tile's features are the same bits whatever it is encoded with: always one number of tiles
            at once, with black ones for those that are missing, and on a CPU one thread for each.
        use_cuda_graphs: on CUDA, replay what was captured at ``warm_up``.
        compile_layers: on CUDA, torch.compile the tower's layers at ``warm_up``. Raises ConfigError on a CPU.
        on_progress: called between layers, so that a long batch is not taken for a hung device.
    """

    def __init__(
        self,
        config: InternVLConfig,
        device: str = "auto",
        dtype: DtypeName = "auto",
        *,
        is_batch_invariant: bool = False,
        use_cuda_graphs: bool = True,
        compile_layers: bool = False,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        if compile_layers and self.device.type == "cpu":
            raise ConfigError("compile: on a CPU the tower's layers are fused already; allowed: false")
        self._compile_layers = compile_layers
        self._use_cuda_graphs = use_cuda_graphs and self.device.type == "cuda"
        self._on_progress = on_progress
        with torch.device("meta"):
            self._model = VisionModel(config).to(self.dtype).requires_grad_(False).eval()
        self._mean = torch.tensor(config.image_mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(config.image_std, device=self.device).view(1, 3, 1, 1)
        self._link = make_link(self.device, on_progress)
        self._graphs: TileGraphs | None = None
        self._batch_size = None if not is_batch_invariant else 1 if self.device.type == "cpu" else _INVARIANT_BATCH
        num_threads = torch.get_num_threads()
        # A core gains nothing from batching and loses its caches to it; an accelerator needs it. Tried with two layers
        # of the 300M shape on one core in FP32: 731, 752, 824 ms per tile for 1, 2, 4 tiles.
        self.preferred_batch_tiles = 32 if self.device.type != "cpu" else num_threads
        self._run: Callable[[Tensor], Tensor] = self._model.forward
        self._side_by_side = SideBySide(lambda tile: self._run(tile), num_threads, fixed=is_batch_invariant)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def depth(self) -> int:
        """Batches that keep the device busy while others are copied."""
        return self._link.depth

    def load(self, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the weights from a checkpoint directory, tensor by tensor; the language half stays on disk.

        Args:
            progress: called with (bytes done, bytes in all).

        Raises:
            CheckpointError: the checkpoint does not fit the config.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self._mean.device)  # of this thread: graphs and pinned memory belong to it
        self._model.to_empty(device=self.device)
        load_role(Checkpoint.open(path), self.config, "vision", dict(self._model.named_parameters()), progress=progress)
        self._model.vision_model.pack()
        if self._compile_layers:
            compile_tower(self._model.vision_model)

    def warm_up(self, max_tiles: int | None = None) -> None:
        """First calls compile kernels and fill allocators: let no request pay for that. On CUDA, capture graphs.

        Args:
            max_tiles: of a batch; by default what is preferred.
        """
        if self._use_cuda_graphs:
            self.capture_graphs(max_tiles or self.preferred_batch_tiles, CudaCapture())
        side = self.config.tiling.tile_size
        tiles = np.zeros((1, side, side, 3), dtype=np.uint8)
        if self.config.flash is None:
            self.encode(tiles)
            return
        (seen,) = self.launch("patches", [tiles]).result()
        assert isinstance(seen, Seen)
        for compressed in (False, True):
            self.project([seen.patches[0]], [compressed]).result()

    @torch.inference_mode()
    def capture_graphs(self, max_tiles: int, capture: Capture) -> None:
        """From now on, replay ``features``, or ``patches`` of a Flash checkpoint; batches larger than ``max_tiles``
        take several replays. The rest runs as before, and so does a model that cannot be captured."""
        sizes = batch_sizes(max_tiles) if self._batch_size is None else [self._batch_size]
        compute = self._encode_at_once if self.config.flash is None else self._see_at_once
        side = self.config.tiling.tile_size
        try:
            with self._link.batches():
                self._graphs = TileGraphs(compute, sizes, side, self.device, capture, self._on_progress)
        except RuntimeError as error:
            log.warning("tiles are encoded without CUDA graphs: %s", error)

    def encode(self, tiles: Tiles) -> Tensor:
        """Tiles ``[n, S, S, 3]`` uint8 -> features ``[n, tokens per tile, text hidden]`` in ``dtype``, in host memory.

        A tile's features do not depend on its neighbours in the batch beyond rounding. A Flash checkpoint compresses
        none of them here.
        """
        (features,) = self.launch("features", [tiles]).result()
        assert isinstance(features, Tensor)
        return features

    @torch.inference_mode()
    def launch(self, kind: Kind, parts: Sequence[Tiles]) -> Pending[Sequence[Tensor | Seen]]:
        """Begin with a batch: of each image its tiles ``[n, S, S, 3]`` uint8.

        Returns:
            For each part, in memory of its own: for ``features`` what ``encode`` returns; for ``states`` ``[n, 1 +
            patches, vision hidden]``, class token first, of the layer the checkpoint selects, which is the last; for
            ``patches`` what can be computed before routes are known.
        """
        sizes = [len(part) for part in parts]
        with self._link.batches():
            tiles = self._link.upload(parts)
            if kind == "patches":
                patches, scores = self._see(tiles)
                own = _apart(patches, sizes)
                return Then(
                    self._link.download([scores]),
                    lambda host: [Seen(*part) for part in zip(own, torch.split(host[0], sizes), strict=True)],
                )
            result = self._features(tiles) if kind == "features" else self._compute(tiles, self._states)
            return self._link.download(torch.split(result, sizes))

    @torch.inference_mode()
    def project(self, patches: Sequence[Tensor], compressed: Sequence[bool]) -> Pending[Projected]:
        """Tiles ``[patches, vision hidden]`` each, as ``patches`` left them, each through its own projector."""
        with self._link.aside(patches):
            return self._project(patches, compressed)

    def _project(self, patches: Sequence[Tensor], compressed: Sequence[bool]) -> Pending[Projected]:
        parts: list[Tensor] = [torch.empty(0)] * len(patches)
        for which in (False, True):
            chosen = [index for index, is_compressed in enumerate(compressed) if is_compressed is which]
            if not chosen:
                continue
            stacked = torch.stack([patches[index] for index in chosen])
            projected = self._each(stacked, partial(self._model.project, compressed=which))
            for index, part in zip(chosen, projected, strict=True):
                parts[index] = part
        tokens = tuple(len(part) for part in parts)
        return Then(self._link.download([torch.cat(parts)]), lambda host: Projected(host[0], tokens))

    def release_memory(self) -> None:
        """Give cached device memory back, after the device ran out of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _features(self, tiles: Tensor) -> Tensor:
        if self._graphs is None:
            return self._compute(tiles, lambda pixels: self._model(pixels, self._link.mark))
        first, *_ = self._graphs.run(tiles, self._link.mark)
        return first if self.config.flash is None else self._each(first, self._model.project)

    def _see(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        if self._graphs is not None:
            patches, scores = self._graphs.run(tiles, self._link.mark)
            return patches, scores
        patches = self._compute(tiles, lambda pixels: self._model.see(pixels, self._link.mark))
        return patches, self._each(patches, self._model.score)

    def _states(self, pixels: Tensor) -> Tensor:
        states: Tensor = self._model.vision_model(pixels, self._link.mark)
        return states

    def _encode_at_once(self, tiles: Tensor) -> tuple[Tensor]:
        """What is captured: tiles ``[n, S, S, 3]`` uint8 on the device -> features."""
        return (self._model(self._pixels(tiles)),)

    def _see_at_once(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """What is captured of a Flash checkpoint: patches and scores."""
        patches = self._model.see(self._pixels(tiles))
        return patches, self._model.score(patches)

    def _compute(self, tiles: Tensor, tower: Callable[[Tensor], Tensor]) -> Tensor:
        self._run = lambda batch: tower(self._pixels(batch))
        return self._side_by_side(tiles) if self.device.type == "cpu" else self._each(tiles, self._run)

    def _each(self, batch: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """``run`` over a batch ``[n, ...]``: at once, or in pieces of the one size that is allowed."""
        if self._batch_size is None:
            return run(batch)
        pieces = torch.split(batch, self._batch_size)
        return torch.cat([run(_padded(piece, self._batch_size))[: len(piece)] for piece in pieces])

    def _pixels(self, tiles: Tensor) -> Tensor:
        """``(x / 255 - mean) / std`` in float32 as the reference transform does, of ``[n, S, S, 3]`` uint8."""
        pixels = tiles.permute(0, 3, 1, 2).to(torch.float32)
        return pixels.div_(255).sub_(self._mean).div_(self._std).to(self.dtype)


def _apart(batch: Tensor, sizes: list[int]) -> list[Tensor]:
    """The batch's parts. None of them keeps the others' memory."""
    return [part.clone() for part in torch.split(batch, sizes)] if len(sizes) > 1 else [batch]


def _padded(batch: Tensor, size: int) -> Tensor:
    if len(batch) == size:
        return batch
    return torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
