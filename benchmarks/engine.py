"""The language engine alone, beside transformers with the same weights, threads and precision, in one run.

    python -m benchmarks engine --shape small --against transformers --results benchmarks/results

No server and no client. Tokens/s of steps in which 1, 8 and 32 sequences generate; of a long prompt; and of a whole
batch from prompts to last tokens, where transformers batches continuously (``generate_batch``). Rounds alternate
between the two, and the median counts.

    python -m benchmarks engine --device cuda:0 --shape 8B --results benchmarks/results

On CUDA, and against nobody: what share of the card's own speed the engine reaches (shares.py).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, get_args

import torch
from rich.console import Console

from benchmarks import shares
from benchmarks.card import measure_card
from benchmarks.engine_subjects import Subject, make_pair
from benchmarks.random_checkpoint import SHAPES, TextShape
from benchmarks.record import write_record
from benchmarks.serve import print_table
from benchmarks.shares import MODES, Load, make_random_model, shares_table
from benchmarks.systems import Dtype
from benchmarks.tables import Table, number
from common.service.errors import ConfigError

BATCHES: Final = (1, 8, 32)
TEXT_SHAPES: Final[Mapping[str, TextShape]] = {
    "tiny": SHAPES["tiny"].text,
    "small": TextShape(512, 12, 8, 4, 64, 1536, vocab=2048),
    "0.6B": SHAPES["1B"].text,
    "8B": SHAPES["8B"].text,
    "14B": SHAPES["14B"].text,
    "38B": SHAPES["38B"].text,
}
"""``small``: 41 million parameters. ``0.6B``: the language half of InternVL3.5-1B; the others: as their models."""
Case = dict[str, Any]
"""``case``, then the median tokens/s of each subject, and what they come from."""


def measure(subjects: Sequence[Subject], num_rounds: int, num_tokens: int, prefill_tokens: int) -> list[Case]:
    """Every case, the subjects alternating in each round."""
    work: dict[str, tuple[int, Callable[[Subject], float]]] = {}
    for batch in BATCHES:
        work[f"decode, batch {batch}"] = (batch * num_tokens, _decode(batch, num_tokens))
    work[f"prefill, {prefill_tokens} tokens"] = (prefill_tokens, lambda subject: subject.prefill(prefill_tokens))
    most = max(BATCHES)
    work[f"whole batch of {most}"] = (most * num_tokens, lambda subject: subject.whole_batch(most, num_tokens))
    return [_case(name, num, run, subjects, num_rounds) for name, (num, run) in work.items()]


def compared(cases: Sequence[Case], names: Sequence[str]) -> Table:
    """One row for each case; the last column is the first subject over the second, where there are two."""
    rows = [[case["case"], *(number(case[name]) for name in names)] for case in cases]
    if len(names) == 1:
        return Table("Tokens/s", ["", *names], rows)
    ratios = [f"{case[names[0]] / case[names[1]]:.2f} x" for case in cases]
    return Table("Tokens/s", ["", *names, " / ".join(names)], [[*row, x] for row, x in zip(rows, ratios, strict=True)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks engine", description=__doc__)
    parser.add_argument("--shape", choices=list(TEXT_SHAPES), default="small")
    parser.add_argument("--against", choices=["transformers"], help="measured in the same run")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--device", default="cpu", help="such as cuda:0")
    parser.add_argument("--threads", type=int, help="of the CPU; unset: all cores")
    parser.add_argument("--tokens", type=int, default=64, help="that each sequence generates")
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="after one that only warms up")
    parser.add_argument("--modes", default=",".join(MODES), help="on CUDA: layers to measure")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    if device.type == "cuda" and not arguments.against:
        measure_shares(argv, arguments.shape, dtype, device, arguments.modes.split(","), arguments.results)
        return
    ours, theirs = make_pair(TEXT_SHAPES[arguments.shape], dtype, device)
    subjects: list[Subject] = [ours, theirs] if arguments.against else [ours]
    cases = measure(subjects, arguments.rounds, arguments.tokens, arguments.prefill_tokens)
    print_table(Console(width=120), compared(cases, [subject.name for subject in subjects]))
    if arguments.results:
        of = f"{arguments.shape}-{str(dtype).removeprefix('torch.')}"
        print(write_record(arguments.results, "engine", argv, cases, of))


def measure_shares(
    argv: Sequence[str],
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    modes: Sequence[str],
    results: Path | None,
    load: Load | None = None,
) -> None:
    """Print the shares of the card's speed, and write them to ``results``."""
    if unknown := set(modes) - set(MODES):
        raise ConfigError(f"--modes: {sorted(unknown)} unknown; there are {', '.join(MODES)}")
    load, card = load or Load(), measure_card(device)
    model = make_random_model(TEXT_SHAPES[shape], dtype, device)
    records = shares.measure(model, TEXT_SHAPES[shape], card, load, modes)
    print_table(Console(width=120), shares_table(shape, card, records))
    if results:
        print(write_record(results, "engine", argv, records, f"{shape}-{device.type}"))


def _decode(batch: int, num_tokens: int) -> Callable[[Subject], float]:
    return lambda subject: subject.decode(batch, num_tokens)


def _case(
    name: str, num_tokens: int, run: Callable[[Subject], float], subjects: Sequence[Subject], num_rounds: int
) -> Case:
    rates: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for round_number in range(num_rounds + 1):
        for subject in subjects:
            rate = num_tokens / run(subject)
            if round_number > 0:  # the first allocates and compiles
                rates[subject.name].append(rate)
    return {"case": name, **{name: median(values) for name, values in rates.items()}, "rounds": rates}
