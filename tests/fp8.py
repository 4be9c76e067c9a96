"""Turns a checkpoint into one with fine-grained FP8 weights, block by block, as published ones have them."""

import json

import torch
from safetensors.torch import load_file, save_file

MAX = 448.0


def is_quantized(name: str) -> bool:
    """The language model's linear layers, as in Qwen3-FP8; its head and the vision side stay."""
    return "language_model" in name and name.endswith("_proj.weight")


def quantize_checkpoint(path, block, *, scale_dtype=torch.float32, which=is_quantized, config_key=None):
    """Rewrite the one safetensors file and ``config.json`` of the checkpoint in ``path``.

    ``config_key``: put the quantization_config into that section instead of the top.
    """
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if which(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor, block, scale_dtype)
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")
    declare(path, {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}, config_key)


def declare(path, quantization, config_key=None):
    config = json.loads((path / "config.json").read_text())
    section = config[config_key] if config_key else config
    section["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))


def quantize(matrix, block, scale_dtype=torch.float32):
    """(FP8 values, scales), one block at a time."""
    rows, columns = matrix.shape
    values = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=scale_dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = matrix[place].abs().max() / MAX
            values[place] = (matrix[place] / scales[i, j].float()).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    return values, scales


def dequantize(values, scales, block):
    """float32, one block at a time."""
    result = torch.empty(values.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            result[place] = values[place].float() * scales[i, j].float()
    return result
