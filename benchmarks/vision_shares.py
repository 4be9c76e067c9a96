"""How much of what a card can do the vision engine gets out of it, in the shapes of released towers.

The card is measured first (card.py). Then batches of 1 to 32 tiles through tower and projector, from 8-bit tiles in
host memory to features in host memory, as a share of the operations that their matrix products and attention take.
Weights are random, written and loaded as any checkpoint. A trace shows which kernels ran, and what overlapped.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile

from benchmarks.card import Card, measure_card, seconds
from benchmarks.random_checkpoint import SHAPES as MODELS
from benchmarks.random_checkpoint import Shape, write_checkpoint
from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.tables import NONE, Table, number
from benchmarks.vision_subjects import random_tiles
from common.model.config import InternVLConfig, load_config
from common.model.device import DtypeName
from vision_server.encoder import VisionEncoder

SHAPES: Final[Mapping[str, Shape]] = {"tiny": MODELS["tiny"], "300M": MODELS["8B"], "6B": MODELS["38B"]}
"""Towers, with the projectors of models that have them."""
BATCHES: Final = (1, 2, 4, 8, 16, 32)
_TARGETS: Final = {("300M", 32): 0.4, ("6B", 32): 0.55}
_ROUNDS: Final = 5


def measure_shares(
    argv: Sequence[str],
    shape: str,
    dtype: DtypeName,
    device: torch.device,
    trace_file: Path | None,
    results: Path | None,
    batches: Sequence[int] = BATCHES,
) -> None:
    """Print the shares of the card's speed, and write them to ``results``; the largest batch once more for a trace."""
    card = measure_card(device)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), _without_language(SHAPES[shape]))
        config = load_config(Path(folder))
        encoder = VisionEncoder(config, str(device), dtype)
        encoder.load(Path(folder))
    encoder.warm_up(max(batches))
    tiles = random_tiles(max(batches), config.tiling.tile_size)
    records = [_measured(encoder, tiles[:batch], config, card, device) for batch in batches]
    print_table(Console(width=120), shares_table(shape, card, records))
    if trace_file:
        trace(trace_file, lambda: encoder.encode(tiles))
    if results:
        print(write_record(results, "vision", argv, records, f"{shape}-{device.type}"))


def operations_per_tile(config: InternVLConfig) -> int:
    """Of matrix products and attention, a multiplication and an addition count as two; all layers, and ``mlp1``."""
    vision, side = config.vision, config.tiling.tile_size
    num_patches, size = (side // vision.patch_size) ** 2, vision.hidden_size
    num_tokens = num_patches + 1
    embedding = num_patches * vision.num_channels * vision.patch_size**2 * size
    products = num_tokens * (4 * size**2 + 2 * size * vision.intermediate_size)
    attention = 2 * num_tokens**2 * size
    shuffled = size * num_patches // config.tokens_per_tile
    projector = config.tokens_per_tile * config.text_hidden_size * (shuffled + config.text_hidden_size)
    return 2 * (embedding + vision.num_hidden_layers * (products + attention) + projector)


def shares_table(shape: str, card: Card, records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for record in records:
        target = _TARGETS.get((shape, record["tiles"]))
        figures = [number(record["seconds"] * 1e3), number(record["tiles_per_s"]), f"{record['share']:.0%}"]
        rows.append([str(record["tiles"]), *figures, NONE if target is None else f"{target:.0%}"])
    title = f"InternViT {shape}, random weights, {card.name}"
    note = f"multiplies {card.matmul_flop_per_s / 1e12:.1f} TFLOP/s in bfloat16"
    return Table(title, ["tiles", "ms", "tiles/s", "share", "target"], rows, notes=[note])


def trace(path: Path, work: Callable[[], object]) -> None:
    """What ``work`` does on CPU and GPU, as a file for chrome://tracing or Perfetto; a first time only warms up."""
    work()
    every_thread = _ExperimentalConfig(profile_all_threads=True)  # else only this one's operations are seen
    with profile(experimental_config=every_thread) as profiler:
        work()
    profiler.export_chrome_trace(str(path))


def _measured(
    encoder: VisionEncoder, tiles: Any, config: InternVLConfig, card: Card, device: torch.device
) -> dict[str, Any]:
    took = seconds(lambda: encoder.encode(tiles), device, _ROUNDS)
    operations = operations_per_tile(config) * len(tiles)
    return {
        "tiles": len(tiles),
        "seconds": took,
        "tiles_per_s": len(tiles) / took,
        "operations": operations,
        "share": operations / took / card.matmul_flop_per_s,
        **asdict(card),
    }


def _without_language(shape: Shape) -> Shape:
    """As little of a language model as a checkpoint can have. The projector's width is that of the real one."""
    return replace(shape, text=replace(shape.text, layers=1, heads=1, kv_heads=1, mlp=1, vocab=2048))
