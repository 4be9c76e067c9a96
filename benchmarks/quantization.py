"""Language weights in eight bits on one device: are the products right, how far are the logits, what does it save?

    python -m benchmarks quantization --shape 1B --device cuda --results benchmarks/results

First single layers, each beside its own weight dequantised; then whole models with random weights, each beside the one
that is not quantised: ``bitsandbytes``, ``fp8`` quantised while loading, and a checkpoint that is FP8 on disk as
``auto`` takes it, beside the same dequantised. Exit status 1 when anything is further off than eight bits explain.
"""

import argparse
import gc
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, get_args

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.engine_subjects import OurEngine, random_prompts
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.systems import Dtype
from benchmarks.tables import Table, number
from common.model import fp8, memory
from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from language_server.attention import choose_backend
from language_server.attention.base import BatchLayout, KVCache
from language_server.attention.paged import ForwardContext
from language_server.backbone import LanguageBackbone, load_backbone
from language_server.fp8_linear import BLOCK, Fp8Linear, can_multiply
from language_server.quantization import choose_quantization
from language_server.settings import QuantizationName

LAYER_LIMIT: Final = 0.06
"""Of relative RMS: FP8 rounds weights not at all here and activations by up to 1/16, 1/40 on average."""
MODEL_LIMIT: Final = 0.25
_LAYERS: Final = ((1, 128, 128), (3, 896, 1152), (17, 4096, 1024), (130, 512, 2560), (5, 100, 300))
"""Rows, columns in, columns out: few and many rows, blocks that do not come in fours, edges."""
_PROMPT_TOKENS: Final = 128
_BLOCK_SIZE: Final = 16
_BATCHES: Final = (1, 16)
_DECODE_TOKENS: Final = 32
_PREFILL_TOKENS: Final = 2048
_CASES: Final[tuple[tuple[str, bool, QuantizationName], ...]] = (
    ("not quantised", False, "none"),
    ("bitsandbytes", False, "bitsandbytes"),
    ("fp8 while loading", False, "fp8"),
    ("FP8 on disk, dequantised", True, "none"),
    ("FP8 on disk, auto", True, "auto"),
    ("FP8 on disk, fp8", True, "fp8"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """``deviation``: RMS of the difference to what it is compared with over RMS of that; 0 for the standard itself."""

    name: str
    quantization: str
    deviation: float
    same_tokens: float = 1.0
    weight_bytes: int = 0
    decode_ms: tuple[float, ...] = ()
    prefill_ms: float = 0.0


def measure_layers(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Scales that differ from block to block by up to a hundred, so that a mixed-up one shows."""
    generator = torch.Generator().manual_seed(0)
    for num_rows, width_in, width_out in _LAYERS:
        weight = torch.randn(width_out, width_in, generator=generator) * _factors(
            (width_out, width_in), BLOCK, generator
        )
        rows = torch.randn(num_rows, width_in, generator=generator) * _factors(
            (num_rows, width_in), (1, 128), generator
        )
        bias = torch.randn(width_out, generator=generator)
        layer = _fp8_layer(weight, bias, device, dtype)
        with torch.inference_mode():
            found = layer(rows.to(device, dtype))
            held = fp8.dequantize(layer.weight, layer.weight_scale_inv, BLOCK)
            expected = F.linear(rows.to(device, dtype).float(), held, bias.to(device, dtype).float())
        how = "fp8" if layer.can_multiply else "fp8 (weights only)"
        yield Finding(f"{num_rows} x {width_in} -> {width_out}", how, _deviation(found, expected))


def measure_models(directory: Path, shape: str, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Every case, beside the one of the same checkpoint that is not quantised."""
    plain, shipped = directory / "plain", directory / "fp8"
    write_checkpoint(plain, SHAPES[shape])
    _ship_fp8(plain, shipped)
    expected: dict[bool, Tensor] = {}
    for name, is_shipped, option in _CASES:
        backbone, said, num_bytes = _load(shipped if is_shipped else plain, option, device, dtype)
        logits = _logits(backbone)
        standard = expected.setdefault(is_shipped, logits)
        same = (logits.argmax(-1) == standard.argmax(-1)).float().mean().item()
        deviation = _deviation(logits, standard)
        engine = OurEngine(backbone)
        decode = tuple(min(engine.decode(batch, _DECODE_TOKENS) for _ in range(3)) for batch in _BATCHES)
        prefill = min(engine.prefill(_PREFILL_TOKENS) for _ in range(3))
        milliseconds = tuple(1e3 * seconds / _DECODE_TOKENS for seconds in decode)
        yield Finding(name, said, deviation, same, num_bytes, milliseconds, 1e3 * prefill)
        del backbone, engine  # the next one's KV memory is a share of what is free
        gc.collect()
        torch.cuda.empty_cache()


def tables(layers: Sequence[Finding], models: Sequence[Finding], shape: str) -> list[Table]:
    """What is printed."""
    of_layers = [[each.name, each.quantization, f"{each.deviation:.4f}"] for each in layers]
    of_models = [
        [
            each.name,
            each.quantization,
            f"{each.weight_bytes / 1e9:.2f}",
            f"{each.deviation:.4f}",
            f"{100 * each.same_tokens:.0f}",
            *map(number, (*each.decode_ms, each.prefill_ms)),
        ]
        for each in models
    ]
    steps = [f"decode, batch {batch}, ms" for batch in _BATCHES]
    columns = ["", "held as", "weights, GB", "deviation", "same token, %", *steps, f"prefill {_PREFILL_TOKENS}, ms"]
    return [
        Table("One layer beside its weight dequantised", ["", "held as", "deviation"], of_layers, num_labels=2),
        Table(f"{shape}, random weights", columns, of_models, num_labels=2),
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quantization", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1B", help="which model's; `tiny` tries the script out")
    parser.add_argument("--device", default="cpu", help="such as cuda:0")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--directory", type=Path, help="keep the checkpoints here, and use them if they are there")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    layers = list(measure_layers(device, dtype))
    with tempfile.TemporaryDirectory(prefix="dvd-quantization-") as temporary:
        directory = arguments.directory or Path(temporary)
        models = list(measure_models(directory, arguments.shape, device, dtype))
    for table in tables(layers, models, arguments.shape):
        print_table(Console(width=140), table)
    print(f"FP8 is multiplied as it is on {device}: {can_multiply(device, dtype)}")
    if arguments.results:
        found = {"layers": [asdict(each) for each in layers], "models": [asdict(each) for each in models]}
        print(write_record(arguments.results, "quantization", argv, found, f"{arguments.shape}-{arguments.dtype}"))
    complaints = too_far(layers, models)
    print("\n".join(complaints) or "everything is as close as eight bits allow")
    return 1 if complaints else 0


def too_far(layers: Sequence[Finding], models: Sequence[Finding]) -> list[str]:
    """A line for each finding beyond its limit; not a number is beyond."""
    beyond = [each for each in layers if not each.deviation < LAYER_LIMIT]
    beyond += [each for each in models if not each.deviation < MODEL_LIMIT]
    return [f"too far off: {each.name} ({each.quantization}): {each.deviation:.4f}" for each in beyond]


def _fp8_layer(weight: Tensor, bias: Tensor, device: torch.device, dtype: torch.dtype) -> Fp8Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=device, dtype=dtype)
    layer = Fp8Linear(linear.requires_grad_(False), BLOCK, can_multiply(device, dtype))
    values, scales = fp8.quantize(weight, BLOCK)
    layer.weight.copy_(values)
    layer.weight_scale_inv.copy_(scales)
    linear.bias.copy_(bias)
    return layer


def _factors(shape: tuple[int, int], block: fp8.Block, generator: torch.Generator) -> Tensor:
    """One for each block, from 0.1 to 10."""
    exponents = 2 * torch.rand(fp8.scale_shape(*shape, block), generator=generator) - 1
    factors = (10**exponents).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return factors[: shape[0], : shape[1]]


def _deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _load(path: Path, option: QuantizationName, device: torch.device, dtype: torch.dtype) -> tuple[Any, str, int]:
    """(backbone, what it is quantised as, bytes of its weights)"""
    checkpoint, config = Checkpoint.open(path), load_config(path)
    quantization = choose_quantization(option, checkpoint, config, dtype=dtype, device=device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    backbone = load_backbone(checkpoint, config, dtype=dtype, device=device, quantization=quantization)
    num_bytes = memory.weight_bytes(checkpoint, "language", dtype, quantization.num_bytes)
    if device.type == "cuda":
        num_bytes = torch.cuda.memory_allocated(device) - before
    return backbone, str(quantization), num_bytes


@torch.inference_mode()
def _logits(backbone: LanguageBackbone) -> Tensor:
    """[num_tokens, vocab_size] of one prompt in one step."""
    (prompt,) = random_prompts(1, _PROMPT_TOKENS, backbone.vocab_size)
    token_ids, device = torch.tensor(prompt, device=backbone.device), backbone.device
    num_blocks = _PROMPT_TOKENS // _BLOCK_SIZE
    positions, table = torch.arange(_PROMPT_TOKENS, device=device), torch.arange(num_blocks, device=device)
    layout = BatchLayout([_PROMPT_TOKENS], [_PROMPT_TOKENS], positions, table.unsqueeze(0), _BLOCK_SIZE)
    cache = KVCache(backbone.kv_shape, num_blocks, _BLOCK_SIZE, device)
    context = ForwardContext.of(layout, cache, choose_backend(device))
    return backbone.logits(backbone.forward(backbone.embed(token_ids), context))


def _ship_fp8(plain: Path, shipped: Path) -> None:
    """The same checkpoint with its linear layers in FP8, unless it is there already."""
    if (shipped / "config.json").exists():
        return
    shipped.mkdir()
    weight_map: dict[str, str] = {}
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, shipped)
            continue
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if name.startswith("language_model") and name.endswith("_proj.weight"):
                tensors[name], tensors[name + fp8.SCALE_SUFFIX] = fp8.quantize(tensor, BLOCK)
            else:
                tensors[name] = tensor
        save_file(tensors, shipped / file.name)
        weight_map |= dict.fromkeys(tensors, file.name)
    (shipped / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    config = json.loads((plain / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (shipped / "config.json").write_text(json.dumps(config), encoding="utf-8")
