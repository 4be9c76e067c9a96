"""Whether a GPU computes the features it should: the vision half of gpu_parity.py.

Random towers in released shapes. In bfloat16 on the device, as it comes and with CUDA graphs, against float32 on the
CPU; batch-invariant features against themselves in another company, bit for bit; and the way of Flash checkpoints.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.random_checkpoint import SHAPES as MODELS
from benchmarks.random_checkpoint import Shape, write_checkpoint
from benchmarks.vision_subjects import random_tiles
from common.model.config import load_config
from common.model.device import DtypeName
from common.model.graphs import CudaCapture, Repeat
from vision_server.encoder import Kind, Seen, VisionEncoder
from vision_server.tiling import Tiles

_LIMIT: Final = 3e-2
"""In bfloat16, of the norm of the difference over the norm of what is right: residuals of many layers are rounded."""
_MAX_TILES: Final = 4
_BATCHES: Final = (1, 3, 6)
"""Tiles: a graph, a graph with a black tile or two graphs, and more than one batch."""

Case = dict[str, Any]


def _without_language(shape: Shape) -> Shape:
    return replace(shape, text=replace(shape.text, layers=1, heads=1, kv_heads=1, mlp=1, vocab=2048))


_300M: Final = _without_language(MODELS["8B"])
_6B: Final = _without_language(MODELS["38B"])
SHAPES: Final[Mapping[str, Shape]] = {
    "300M": _300M,
    "300M Flash": replace(_300M, is_flash=True),
    "6B, 6 layers": replace(_6B, vision=replace(_6B.vision, layers=6)),
}


def vision_cases(device: torch.device) -> Iterator[Case]:
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), shape)
            for case in _shape_cases(Path(folder), device, "patches" if shape.is_flash else "features"):
                yield case | {"what": f"{name}, {case['what']}"}


def _shape_cases(path: Path, device: torch.device, kind: Kind) -> Iterator[Case]:
    exact = _encoder(path, torch.device("cpu"), "float32")
    tiles = random_tiles(max(_BATCHES), exact.config.tiling.tile_size)
    expected = _rows(exact, kind, [tiles])
    encoder = _encoder(path, device)
    yield _case("eager", _rows(encoder, kind, [tiles]), expected)
    yield _case("flash attention alone", _with_flash_attention(encoder, kind, tiles), expected)
    if device.type == "cuda":
        yield _case("compiled", _rows(_encoder(path, device, compile_layers=True), kind, [tiles]), expected)
    encoder.capture_graphs(_MAX_TILES, _capture(device))
    for num_tiles in _BATCHES:
        yield _case(f"graphs, {num_tiles} tiles", _rows(encoder, kind, [tiles[:num_tiles]]), expected[:num_tiles])
    yield _equal("two batches under way", _overlapped(encoder, kind, tiles), _rows(encoder, kind, [tiles]))
    if kind == "patches":
        yield from _route_cases(encoder, exact, tiles)
    yield from _invariant_cases(path, device, kind, tiles)


def _route_cases(encoder: VisionEncoder, exact: VisionEncoder, tiles: Tiles) -> Iterator[Case]:
    """Scores, and features through both projectors."""
    (seen,), (expected,) = (each.launch("patches", [tiles]).result() for each in (encoder, exact))
    assert isinstance(seen, Seen) and isinstance(expected, Seen)
    yield _case("scores", seen.scores, expected.scores)
    compressed = [index % 2 == 1 for index in range(len(tiles))]
    projected = [
        each.project(list(of.patches), compressed).result() for each, of in ((encoder, seen), (exact, expected))
    ]
    yield _case("projected", *(each.rows for each in projected))


def _invariant_cases(path: Path, device: torch.device, kind: Kind, tiles: Tiles) -> Iterator[Case]:
    """The first tile alone, among others, and in another place."""
    encoder = _encoder(path, device, is_batch_invariant=True)
    alone = _rows(encoder, kind, [tiles[:1]])
    yield _equal("batch-invariant, among others", _rows(encoder, kind, [tiles])[:1], alone)
    yield _equal("batch-invariant, last of all", _rows(encoder, kind, [tiles[::-1].copy()])[-1:], alone)
    encoder.capture_graphs(_MAX_TILES, _capture(device))
    yield _equal("batch-invariant, graphs", _rows(encoder, kind, [tiles])[:1], alone)


def _encoder(path: Path, device: torch.device, dtype: DtypeName = "bfloat16", **options: Any) -> VisionEncoder:
    encoder = VisionEncoder(load_config(path), str(device), dtype, **options)
    encoder.load(path)
    return encoder


def _capture(device: torch.device) -> Any:
    return CudaCapture() if device.type == "cuda" else Repeat


def _with_flash_attention(encoder: VisionEncoder, kind: Kind, tiles: Tiles) -> Tensor:
    """NaN if torch finds no flash attention for the tower's heads as they lie in memory."""
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _rows(encoder, kind, [tiles])
    except RuntimeError:
        return torch.full((1,), torch.nan)


def _overlapped(encoder: VisionEncoder, kind: Kind, tiles: Tiles) -> Tensor:
    """Again and again, so that one batch is uploaded and another downloaded while a third is computed."""
    pending = [encoder.launch(kind, [tiles]) for _ in range(encoder.depth)]
    for _ in range(3):
        pending.pop(0).result()
        pending.append(encoder.launch(kind, [tiles[:2], tiles[2:]]))
    return _joined(pending[-1].result())


def _rows(encoder: VisionEncoder, kind: Kind, parts: Sequence[Tiles]) -> Tensor:
    """In host memory, one tile behind another."""
    return _joined(encoder.launch(kind, parts).result())


def _joined(results: Sequence[Tensor | Seen]) -> Tensor:
    return torch.cat([(each.patches if isinstance(each, Seen) else each).to("cpu", torch.float32) for each in results])


def _case(what: str, actual: Tensor, expected: Tensor) -> Case:
    """NaN stays NaN, which is within no limit."""
    if actual.shape != expected.shape:
        return {"what": what, "error": torch.nan, "limit": _LIMIT}
    difference = actual.double() - expected.double()
    return {"what": what, "error": float(difference.norm() / expected.double().norm()), "limit": _LIMIT}


def _equal(what: str, actual: Tensor, expected: Tensor) -> Case:
    """Bit for bit."""
    return _case(what, actual, expected) | {"limit": 0.0}
