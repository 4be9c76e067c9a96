"""What reading the tiles that are here saves, while others are encoded: time to first token of a picture of ten tiles,
with streamed prefill and with a barrier, both tiers on one core each.

    python -m benchmarks overlap --vision-core 0 --language-core 1

A random checkpoint of which encoding and prefill take about as long; how long each took stands in the table, because
the most there is to gain is the shorter of the two. Every picture is new, one request at a time, both ways in each
round one after the other. The mark is 0.75 of the barrier's time.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console

from benchmarks.arrivals import ClosedLoop
from benchmarks.measures import completed
from benchmarks.plan import Phase, Plan, Source
from benchmarks.random_checkpoint import Shape, TextShape, VisionShape, write_checkpoint
from benchmarks.record import write_record
from benchmarks.rounds import measure_rounds
from benchmarks.samples import Result, Sample
from benchmarks.serve import print_table
from benchmarks.stages import server_stages
from benchmarks.systems import Dvd, System
from benchmarks.tables import Table
from benchmarks.workload import Size, Workload, fixed
from common.service.errors import Unavailable

MARK: Final = 0.75
STREAMED, BARRIER = "streamed", "barrier"
NUM_TILES: Final = 10
_SIDE: Final = 3 * 448
"""Nine tiles and a thumbnail."""
_INPUT_TOKENS: Final = 16
_OUTPUT_TOKENS: Final = 4
_WARM_UP: Final = "warm-up"
_TTFT, _ENCODE, _PREFILL, _WAIT = "ttft_ms", "encode_ms", "prefill_ms", "feature_wait_ms"


def make_shape(vision_layers: int, text_layers: int) -> Shape:
    return Shape(
        VisionShape(hidden=256, layers=vision_layers, heads=4, mlp=1024),
        TextShape(hidden=512, layers=text_layers, heads=8, kv_heads=4, head_dim=64, mlp=1536, vocab=2048),
    )


def make_plan(num_requests: int) -> Plan:
    """One request at a time, each with a picture that nobody has seen, and a first one that is not counted."""
    workload = Workload(
        image_sizes=((Size(_SIDE, _SIDE), 1.0),),
        text_only_share=0.0,
        input_tokens=fixed(_INPUT_TOKENS),
        output_tokens=fixed(_OUTPUT_TOKENS),
        ignore_eos=True,
    )
    return Plan(
        tuple(
            Phase(name, (Source("pictures", ClosedLoop(1), workload, count),))
            for name, count in ((_WARM_UP, 1), ("measured", num_requests))
        )
    )


def make_systems(model: Path, vision_core: int, language_core: int, dtype: str) -> list[Dvd]:
    options = {
        "vision_cores": [vision_core],
        "language_cores": [language_core],
        "vision_nice": 0,  # it has its core for itself
        "dtype": dtype,
        "feature_cache_bytes": 0,
    }
    return [Dvd(name, str(model), {**options, "streamed_prefill": name == STREAMED}) for name in (STREAMED, BARRIER)]


def read(_: System | None, result: Result) -> Mapping[str, Any]:
    """Medians of one run in milliseconds, and what they are of. Raises Unavailable if a request failed."""
    phase = result.phases[-1]
    failed = next((sample.failure for sample in phase.samples if sample.failure is not None), None)
    if failed is not None:
        raise Unavailable(f"a request failed: {failed} {failed.message}")
    samples = [_figures(sample) for sample in completed(phase, phase.samples)]
    return {name: median(sample[name] for sample in samples) for name in samples[0]} | {"samples": samples}


def _figures(sample: Sample) -> dict[str, float]:
    stages = server_stages(sample)
    told = {name: float(stages.get(name) or 0.0) for name in (_ENCODE, _PREFILL, _WAIT)}
    return {_TTFT: 1e3 * sample.ttft, "tiles": float(stages.get("tiles") or 0), **told}


def ratios(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each round: time to first token with streamed prefill to that with the barrier."""
    by_name = {name: [record[_TTFT] for record in records if record["system"] == name] for name in (STREAMED, BARRIER)}
    return [streamed / barrier for streamed, barrier in zip(by_name[STREAMED], by_name[BARRIER], strict=True)]


def make_table(records: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for name in (STREAMED, BARRIER):
        own = [record for record in records if record["system"] == name]
        figures = (median(record[key] for record in own) for key in (_TTFT, _ENCODE, _PREFILL, _WAIT))
        rows.append([name, *(f"{figure:.0f}" for figure in figures)])
    found = ratios(records)
    notes = [
        f"streamed / barrier: median {statistics.median(found):.2f} of {len(found)} rounds,"
        f" {min(found):.2f} to {max(found):.2f}; the mark is {MARK}",
        "prefill of the streamed one begins with the first tile and so contains waiting for the others",
    ]
    columns = ["prefill", "TTFT ms", "encode ms", "prefill ms", "waited for features ms"]
    return Table(f"A picture of {NUM_TILES} tiles", columns, rows, notes=notes)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overlap", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=6, help="measured requests of each run")
    parser.add_argument("--vision-core", type=int, default=0)
    parser.add_argument("--language-core", type=int, default=1)
    parser.add_argument("--vision-layers", type=int, default=8)
    parser.add_argument("--text-layers", type=int, default=10)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "overlap"
        write_checkpoint(model, make_shape(arguments.vision_layers, arguments.text_layers))
        systems = make_systems(model, arguments.vision_core, arguments.language_core, arguments.dtype)
        records = measure_rounds(make_plan(arguments.requests), systems, arguments.rounds, console, read)
    print_table(Console(), make_table(records))
    if arguments.results:
        figures = [{**record, "command": record["command"].replace(str(model), "MODEL")} for record in records]
        print(write_record(arguments.results, "overlap", argv, {"ratios": ratios(records), "runs": figures}))
