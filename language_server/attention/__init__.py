"""Attention over paged KV memory: one interface (base), a module per backend, one bridge into transformers (paged)."""

import torch

from language_server.attention import flash, triton_paged
from language_server.attention.base import AttentionBackend
from language_server.attention.cpu import CpuBackend
from language_server.attention.sdpa import SdpaBackend


def choose_backend(device: torch.device) -> AttentionBackend:
    """The fastest backend that works here."""
    if device.type == "cuda" and flash.is_available():
        return flash.FlashBackend()
    if device.type == "cuda" and triton_paged.is_available():
        return triton_paged.TritonBackend.on(device)
    return CpuBackend() if device.type == "cpu" else SdpaBackend()
