"""What ``benchmarks vision`` compares: vision parts of one checkpoint, ours, transformers' and vLLM's.

All encode the same tiles: ours from 8-bit tiles, as a server has them, the others from normalised pixels. Ours and
vLLM's also do the same picture, from JPEG.
"""

import io
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.systems import Dtype
from common.model.config import load_config
from common.service.errors import ConfigError, Unavailable
from vision_server.encoder import VisionEncoder
from vision_server.media import decode, open_image
from vision_server.tiling import Tiles, make_tiles

PICTURE_SIDE: Final = 896
PICTURE_TILES: Final = 5
_SEED: Final = 0
_PEER: Final = Path(__file__).with_name("vision_peer.py")
_PRODUCT_SIDE: Final = 2048
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Took:
    """``processor_seconds`` of all threads: who shares the cores with others sees both."""

    seconds: float
    processor_seconds: float


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that can be timed."""

    name: str
    run: Callable[[], Took]


class Encoder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def features(self) -> Tensor:
        """``[num_tiles, tokens per tile, hidden]`` float32, to see that all do the same."""

    def encode(self) -> Took:
        """The tiles, once."""


def random_tiles(num_tiles: int, side: int) -> Tiles:
    """The same at every call."""
    return np.random.default_rng(_SEED).integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8)


def pictures(num_pictures: int) -> list[bytes]:
    """JPEG of four tiles and a thumbnail, all different, the same at every call."""
    generator = np.random.default_rng(_SEED)
    return [_jpeg(generator) for _ in range(num_pictures)]


def pixels_of(tiles: Tiles) -> Tensor:
    """``[n, S, S, 3]`` uint8 -> ``[n, 3, S, S]`` float32, normalised as published models want it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return ((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()


class Ours:
    """``VisionEncoder.encode``, from bytes."""

    name = "DvD"

    def __init__(self, path: Path, dtype: Dtype, tiles: Tiles) -> None:
        self._encoder = VisionEncoder(load_config(path), "cpu", dtype)
        self._encoder.load(path)
        self._encoder.warm_up()
        self._tiles = tiles
        self.features = self._encoder.encode(tiles).float()

    def encode(self) -> Took:
        return timed(lambda: self._encoder.encode(self._tiles))

    def picture(self, jpeg: bytes) -> Took:
        """From bytes to features."""
        tiling = self._encoder.config.tiling
        return timed(lambda: self._encoder.encode(make_tiles(decode(open_image(jpeg)), tiling)))


class Transformers:
    """``get_image_features``: tower, pixel shuffle and projector."""

    name = "transformers"

    def __init__(self, path: Path, dtype: Dtype, tiles: Tiles) -> None:
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.eval()
        self._pixels = pixels_of(tiles).to(model.dtype)
        self.features = self._run().float()

    def encode(self) -> Took:
        return timed(self._run)

    @torch.inference_mode()
    def _run(self) -> Tensor:
        features: Tensor = self._model.get_image_features(self._pixels).pooler_output
        return features


class Vllm:
    """vLLM in a process of its own, by the path of its Python. A context manager: the process ends with it."""

    name = "vLLM"

    def __init__(
        self, python: Path, path: Path, dtype: Dtype, tiles: Tiles, jpeg: bytes, program: Path = _PEER
    ) -> None:
        if not python.is_file():
            raise ConfigError(f"--vllm {python}: no such file")
        with ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
            pixels, features = folder / "pixels.safetensors", folder / "features.safetensors"
            picture = folder / "picture.jpeg"
            save_file({"pixels": pixels_of(tiles).to(getattr(torch, dtype))}, pixels)
            picture.write_bytes(jpeg)
            words = [python, program, "--model", path, "--dtype", dtype, "--threads", torch.get_num_threads()]
            words += ["--pixels", pixels, "--features", features, "--picture", picture]
            log = undo.enter_context((folder / "log").open("w+"))
            self._process = undo.enter_context(
                subprocess.Popen(
                    [*map(str, words)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, "PYTHONPATH": ""},
                )
            )
            undo.callback(self._process.kill)
            if self._answer() != "ready":
                log.seek(0)
                raise Unavailable(f"vLLM did not start: {log.read()[-400:]}")
            self.features = load_file(features)["features"]
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def encode(self) -> Took:
        return self._ask("pixels")

    def picture(self) -> Took:
        """What a request with it takes longer, to its first token, than one with as much text."""
        return self._ask("picture")

    def _ask(self, what: str) -> Took:
        assert self._process.stdin is not None  # a pipe
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        if not (answer := self._answer()):
            raise Unavailable("vLLM ended in the middle of the measurement")
        return Took(**json.loads(answer))

    def _answer(self) -> str:
        assert self._process.stdout is not None  # a pipe
        return self._process.stdout.readline().strip()


class Products:
    """Nothing but matrix products, square and warm, of about as many operations: what nobody can be quicker than."""

    name = "products alone"

    def __init__(self, dtype: Dtype, operations: float) -> None:
        side = min(_PRODUCT_SIDE, round((operations / 2) ** (1 / 3)))
        self._a, self._b = torch.randn(2, side, side, dtype=getattr(torch, dtype))
        self._num_products = operations / (2 * side**3)

    def run(self) -> Took:
        """Scaled to the operations that were asked for."""
        num_products = round(self._num_products)
        took = timed(lambda: [self._a @ self._b for _ in range(num_products)])
        scale = self._num_products / num_products
        return Took(took.seconds * scale, took.processor_seconds * scale)


def timed(work: Callable[[], object]) -> Took:
    started, used = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - started, time.process_time() - used)


def _jpeg(generator: np.random.Generator) -> bytes:
    coarse = generator.integers(0, 256, (PICTURE_SIDE // 32, PICTURE_SIDE // 32, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
