# mypy: disable-error-code="no-any-return,no-untyped-call"
"""InternViT: tiles in, one hidden state per patch out. 300M and 6B shapes, and every shape between.

Parameter names are those of the GitHub checkpoints below ``vision_model.``, so a checkpoint fills this module as it is
on disk. Source: InternVL.md 3.2 (shapes) and 4.1 (names); numerically the transformers ``InternVLVisionModel``.
Knows nothing of projectors, images or batches.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.model.config import VisionConfig
from common.service.errors import CheckpointError
from vision_server.attention import attend
from vision_server.cpu_tower import CpuLayer, PatchProduct, run_layers

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,  # exact (erf), as every published checkpoint
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def make_activation(name: str) -> nn.Module:
    """Raises CheckpointError on an activation no InternVL checkpoint uses."""
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"activation {name[:64]!r} is none of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


def make_norm(config: VisionConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Embeddings(nn.Module):
    """Pixels ``[n, 3, S, S]`` -> ``[n, 1 + patches, hidden]``, class token first.

    ``S`` may differ from the ``image_size`` the positions were trained at (``force_image_size``).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + num_patches, config.hidden_size))
        self._product: PatchProduct | None = None

    def pack(self) -> None:
        self._product = PatchProduct(self.patch_embedding)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self._embed_patches(pixels)
        positions = _resized(self.position_embedding, patches.shape[1])
        hidden = patches.new_empty(patches.shape[0], positions.shape[1], positions.shape[2])
        hidden[:, :1] = self.class_embedding + positions[:, :1]
        torch.add(patches, positions[:, 1:], out=hidden[:, 1:])
        return hidden

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(pixels)
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2)


def _resized(positions: Tensor, num_patches: int) -> Tensor:
    """Positions ``[1, 1 + p, hidden]`` for another square of patches: bicubic, class token untouched."""
    trained, wanted = math.isqrt(positions.shape[1] - 1), math.isqrt(num_patches)
    if trained == wanted:
        return positions
    square = positions[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], square.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


class Attention(nn.Module):
    """Full attention over one tile. ``q_norm`` and ``k_norm`` span all heads: they come before the head split."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size)
        self.q_norm = nn.RMSNorm(size, eps=config.layer_norm_eps) if config.qk_normalization else nn.Identity()
        self.k_norm = nn.RMSNorm(size, eps=config.layer_norm_eps) if config.qk_normalization else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        heads = (self._split(self.q_norm(query)), self._split(self.k_norm(key)), self._split(value))
        return self.proj(attend(*heads))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = make_activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class Layer(nn.Module):
    """Pre-norm block with layer scale."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = torch.addcmul(hidden, self.attn(self.norm1(hidden)), self.ls1)
        return torch.addcmul(hidden, self.mlp(self.norm2(hidden)), self.ls2)


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class InternViT(nn.Module):
    """The tower, without a final norm.

    Args:
        select_layer: which hidden state is the output, as an index into (embeddings, layer 1, ..., layer N);
            -1 is the last layer. Layers behind it are held, because checkpoints have them, but never run.
    """

    def __init__(self, config: VisionConfig, select_layer: int = -1) -> None:
        super().__init__()
        num_states = config.num_hidden_layers + 1
        if not -num_states <= select_layer < num_states:
            raise CheckpointError(f"select_layer {select_layer} of a tower with {config.num_hidden_layers} layers")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.num_layers_run = select_layer % num_states
        self._activation = config.hidden_act
        self._cpu_layers: list[CpuLayer] | None = None

    def pack(self) -> None:
        """From now on, compute by cpu_tower.py, with the weights there are now; on other devices, change nothing.

        For a loaded model that only infers: packed weights cannot be trained, saved, loaded or moved. One matrix is in
        memory twice, for a moment. A second call does nothing.
        """
        if self.embeddings.class_embedding.device.type != "cpu" or self._cpu_layers is not None:
            return
        self.embeddings.pack()
        run = list(self.encoder.layers)[: self.num_layers_run]
        self._cpu_layers = [CpuLayer(layer, self._activation) for layer in run]

    def forward(self, pixels: Tensor, on_layer: Callable[[], None] = lambda: None) -> Tensor:
        """Normalised pixels ``[n, 3, S, S]`` -> ``[n, 1 + patches, hidden]``, class token first, then row-major.

        ``on_layer`` is called after each layer: a sign of life where one batch takes long.
        """
        hidden = self.embeddings(pixels)
        if self._cpu_layers is not None:
            return run_layers(self._cpu_layers, hidden, on_layer)
        for layer in self.encoder.layers[: self.num_layers_run]:
            hidden = layer(hidden)
            on_layer()
        return hidden
