"""A finished run -> two files that say the same: raw figures as JSON, and one HTML page that needs nothing else.

JSON: everything that explains the figures (``record.environment``, all options), summaries, timelines, and one row for
each request. Its columns are named once; milliseconds, from the opening of the window.
"""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import jinja2
import msgspec

from benchmarks.measures import Summary, measured
from benchmarks.plots import first_token_stages, percentile_curves, timelines
from benchmarks.record import environment
from benchmarks.samples import PhaseResult, Result, Sample
from benchmarks.stages import STAGES, server_stages
from benchmarks.tables import NONE, Table, number
from benchmarks.timeline import timeline

_NAME: Final = "bench-serve"
_TEMPLATE: Final = "report.html.jinja"
COLUMNS: Final = (
    "source",
    "images",
    "scheduled_ms",
    "queue_ms",
    "lag_ms",
    "sent_ms",
    "ttft_ms",
    "e2e_ms",
    "prompt_tokens",
    "output_tokens",
    "cached_tokens",
    "image_tokens",
    "failure",
    "itl_ms",
    "stages",
)


def write_report(
    folder: Path, command: str, options: str, result: Result, summaries: Sequence[Summary], found: Sequence[Table]
) -> list[Path]:
    """Write both files. ``options``: what was in effect, as YAML. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{_NAME}"
    known = environment(command)
    raw, page = folder / f"{stem}.json", folder / f"{stem}.html"
    raw.write_bytes(raw_record(known, options, result, summaries))
    page.write_text(html_page(known, options, result, summaries, found), "utf-8")
    return [raw, page]


def raw_record(known: dict[str, Any], options: str, result: Result, summaries: Sequence[Summary]) -> bytes:
    """The JSON file: what people read in it is indented, requests are one line each."""
    head = {
        **known,
        "options": options.splitlines(),
        "target": result.base_url,
        "model": result.model,
        "started": result.started,
        "client_cpu": round(result.client_cpu, 3),
        "salt": result.plan.salt,
        "load": result.plan.describe(),
        "summaries": [asdict(summary) for summary in summaries],
        "timelines": {phase.phase.name: _timelines(phase) for phase in result.phases},
        "request_columns": COLUMNS,
    }
    parts = [msgspec.json.format(msgspec.json.encode(head), indent=1)[:-2], b',\n "requests": {']
    for index, phase in enumerate(result.phases):
        rows = b",\n".join(b"   " + msgspec.json.encode(row(phase, sample)) for sample in phase.samples)
        parts.append((b"," if index else b"") + b"\n  %b: [\n%b\n  ]" % (msgspec.json.encode(phase.phase.name), rows))
    return b"".join([*parts, b"\n }\n}\n"])


def row(phase: PhaseResult, sample: Sample) -> list[Any]:
    """One request, in the order of ``COLUMNS``."""
    stages = server_stages(sample)
    return [
        sample.source,
        sample.num_images,
        _ms(sample.scheduled_at - phase.opened_at),
        _ms(sample.queue),
        _ms(sample.lag),
        _ms(sample.sent_at - phase.opened_at),
        None if sample.first_at is None else _ms(sample.ttft),
        _ms(sample.e2e),
        sample.prompt_tokens,
        sample.output_tokens,
        sample.cached_tokens,
        sample.image_tokens,
        None if sample.failure is None else f"{sample.failure}: {sample.failure.message}".removesuffix(": "),
        [_ms(gap) for gap in sample.gaps],
        {name: stages[name] for name in (*STAGES, "tiles") if stages.get(name) is not None},
    ]


def html_page(
    known: dict[str, Any], options: str, result: Result, summaries: Sequence[Summary], found: Sequence[Table]
) -> str:
    """The page. Everything in it is inline; text of servers is escaped."""
    loads = [
        (phase.phase.label(source), measured(phase, phase.of(source)))
        for phase in result.phases
        for source in phase.phase.sources
    ]
    sources = [summary for summary in summaries if summary.source]
    return render(
        _TEMPLATE,
        result=result,
        known=known,
        options=options,
        loads=result.plan.describe(),
        headlines=[_headline(summary) for summary in sources],
        tables=found,
        curves=percentile_curves(loads),
        stages=first_token_stages(sources),
        timelines=[(phase.phase.name, timelines(phase)) for phase in result.phases],
        cpu=f"{100 * result.client_cpu:.0f} %",
    )


def render(template: str, **values: Any) -> str:
    """A page of a template of this folder; text that is not marked as safe is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(**values)


def _headline(summary: Summary) -> dict[str, Any]:
    """The few figures that one looks at first."""
    ttft, itl = summary.ttft, summary.itl
    figures = [
        ("requests/s", number(summary.requests_per_s), ""),
        ("tokens out/s", number(summary.output_tokens_per_s), ""),
        ("TTFT p50 / p99", NONE if ttft is None else f"{number(ttft[50])} / {number(ttft[99])}", "ms"),
        ("ITL p50 / p99", NONE if itl is None else f"{number(itl[50])} / {number(itl[99])}", "ms"),
    ]
    if summary.images_per_s:
        figures.insert(1, ("images/s", number(summary.images_per_s), ""))
    if summary.goodput_per_s is not None:
        figures.insert(1, ("goodput", number(summary.goodput_per_s), "/s"))
    return {"name": summary.label, "figures": figures, "failed": summary.num_failed, "sent": summary.num_sent}


def _timelines(phase: PhaseResult) -> dict[str, Any]:
    return {source.name: asdict(timeline(phase, phase.of(source))) for source in phase.phase.sources}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
