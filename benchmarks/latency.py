"""Where the time of a request goes: one system on this machine, asked one request at a time and several at once.

    python -m benchmarks latency --model nano --requests 24 --concurrency 1,8

Prints one table and writes the raw figures beside command, versions and hardware. Every request carries pictures nobody
has sent before (image repeat ratio 0), so no cache answers for an encoder. The client is that of ``dvd bench serve``.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.arrivals import ClosedLoop
from benchmarks.measures import completed
from benchmarks.plan import Phase, Plan, Source, Target
from benchmarks.progress import ProgressBar
from benchmarks.record import write_record
from benchmarks.runner import run
from benchmarks.samples import PhaseResult, Sample
from benchmarks.stages import server_stages
from benchmarks.workload import Size, Workload, fixed
from common.service.errors import Unavailable
from deploy.local import LocalDeployment
from deploy.settings import ServeSettings, model_directory

STAGES: Final = {
    "vision": ("decode_ms", "vision_queue_ms", "encode_ms"),
    "transfer": ("transfer_ms",),
    "language": ("prefill_ms",),
}
_INPUT_TOKENS: Final = 16
_WARM_UP: Final = "warm-up of "


@dataclass(frozen=True, slots=True)
class Case:
    """One row: pictures of ``side`` squared pixels, or none."""

    name: str
    side: int | None


@dataclass(frozen=True, slots=True)
class Row:
    """One case at one concurrency. Requests/s; medians in milliseconds; a stage that did not run is absent."""

    case: str
    concurrency: int
    requests_per_second: float
    time_to_first_token: float
    time_per_output_token: float
    stages: dict[str, float]
    samples: list[dict[str, float]]


CASES: Final = (Case("text only", None), Case("448 px, 1 tile", 448), Case("896 px, 5 tiles", 896))


def make_plan(concurrencies: Sequence[int], num_requests: int, num_tokens: int) -> Plan:
    """For each case and concurrency a phase to warm up, one request for each client, and one to measure."""
    phases: list[Phase] = []
    for case in CASES:
        sizes = ((Size(case.side, case.side), 1.0),) if case.side is not None else Workload().image_sizes
        workload = Workload(
            image_sizes=sizes,
            text_only_share=1.0 if case.side is None else 0.0,
            input_tokens=fixed(_INPUT_TOKENS),
            output_tokens=fixed(num_tokens),
            ignore_eos=True,
        )
        for concurrency in concurrencies:
            for prefix, count in ((_WARM_UP, concurrency), ("", num_requests)):
                source = Source(case.name, ClosedLoop(concurrency), workload, count)
                phases.append(Phase(f"{prefix}{case.name}, {concurrency} at a time", (source,)))
    return Plan(tuple(phases))


def measure(model: str, plan: Plan) -> list[Row]:
    """Start a system, run the plan, stop it. Raises Unavailable if a request fails."""
    directory = str(model_directory(model))
    settings = ServeSettings.model_validate({"model": directory, "port": 0, "enable_per_request_metrics": True})
    with LocalDeployment(settings) as deployment:
        result = run(plan, Target(deployment.address), ProgressBar(Console(stderr=True)))
    return [_row(phase) for phase in result.phases if not phase.phase.name.startswith(_WARM_UP)]


def _row(result: PhaseResult) -> Row:
    failed = next((sample.failure for sample in result.samples if sample.failure is not None), None)
    if failed is not None:
        raise Unavailable(f"{result.phase.name}: a request failed: {failed} {failed.message}")
    (source,) = result.phase.sources
    assert isinstance(source.arrivals, ClosedLoop)  # as planned
    samples = completed(result, result.samples)
    stages = [_stages(sample) for sample in samples]
    found = {name: [each[name] for each in stages if name in each] for name in STAGES}
    return Row(
        case=source.name,
        concurrency=source.arrivals.concurrency,
        requests_per_second=len(samples) / result.seconds,
        time_to_first_token=1e3 * statistics.median(sample.ttft for sample in samples),
        time_per_output_token=1e3 * statistics.median(sample.tpot or 0.0 for sample in samples),
        stages={name: statistics.median(values) for name, values in found.items() if values},
        samples=[
            {"ttft": 1e3 * sample.ttft, "e2e": 1e3 * sample.e2e, "tokens": sample.output_tokens, **each}
            for sample, each in zip(samples, stages, strict=True)
        ],
    )


def _stages(sample: Sample) -> dict[str, float]:
    """Milliseconds of the three stages of the pipeline."""
    report = server_stages(sample)
    parts = {stage: [report[n] for n in names if report.get(n) is not None] for stage, names in STAGES.items()}
    return {stage: sum(values) for stage, values in parts.items() if values}


def print_table(rows: Sequence[Row]) -> None:
    table = Table(
        "workload", "at once", "requests/s", "TTFT ms", "TPOT ms", "vision ms", "transmission ms", "prefill ms"
    )
    for row in rows:
        table.add_row(
            row.case,
            str(row.concurrency),
            f"{row.requests_per_second:.2f}",
            f"{row.time_to_first_token:.0f}",
            f"{row.time_per_output_token:.1f}",
            *(f"{row.stages[name]:.1f}" if name in row.stages else "-" for name in STAGES),
        )
    Console(width=120).print(table)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=__doc__)
    parser.add_argument("--model", default="nano", help="a checkpoint directory, or nano")
    parser.add_argument("--requests", type=int, default=24, help="measured requests per row")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16, help="output tokens of each request")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.model, make_plan(arguments.concurrency, arguments.requests, arguments.tokens))
    print_table(rows)
    if arguments.results:
        print(write_record(arguments.results, "latency", argv, [asdict(row) for row in rows]))
