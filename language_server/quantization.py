"""Linear layers of the language model in eight bits: which way, and how they are filled while loading.

``bitsandbytes`` is LLM.int8(), what ``load_in_8bit=True`` means on InternVL's model cards, with the layers of that
library where transformers puts them. ``fp8`` is fine-grained FP8: a checkpoint that has such weights keeps them, those
of another are quantised. Embeddings, norms, the head and fused experts stay as they are. Knows nothing of attention.
"""

# mypy: disable-error-code="no-untyped-call"
import logging
import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_bitsandbytes_available

from common.model import fp8
from common.model.checkpoint import Checkpoint, RowSink
from common.model.config import InternVLConfig
from common.model.names import locate
from common.model.shards import TensorEntry
from common.service.errors import CheckpointError, ConfigError
from language_server.fp8_linear import BLOCK, Fp8Linear, Fp8Sink, can_multiply
from language_server.settings import QuantizationName

_LINEAR_WEIGHT: Final = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
_FUSED_EXPERTS: Final = frozenset({"gpt_oss", "qwen3_moe"})
_SCALE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Quantization:
    """One way to hold the linear layers of the decoder.

    Attributes:
        fp8_on_disk: parameters whose tensors are FP8 in the checkpoint. Those that do not stay FP8 are dequantised
            while loading.
        block: of FP8 weights.
        can_multiply: FP8 weights are multiplied as they are.
    """

    method: Literal["none", "bitsandbytes", "fp8"] = "none"
    fp8_on_disk: frozenset[str] = field(default=frozenset(), repr=False)
    block: fp8.Block = BLOCK
    can_multiply: bool = False

    def __str__(self) -> str:
        details = []
        if self.method == "fp8" and not self.can_multiply:
            details.append("weights only")
        if any(not self.holds(parameter) for parameter in self.fp8_on_disk):
            details.append("the rest dequantised" if self.method == "fp8" else "FP8 dequantised")
        return f"{self.method} ({', '.join(details)})" if details else self.method

    @property
    def is_capturable(self) -> bool:
        """Whether a step can become a CUDA graph: LLM.int8() looks for outliers and lets the host decide what then."""
        return self.method != "bitsandbytes"

    def holds(self, parameter: str) -> bool:
        """Whether a parameter is held in eight bits."""
        if self.method == "none" or not _LINEAR_WEIGHT.fullmatch(parameter):
            return False
        return self.method == "bitsandbytes" or not self.fp8_on_disk or parameter in self.fp8_on_disk

    def num_bytes(self, parameter: str, entry: TensorEntry) -> int | None:
        """What a tensor on disk takes in memory, its scales included; None if it is not held in eight bits."""
        if not self.holds(parameter):
            return None
        rows, columns = entry.shape
        num_scales = rows
        if self.method == "fp8":
            num_block_rows, num_block_columns = fp8.scale_shape(rows, columns, self.block)
            num_scales = num_block_rows * num_block_columns
        return rows * columns + _SCALE_BYTES * num_scales

    def replace_linears(self, model: Any, device: torch.device) -> None:
        """Put quantised layers into a model on the meta device. Those of bitsandbytes get their memory at once."""
        if self.method == "bitsandbytes":
            _replace_by_int8(model, device)
        elif self.method == "fp8":
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and self.holds(f"{name}.weight"):
                    model.set_submodule(name, Fp8Linear(module, self.block, self.can_multiply))

    def sinks(self, model: nn.Module) -> dict[str, RowSink]:
        """What quantises weights while they are read, by parameter; none for weights that are read as they are."""
        if self.method == "none" or self.fp8_on_disk:
            return {}
        make = _Int8Sink if self.method == "bitsandbytes" else Fp8Sink
        modules = {f"{name}.weight": module for name, module in model.named_modules()}
        return {name: make(module) for name, module in modules.items() if self.holds(name)}


NOT_QUANTIZED: Final = Quantization()


def choose_quantization(
    name: QuantizationName,
    checkpoint: Checkpoint,
    config: InternVLConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Quantization:
    """What ``--quantization`` means for this checkpoint and this device, from the headers alone.

    ``auto`` keeps FP8 weights where they are multiplied as they are, and dequantises them elsewhere.

    Raises:
        ConfigError: the checkpoint cannot be quantised that way, or a package is missing.
        CheckpointError: FP8 weights without a word about their blocks.
    """
    on_disk = _fp8_on_disk(checkpoint)
    if on_disk and config.fp8_block is None:
        raise CheckpointError(
            f"config.json: tensor {min(on_disk)!r} is FP8, but no quantization_config says quant_method fp8"
        )
    block = (config.fp8_block if on_disk else None) or BLOCK
    if name == "auto":
        name = "fp8" if on_disk and block == BLOCK and can_multiply(device, dtype) else "none"
    if name == "none":
        return Quantization("none", on_disk)
    if not on_disk:
        _check_has_no_fused_experts(name, config)
    if name == "bitsandbytes":
        _check_bitsandbytes(on_disk)
        return Quantization("bitsandbytes")
    return Quantization("fp8", on_disk, block, block == BLOCK and can_multiply(device, dtype))


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is held in eight bits."""
    return any(parameter.itemsize == 1 for parameter in model.parameters())


def _fp8_on_disk(checkpoint: Checkpoint) -> frozenset[str]:
    located = (locate(entry.name) for entry in checkpoint.entries.values() if entry.dtype == "F8_E4M3")
    return frozenset(name for role, name, _ in located if role == "language")


def _check_has_no_fused_experts(name: str, config: InternVLConfig) -> None:
    model_type = config.text["model_type"]
    if model_type in _FUSED_EXPERTS:
        raise ConfigError(
            f"--quantization {name} quantises linear layers, and the weights of {model_type!r} are mostly experts: "
            "use --quantization none"
        )


def _check_bitsandbytes(on_disk: frozenset[str]) -> None:
    if on_disk:
        raise ConfigError("--quantization bitsandbytes: this checkpoint's weights are FP8; allowed: auto, none, fp8")
    if not is_bitsandbytes_available():
        raise ConfigError("--quantization bitsandbytes needs a package: pip install 'dvd-serve[bitsandbytes]'")


def _replace_by_int8(model: Any, device: torch.device) -> None:
    """As transformers does for ``load_in_8bit=True``, with empty int8 weights instead of full ones to be quantised."""
    bitsandbytes = _import_bitsandbytes()
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_8bit=True), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    for module in model.modules():
        if not isinstance(module, bitsandbytes.nn.Linear8bitLt):
            continue
        values = torch.empty(module.weight.shape, dtype=torch.int8, device=device)
        scales = torch.empty(module.out_features, dtype=torch.float32, device=device)
        module.weight = bitsandbytes.nn.Int8Params(
            values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
        )
        if module.bias is not None:  # made in torch's default dtype
            module.bias = nn.Parameter(module.bias.to(model.dtype), requires_grad=False)


def _import_bitsandbytes() -> Any:
    """Takes a second, hence not at the top. It warns of every product that is not float16, at each step."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


class _Int8Sink:
    """Quantises a weight row by row while it is read, as the library does with a whole one."""

    row_multiple = 1

    def __init__(self, linear: Any) -> None:
        self._values, self._scales = linear.weight.CB, linear.weight.SCB
        self._quantize = _import_bitsandbytes().functional.int8_vectorwise_quant

    def put(self, first_row: int, rows: Tensor) -> None:
        """Rows [num_rows, in_features] of the weight."""
        last_row = first_row + len(rows)
        values, scales, _ = self._quantize(rows.to(self._values.device, torch.float16))
        self._values[first_row:last_row], self._scales[first_row:last_row] = values, scales
