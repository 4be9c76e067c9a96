"""Released shapes on one card: vision and language as two processes that share it, against one process, undivided.

    python -m benchmarks gpu_shapes --shape 8B --device cuda:0 --results benchmarks/results
    python -m benchmarks gpu_shapes --shape 38B --device cuda:0 --directory /scratch/38B --results benchmarks/results

Writes a checkpoint with random weights first (2 bytes per parameter: 17 GB for 8B, 77 GB for 38B; ``--directory``
keeps it). Then each system is started, asked the same, and stopped: 448, 896 and 1344 px, one new picture a request.
Both get equal KV memory. Answers have their full length, so random weights cost what trained ones do.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final, get_args

from rich.console import Console

from benchmarks.arrivals import ClosedLoop, OpenLoop
from benchmarks.measures import Summary, summarize
from benchmarks.plan import Phase, Plan, Source
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from benchmarks.record import write_record
from benchmarks.rounds import measure_rounds
from benchmarks.samples import Result
from benchmarks.serve import print_table
from benchmarks.systems import Dtype, Dvd, System
from benchmarks.tables import Table, number
from benchmarks.workload import Size, Workload, fixed
from common.service.errors import Unavailable

DIVIDED, COLOCATED = "two processes", "colocated"
_INPUT_TOKENS: Final = 64
_WARM_UP: Final = "warm-up, "
_KV_BYTES: Final = 4 * 2**30
_ROWS: Final = ("requests/s", "TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms", "ITL p99, ms")


def make_plan(sides: Sequence[int], concurrency: int, rate: float | None, num_requests: int, num_tokens: int) -> Plan:
    """For each size of picture a phase to warm up, and one to measure: a closed loop, or arrivals at ``rate``."""
    phases: list[Phase] = []
    for side in sides:
        workload = Workload(
            image_sizes=((Size(side, side), 1.0),),
            input_tokens=fixed(_INPUT_TOKENS),
            output_tokens=fixed(num_tokens),
            ignore_eos=True,
        )
        warm_up = Source(f"{side} px", ClosedLoop(concurrency), workload, concurrency)
        arrivals = ClosedLoop(concurrency) if rate is None else OpenLoop(rate)
        measured = Source(f"{side} px", arrivals, workload, num_requests)
        phases += [Phase(f"{_WARM_UP}{side} px", (warm_up,)), Phase(f"{side} px", (measured,))]
    return Plan(tuple(phases))


def systems(model: Path, device: str, dtype: Dtype, kv_cache_bytes: int) -> list[Dvd]:
    options: dict[str, Any] = {"device": device, "dtype": dtype, "kv_cache_bytes": kv_cache_bytes}
    return [
        Dvd(DIVIDED, str(model), options),
        Dvd(COLOCATED, str(model), {**options, "colocated": True}),
    ]


def measure(plan: Plan, under_test: Sequence[Dvd], num_rounds: int, console: Console) -> list[dict[str, Any]]:
    """Every round: one system after the other. Returns a record of each run. Raises Unavailable if a request fails."""
    return measure_rounds(plan, under_test, num_rounds, console, _read)


def _read(system: System, result: Result) -> dict[str, Any]:
    summaries = [summarize(phase)[0] for phase in result.phases if not phase.phase.name.startswith(_WARM_UP)]
    for summary in summaries:
        if summary.failures:
            raise Unavailable(f"{system.name}, {summary.phase}: requests failed: {summary.failures}")
    return {
        "summaries": [asdict(summary) for summary in summaries],
        "figures": {summary.phase: figures(summary) for summary in summaries},
    }


def figures(summary: Summary) -> dict[str, float]:
    """What the table shows of one phase."""
    spreads = [(summary.ttft, 50), (summary.ttft, 99), (summary.tpot, 50), (summary.itl, 99)]
    values = [math.nan if spread is None else spread[percentile] for spread, percentile in spreads]
    return dict(zip(_ROWS, [summary.requests_per_s, *values], strict=True))


def comparison(shape: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """Medians over the rounds; the last column is what dividing gains."""
    rows = []
    for phase in records[0]["figures"]:
        for row in _ROWS:
            divided, colocated = (
                median(each["figures"][phase][row] for each in records if each["system"] == name)
                for name in (DIVIDED, COLOCATED)
            )
            gain = f"{divided / colocated:.2f} x" if colocated else ""
            rows.append([phase, row, number(divided), number(colocated), gain])
    columns = ["pictures", "", DIVIDED, COLOCATED, "ratio"]
    return Table(f"{shape}, random weights, one device", columns, rows, num_labels=2)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu_shapes", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8B", help="which model's; `tiny` tries the script out")
    parser.add_argument("--device", default="auto", help="of both sides: cuda, cuda:1, cpu, ...")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[448, 896, 1344])
    parser.add_argument("--concurrency", type=int, default=16, help="clients, each with one request at a time")
    parser.add_argument("--request-rate", type=float, help="open loop at this many requests/s instead")
    parser.add_argument("--requests", type=int, default=96, help="measured requests of each size")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all of it; the table shows medians")
    parser.add_argument("--kv-cache-bytes", type=int, default=_KV_BYTES, help="KV memory of either system")
    parser.add_argument("--directory", type=Path, help="keep the checkpoint here, and use it if it is there")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    plan = make_plan(
        arguments.sizes, arguments.concurrency, arguments.request_rate, arguments.requests, arguments.tokens
    )
    console = Console(stderr=True)
    with _directory(arguments.directory) as directory:
        console.print(f"weights of {arguments.shape} in {directory}", highlight=False)
        write_checkpoint(directory, SHAPES[arguments.shape])
        under_test = systems(directory, arguments.device, arguments.dtype, arguments.kv_cache_bytes)
        records = measure(plan, under_test, arguments.rounds, console)
    print_table(Console(width=120), comparison(arguments.shape, records))
    if arguments.results:
        found = {"shape": arguments.shape, "load": plan.describe(), "runs": records}
        print(write_record(arguments.results, "gpu_shapes", argv, found, arguments.shape))


@contextmanager
def _directory(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="dvd-shapes-") as directory:
        yield Path(directory) / "checkpoint"
