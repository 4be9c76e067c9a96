"""Text beside images, on one system after the other: this project divided and undivided, and vLLM, on the same cores.

    python -m benchmarks compare --model DIR --systems dvd,colocated,vllm --vllm ENV/bin/vllm --seconds 60

Each system is started, asked text alone, images alone and both at once (``dvd bench serve --preset
text-beside-images``), or by sixteen clients at once (``--preset language``), and stopped. ``--rounds`` repeats all of
it, so that a machine that others use as well shows how far its figures wander; the table takes the median of the
rounds.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, get_args

from rich.console import Console

from benchmarks.measures import Summary, summarize
from benchmarks.plan import Plan
from benchmarks.presets import make_plan
from benchmarks.record import write_record
from benchmarks.rounds import measure_rounds
from benchmarks.samples import Result
from benchmarks.serve import print_table
from benchmarks.settings import BenchServeSettings
from benchmarks.systems import Dtype, Dvd, System, Vllm
from benchmarks.tables import NONE, Table, number
from common.service.errors import ConfigError

NAMES: Final = ("dvd", "colocated", "vllm")
TEXT_ALONE, IMAGES_ALONE, BOTH = "text alone", "images alone", "text beside images"
Figures = dict[str, float]
"""What is read off one run, by row of the table."""


def systems(names: Sequence[str], model: str, dtype: Dtype, vllm: Path | None) -> list[System]:
    """Raises ConfigError for a name that is unknown, or vLLM without its command."""
    known: Mapping[str, Callable[[], System]] = {
        "dvd": lambda: Dvd("DvD", model, {"dtype": dtype}),
        "colocated": lambda: Dvd("DvD, colocated", model, {"dtype": dtype, "colocated": True}),
        "vllm": lambda: Vllm(_given(vllm), model, dtype),
    }
    for name in names:
        if name not in known:
            raise ConfigError(f"--systems {name[:64]}: expected some of {', '.join(known)}")
    return [known[name]() for name in names]


def figures(summaries: Sequence[Summary]) -> Figures:
    """The rows of the table, from the three phases of one run. A figure that nobody measured is left out."""
    found = {(summary.phase, summary.source): summary for summary in summaries}
    text, images = found[TEXT_ALONE, "text"], found[IMAGES_ALONE, "images"]
    beside, images_beside = found[BOTH, "text"], found[BOTH, "images"]
    values = {
        "text alone: requests/s": text.requests_per_s,
        "text alone: ITL p50, ms": _at(text, "itl", 50),
        "text alone: ITL p99, ms": _at(text, "itl", 99),
        "text alone: TTFT p50, ms": _at(text, "ttft", 50),
        "images alone: requests/s": images.requests_per_s,
        "images alone: TTFT p50, ms": _at(images, "ttft", 50),
        "beside images: text requests/s": beside.requests_per_s,
        "beside images: text ITL p50, ms": _at(beside, "itl", 50),
        "beside images: text ITL p99, ms": _at(beside, "itl", 99),
        "beside images: text TTFT p50, ms": _at(beside, "ttft", 50),
        "beside text: images requests/s": images_beside.requests_per_s,
        "beside text: images TTFT p50, ms": _at(images_beside, "ttft", 50),
        "text keeps of its requests/s": _ratio(beside.requests_per_s, text.requests_per_s),
        "text ITL p99 beside images / alone": _ratio(_at(beside, "itl", 99), _at(text, "itl", 99)),
        "failed requests": float(sum(s.num_failed for s in summaries if s.source)),
    }
    return {name: value for name, value in values.items() if value is not None}


def phase_figures(summaries: Sequence[Summary]) -> Figures:
    """The same rows of every phase that has one kind of client."""
    values: dict[str, float | None] = {}
    for summary in (summary for summary in summaries if summary.source):
        values[f"{summary.phase}: requests/s"] = summary.requests_per_s
        values[f"{summary.phase}: tokens out/s"] = summary.output_tokens_per_s
        for metric, percentile in (("itl", 50), ("itl", 99), ("ttft", 50), ("ttft", 99)):
            values[f"{summary.phase}: {metric.upper()} p{percentile}, ms"] = _at(summary, metric, percentile)
    values["failed requests"] = float(sum(s.num_failed for s in summaries if s.source))
    return {name: value for name, value in values.items() if value is not None}


def comparison(rounds: Mapping[str, Sequence[Figures]], title: str = "Text beside images") -> Table:
    """One column for each system, medians over its rounds; then the first system over each of the others."""
    names = list(rounds)
    rows = []
    for row in dict.fromkeys(name for each in rounds.values() for figures in each for name in figures):
        medians = [_median([figures.get(row) for figures in rounds[name]]) for name in names]
        ratios = [_ratio(medians[0], other) for other in medians[1:]]
        shown = [NONE if ratio is None or row == "failed requests" else f"{ratio:.2f} x" for ratio in ratios]
        rows.append([row, *(number(value) for value in medians), *shown])
    columns = ["", *names, *(f"{names[0]} / {other}" for other in names[1:])]
    return Table(title, columns, rows, notes=[_rounds_note(rounds)])


def measure(
    plan: Plan,
    under_test: Sequence[System],
    num_rounds: int,
    console: Console,
    read: Callable[[Sequence[Summary]], Figures] = figures,
) -> list[dict[str, Any]]:
    """Every round: one system after the other. Returns a record of each run, in order."""

    def record(_: System, result: Result) -> dict[str, Any]:
        summaries = [summary for phase in result.phases for summary in summarize(phase)]
        return {"figures": read(summaries), "summaries": [asdict(summary) for summary in summaries]}

    return measure_rounds(plan, under_test, num_rounds, console, record)


def by_system(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Figures]]:
    """Figures of all rounds of each system."""
    found: dict[str, list[Figures]] = {}
    for record in records:
        found.setdefault(record["system"], []).append(record["figures"])
    return found


@dataclass(frozen=True, slots=True)
class _Load:
    title: str
    options: Mapping[str, str]
    """Of ``dvd bench serve``, beside the preset."""
    read: Callable[[Sequence[Summary]], Figures]


_DEFAULT_LOAD: Final = "text-beside-images"
_LOADS: Final[Mapping[str, _Load]] = {
    _DEFAULT_LOAD: _Load("Text beside images", {"input_tokens": "64"}, figures),
    "language": _Load("Sixteen clients", {}, phase_figures),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("--model", default="nano", help="a checkpoint directory, or nano")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=["dvd", "colocated"])
    parser.add_argument("--vllm", type=Path, help="the vllm command, such as ENV/bin/vllm")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of every system")
    parser.add_argument("--preset", choices=list(_LOADS), default=_DEFAULT_LOAD, help="what they are asked")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--warmup", type=float, default=10.0, help="seconds of load before each phase")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all of it")
    parser.add_argument("--results", type=Path, help="directory for the raw record")
    arguments = parser.parse_args(argv)
    under_test = systems(arguments.systems, arguments.model, arguments.dtype, arguments.vllm)
    load = _LOADS[arguments.preset]
    times = {"duration": arguments.seconds, "warmup": arguments.warmup}
    plan = make_plan(BenchServeSettings.model_validate({"preset": arguments.preset, **load.options, **times}))
    records = measure(plan, under_test, arguments.rounds, Console(stderr=True), load.read)
    print_table(Console(width=160), comparison(by_system(records), load.title))
    if arguments.results:
        name = "compare" if arguments.preset == _DEFAULT_LOAD else f"compare-{arguments.preset}"
        of = f"{Path(arguments.model).name}-{arguments.dtype}"
        found = {"title": load.title, "load": plan.describe(), "runs": records}
        print(write_record(arguments.results, name, argv, found, of))


def _given(vllm: Path | None) -> Path:
    if vllm is None:
        raise ConfigError("--vllm: needed to measure vllm; name its command, such as ENV/bin/vllm")
    return vllm


def _at(summary: Summary, metric: str, percentile: float) -> float | None:
    spread = getattr(summary, metric)
    return None if spread is None else float(spread[percentile])


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _rounds_note(rounds: Mapping[str, Sequence[Figures]]) -> str:
    num_rounds = max(map(len, rounds.values()))
    return "One round." if num_rounds == 1 else f"Medians of {num_rounds} rounds."
