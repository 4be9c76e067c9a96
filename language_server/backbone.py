"""The language model: a transformers ``*ForCausalLM`` whose attention reads our paged KV cache.

Built on the meta device, so that weights are allocated once, where they are needed, and filled tensor by tensor.
Knows nothing of scheduling, sampling or images.
"""

# mypy: disable-error-code="no-untyped-call"
from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.model.checkpoint import Checkpoint, load_role
from common.model.config import InternVLConfig
from common.model.fp8 import SCALE_SUFFIX
from common.service.errors import CheckpointError
from language_server.attention import paged, triton_paged
from language_server.attention.base import KVShape
from language_server.attention.paged import ForwardContext
from language_server.fused import can_fuse, fuse_layers
from language_server.fused_cuda import fuse_layers_for_cuda
from language_server.quantization import NOT_QUANTIZED, Quantization, is_quantized

SUPPORTED_MODEL_TYPES = frozenset({"qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3"})

# Keys of published text configs that say how somebody once ran the model, not what it is.
_RUN_TIME_KEYS = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "auto_map",
        "dtype",
        "model_type",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class LanguageBackbone:
    """What the model runner calls. Wraps a causal language model that was made for ``paged`` attention."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self._config = model.config
        weight = model.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.vocab_size: int = weight.shape[0]
        self.hidden_size: int = weight.shape[1]

    @property
    def kv_shape(self) -> KVShape:
        config = self._config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KVShape(config.num_hidden_layers, config.num_key_value_heads, head_dim, self.dtype)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden_size]."""
        embeds: torch.Tensor = self.model.get_input_embeddings()(token_ids)
        return embeds

    def forward(self, inputs_embeds: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Packed [num_tokens, hidden_size] -> hidden states after the last norm, the same shape."""
        output = self.model.model(
            inputs_embeds=inputs_embeds.unsqueeze(0),
            position_ids=context.layout.position_ids.unsqueeze(0),
            use_cache=False,
            paged=context,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.squeeze(0)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size] float32."""
        logits: torch.Tensor = self.model.lm_head(hidden)
        return logits.float()


def load_backbone(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = NOT_QUANTIZED,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageBackbone:
    """The language model of a checkpoint, on ``device``. Peak memory is the weights and one tensor.

    Raises:
        CheckpointError: an unsupported text config, or tensors that do not fit it.
    """
    model = build_model(
        config.text,
        config.tie_word_embeddings,
        dtype=dtype,
        device=device,
        on_meta=lambda model: quantization.replace_linears(model, device),
    )
    sinks = quantization.sinks(model)
    filled_by_sinks = {name + SCALE_SUFFIX for name in sinks}
    parameters = {name: each for name, each in model.named_parameters() if name not in filled_by_sinks}
    load_role(checkpoint, config, "language", parameters, sinks=sinks, progress=progress)
    return make_backbone(model)


def make_backbone(model: Any) -> LanguageBackbone:
    """Of a filled model, which gives up its layers where there are quicker ones."""
    if can_fuse(model.config) and not is_quantized(model):
        if model.device.type == "cpu":
            fuse_layers(model)
        elif triton_paged.is_available():
            fuse_layers_for_cuda(model)
    return LanguageBackbone(model)


def build_model(
    text_config: Mapping[str, Any],
    tie_word_embeddings: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_meta: Callable[[Any], None] = lambda model: None,
) -> nn.Module:
    """An unfilled ``*ForCausalLM`` for a text config as found on disk. Raises CheckpointError for a foreign one.

    ``on_meta`` may replace or shrink parameters while they take no memory yet.
    """
    paged.register()
    config = make_text_config(text_config, tie_word_embeddings)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=paged.NAME, dtype=dtype)
    on_meta(model)
    _materialise(model, device)
    _restore_computed_buffers(model, device)
    return model


def make_text_config(text_config: Mapping[str, Any], tie_word_embeddings: bool) -> Any:
    """transformers' config for a text config as found on disk. Raises CheckpointError for a foreign one."""
    model_type = text_config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(f"config.json: text model_type {str(model_type)[:64]!r} is not supported")
    values = {key: value for key, value in text_config.items() if key not in _RUN_TIME_KEYS}
    return _make_config(model_type, values | {"tie_word_embeddings": tie_word_embeddings})


def _make_config(model_type: str, values: Mapping[str, Any]) -> Any:
    try:
        return AutoConfig.for_model(model_type, **values)
    # A family that this release lacks, or a value that it refuses.
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json: transformers refuses text config {model_type!r}: {reason}") from error


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give every meta parameter memory, tied ones the same. ``Module.to_empty`` would untie them."""
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in real:
                real[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            setattr(module, name, real[id(parameter)])


def _restore_computed_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute again what the meta device cannot hold: rotary frequencies, which no checkpoint contains."""
    for module in model.modules():
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if not hasattr(module, "inv_freq"):
            raise CheckpointError(f"{type(module).__name__}: this release of transformers has buffers we cannot fill")
        with torch.device(device):
            fresh = type(module)(module.config)
        for name, buffer in fresh.named_buffers(recurse=False):
            setattr(module, name, buffer)
