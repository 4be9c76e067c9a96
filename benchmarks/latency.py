"""Where the time of a request goes: one system on this machine, asked one request at a time and several at once.

    python -m benchmarks latency --model nano --requests 24 --concurrency 1,8

Prints one table and writes the raw figures beside command, versions and hardware. Every request carries pictures nobody
has sent before (image repeat ratio 0), so no cache answers for an encoder.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.workload import chat_body, noise_image
from deploy.local import LocalDeployment
from deploy.settings import ServeSettings, model_directory

STAGES = ("vision", "transfer", "language")


@dataclass(frozen=True, slots=True)
class Case:
    """One row: pictures of ``side`` squared pixels, or none."""

    name: str
    side: int | None


@dataclass(slots=True)
class Sample:
    """One request. Seconds; ``stages`` in milliseconds, as the router reports them."""

    time_to_first_token: float
    duration: float
    num_tokens: int
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Row:
    """One case at one concurrency."""

    case: str
    concurrency: int
    duration: float
    samples: list[Sample]

    @property
    def requests_per_second(self) -> float:
        return len(self.samples) / self.duration

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(sample, name) for sample in self.samples))

    def stage(self, name: str) -> float | None:
        found = [sample.stages[name] for sample in self.samples if name in sample.stages]
        return statistics.median(found) if found else None

    @property
    def time_per_output_token(self) -> float:
        spans = [(s.duration - s.time_to_first_token) / max(1, s.num_tokens - 1) for s in self.samples]
        return statistics.median(spans)


CASES = (Case("text only", None), Case("448 px, 1 tile", 448), Case("896 px, 5 tiles", 896))


async def ask(client: httpx.AsyncClient, case: Case, seed: int, num_tokens: int) -> Sample:
    """One streamed request; raises if the answer is not complete."""
    images = [] if case.side is None else [noise_image(case.side, np.random.default_rng(seed))]
    body = chat_body("What do you see?", images, max_tokens=num_tokens, ignore_eos=True, stream=True)
    start = time.perf_counter()
    first, tokens = 0.0, 0
    metrics: dict[str, Any] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line.removeprefix("data: "))
            metrics = event.get("metrics") or metrics
            for choice in event["choices"]:
                if choice["finish_reason"] is None and "role" not in choice["delta"]:
                    tokens += 1
                    first = first or time.perf_counter()
    if tokens == 0:
        raise RuntimeError("an answer without tokens")
    return Sample(first - start, time.perf_counter() - start, tokens, _stages(metrics.get("dvd", {})))


def _stages(report: dict[str, float | None]) -> dict[str, float]:
    """Milliseconds of the three stages of the pipeline; a stage that did not run is absent."""
    parts = {
        "vision": ("decode_ms", "vision_queue_ms", "encode_ms"),
        "transfer": ("transfer_ms",),
        "language": ("prefill_ms",),
    }
    found = {stage: [report.get(name) for name in names] for stage, names in parts.items()}
    return {stage: sum(v for v in values if v is not None) for stage, values in found.items() if any(values)}


async def run_case(address: str, case: Case, concurrency: int, num_requests: int, num_tokens: int, seed: int) -> Row:
    """A closed loop of ``concurrency`` clients."""
    seeds = iter(range(seed, seed + num_requests))
    samples: list[Sample] = []

    async def loop(client: httpx.AsyncClient) -> None:
        for own in seeds:
            samples.append(await ask(client, case, own, num_tokens))

    async with httpx.AsyncClient(base_url=address, timeout=600, trust_env=False) as client:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(loop(client))
        return Row(case.name, concurrency, time.perf_counter() - start, samples)


def measure(arguments: argparse.Namespace) -> list[Row]:
    model = str(model_directory(arguments.model))
    settings = ServeSettings.model_validate({"model": model, "port": 0, "enable_per_request_metrics": True})
    rows = []
    with LocalDeployment(settings) as deployment, Console(stderr=True).status("measuring") as status:
        for number, case in enumerate(CASES):
            for concurrency in arguments.concurrency:
                status.update(f"{case.name}, {concurrency} at a time")
                seed = 1_000_000 * number + 1_000 * concurrency
                warm_up = run_case(deployment.address, case, concurrency, concurrency, arguments.tokens, seed + 500_000)
                asyncio.run(warm_up)
                measured = run_case(deployment.address, case, concurrency, arguments.requests, arguments.tokens, seed)
                rows.append(asyncio.run(measured))
    return rows


def print_table(rows: Sequence[Row]) -> None:
    table = Table(
        "workload", "at once", "requests/s", "TTFT ms", "TPOT ms", "vision ms", "transmission ms", "prefill ms"
    )
    for row in rows:
        stages = [row.stage(name) for name in STAGES]
        table.add_row(
            row.case,
            str(row.concurrency),
            f"{row.requests_per_second:.2f}",
            f"{row.median('time_to_first_token') * 1000:.0f}",
            f"{row.time_per_output_token * 1000:.1f}",
            *("-" if value is None else f"{value:.1f}" for value in stages),
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
    rows = measure(arguments)
    print_table(rows)
    if arguments.results:
        print(write_record(arguments.results, "latency", argv, [asdict(row) for row in rows]))
