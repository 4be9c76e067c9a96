"""The vision engine alone, beside transformers and vLLM with the same checkpoint, threads and precision, in one run.

    python -m benchmarks vision --model CHECKPOINT --against transformers,vllm --vllm VENV/bin/python \
        --results benchmarks/results

Tiles of one image to features in memory, and a whole picture, without server and client. Rounds alternate between the
subjects, and a ratio is the median over rounds. ``--serve`` measures what a whole vision server under load keeps of
that (vision_serve.py).

    python -m benchmarks vision --device cuda --shape 6B --results benchmarks/results

On a GPU, and against nobody: tiles/s of 1 to 32 tiles, and the share of the card's own speed (vision_shares.py).
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final, get_args

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import vision_serve, vision_shares
from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.systems import Dtype
from benchmarks.tables import Table, number
from benchmarks.vision_shares import operations_per_tile
from benchmarks.vision_subjects import (
    PICTURE_SIDE,
    PICTURE_TILES,
    Encoder,
    Ours,
    Products,
    Subject,
    Transformers,
    Vllm,
    pictures,
    random_tiles,
)
from common.model.config import load_config
from common.service.errors import ConfigError, InternalError

PEERS: Final = ("transformers", "vllm")
_LEAST_SIMILARITY: Final = 0.99
_PROCESSOR: Final = "processor_seconds"
Rounds = dict[str, list[dict[str, float]]]
"""For each subject, what each round took."""


def measure(subjects: Sequence[Subject], num_rounds: int) -> Rounds:
    """The subjects take turns, every other round in the other direction; a first round only warms up."""
    rounds: Rounds = {subject.name: [] for subject in subjects}
    for round_number in range(num_rounds + 1):
        for subject in subjects if round_number % 2 else reversed(subjects):
            took = subject.run()
            if round_number > 0:
                figures = {"seconds": took.seconds, _PROCESSOR: took.processor_seconds}
                rounds[subject.name].append(figures)
    return rounds


def check_alike(subjects: Sequence[Encoder]) -> dict[str, float]:
    """Cosine similarity of everybody's features to those of the first. Raises InternalError where they differ."""
    ours = subjects[0].features
    found = {subject.name: _similarity(ours, subject.features) for subject in subjects}
    for name, similarity in found.items():
        if similarity < _LEAST_SIMILARITY:
            raise InternalError(f"features of {name} are others than ours: similarity {similarity:.3f}")
    return found


def compared(title: str, rounds: Rounds, num_tiles: int) -> Table:
    """The first subject is ours, the last is what the others are a share of."""
    names = list(rounds)
    ours, products = rounds[names[0]], rounds[names[-1]]
    rows = []
    for name, figures in rounds.items():
        seconds, least, processor = median_of(figures, "seconds"), least_of(figures), median_of(figures, _PROCESSOR)
        rows.append(
            [
                name,
                number(num_tiles / seconds),
                number(seconds),
                f"{ratio(figures, ours):.2f} x",
                number(least),
                f"{least / least_of(ours):.2f} x",
                number(processor),
                f"{ratio(products, figures):.0%}",
            ]
        )
    against = f"/ {names[0]}"
    columns = ["", "tiles/s", "s an image", against, "quickest", against, "core s", f"share of {names[-1]}"]
    notes = [f"{len(ours)} rounds: medians, medians of ratios, and the quickest round of each"]
    return Table(title, columns, rows, notes=notes)


def ratio(theirs: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]) -> float:
    """How much longer they need: the median over rounds."""
    return median(their["seconds"] / our["seconds"] for their, our in zip(theirs, ours, strict=True))


def median_of(figures: Sequence[Mapping[str, float]], what: str) -> float:
    return median(figure[what] for figure in figures)


def least_of(figures: Sequence[Mapping[str, float]]) -> float:
    """Seconds of the round that others on the machine disturbed least."""
    return min(figure["seconds"] for figure in figures)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks vision", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory; not for --device cuda")
    parser.add_argument("--against", default="", help="transformers, vllm: measured in the same run")
    parser.add_argument("--vllm", type=Path, help="the Python of the environment that has vLLM")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--threads", type=int, help="of the CPU; unset: all cores")
    parser.add_argument("--tiles", type=int, default=5, help="of the image")
    parser.add_argument("--rounds", type=int, default=5, help="after one that only warms up")
    parser.add_argument("--serve", action="store_true", help="a vision server under load against the bare encoder")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round of --serve")
    parser.add_argument("--device", default="cpu", help="such as cuda:0")
    parser.add_argument("--shape", choices=list(vision_shares.SHAPES), default="300M", help="on a GPU")
    parser.add_argument("--trace", type=Path, help="file for a trace that chrome://tracing and Perfetto show")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if torch.device(arguments.device).type == "cuda":
        device = torch.device(arguments.device)
        of = (arguments.shape, arguments.dtype, device, arguments.trace, arguments.results)
        vision_shares.measure_shares(argv, *of)
    elif arguments.model is None:
        raise ConfigError("--model is needed: a checkpoint directory")
    elif arguments.serve:
        _serve(argv, arguments)
    else:
        _compare(argv, arguments)


def _compare(argv: Sequence[str], arguments: Any) -> None:
    peers = list(filter(None, arguments.against.split(",")))
    if unknown := set(peers) - set(PEERS):
        raise ConfigError(f"--against: {sorted(unknown)} unknown; there are {', '.join(PEERS)}")
    if "vllm" in peers and arguments.vllm is None:
        raise ConfigError("--against vllm needs --vllm, the Python of its environment")
    config = load_config(arguments.model)
    tiles = random_tiles(arguments.tiles, config.tiling.tile_size)
    operations = operations_per_tile(config)
    (jpeg,) = pictures(1)
    with ExitStack() as stack:
        ours = Ours(arguments.model, arguments.dtype, tiles)
        encoders: list[Encoder] = [ours]
        from_jpeg = [Subject(ours.name, lambda: ours.picture(jpeg))]
        if "transformers" in peers:
            encoders.append(Transformers(arguments.model, arguments.dtype, tiles))
        if "vllm" in peers:
            vllm = stack.enter_context(Vllm(arguments.vllm, arguments.model, arguments.dtype, tiles, jpeg))
            encoders.append(vllm)
            from_jpeg.append(Subject(vllm.name, vllm.picture))
        similarities = check_alike(encoders)
        subjects = [Subject(encoder.name, encoder.encode) for encoder in encoders]
        from_tiles = measure([*subjects, _products(arguments, len(tiles) * operations)], arguments.rounds)
        from_jpegs = measure([*from_jpeg, _products(arguments, PICTURE_TILES * operations)], arguments.rounds)
    if arguments.trace:
        vision_shares.trace(arguments.trace, ours.encode)
    console = Console(width=120)
    print_table(console, compared(f"{len(tiles)} tiles to features", from_tiles, len(tiles)))
    title = f"A JPEG of {PICTURE_SIDE} px to features; of vLLM, to the first token, less as much text"
    print_table(console, compared(title, from_jpegs, PICTURE_TILES))
    if arguments.results:
        figures = {
            "num_tiles": len(tiles),
            "threads": torch.get_num_threads(),
            "from_tiles": from_tiles,
            "from_jpeg": from_jpegs,
            "similarities": similarities,
            "operations_per_tile": operations,
        }
        print(write_record(arguments.results, "vision", argv, figures, arguments.dtype))


def _products(arguments: Any, operations: float) -> Subject:
    products = Products(arguments.dtype, operations)
    return Subject(products.name, products.run)


def _serve(argv: Sequence[str], arguments: Any) -> None:
    rounds = vision_serve.measure(
        arguments.model, arguments.dtype, torch.get_num_threads(), arguments.rounds, arguments.seconds
    )
    print_table(Console(width=120), vision_serve.kept_table(rounds))
    if arguments.results:
        print(write_record(arguments.results, "vision", argv, rounds, f"serve-{arguments.dtype}"))


def _similarity(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
