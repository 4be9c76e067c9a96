"""Summaries -> tables of words, the same for the terminal and for the report. Knows neither rich nor HTML."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.measures import Distribution, Summary, percentile_name
from benchmarks.plan import Plan
from benchmarks.stages import PARTS

NONE: Final = "-"
LATE_CLIENT_MS: Final = 10.0
"""From this p99 on, the client's own lateness is worth a warning: it is part of no latency, but shifts the load."""
_LATENCIES: Final = (
    ("ttft", "first token (TTFT)"),
    ("tpot", "per further token (TPOT)"),
    ("itl", "between tokens (ITL)"),
    ("e2el", "whole answer (E2E)"),
    ("client_queue", "client: held back by the cap"),
    ("client_lag", "client: sent late"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """The first ``num_labels`` columns are words, the others figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    num_labels: int = 1
    notes: list[str] = field(default_factory=list)


def tables(plan: Plan, summaries: Sequence[Summary], percentiles: Sequence[float]) -> list[Table]:
    """Everything worth showing, most important first; what nobody measured is left out."""
    # The sum of unlike sources has a throughput; a latency of both says nothing of either.
    sources = [s for s in summaries if s.source]
    found = [throughput(summaries), latency(sources, percentiles)]
    if plan.compared is not None:
        found.insert(0, comparison(plan.compared, summaries))
    found += [first_token(sources), failures(sources)]
    return [table for table in found if table.rows]


def throughput(summaries: Sequence[Summary]) -> Table:
    """One column for each load."""
    figures: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
        ("window, s", lambda s: s.window_s),
        ("requests sent", lambda s: s.num_sent),
        ("requests failed", lambda s: s.num_failed),
        ("good answers", lambda s: s.num_completed),
        ("requests/s", lambda s: s.requests_per_s),
        ("goodput, requests/s", lambda s: s.goodput_per_s),
        ("tokens out/s", lambda s: s.output_tokens_per_s),
        ("tokens out/s, best second", lambda s: s.peak_output_tokens_per_s),
        ("tokens in and out/s", lambda s: s.total_tokens_per_s),
        ("images/s", lambda s: s.images_per_s or None),
        ("tiles/s", lambda s: s.tiles_per_s or None),
        ("image tokens/s", lambda s: s.image_tokens_per_s),
        ("in flight, mean", lambda s: s.mean_in_flight),
        ("in flight, most", lambda s: s.peak_in_flight),
        ("prompt tokens, mean", lambda s: s.mean_prompt_tokens),
        ("output tokens, mean", lambda s: s.mean_output_tokens),
    )
    rows = [[words, *(number(of(s)) for s in summaries)] for words, of in figures]
    told = [row for row in rows if any(cell != NONE for cell in row[1:])]
    return Table("Throughput", ["", *(s.label for s in summaries)], told, notes=list(_notes(summaries)))


def latency(summaries: Sequence[Summary], percentiles: Sequence[float]) -> Table:
    rows = []
    for s in summaries:
        for name, words in _LATENCIES:
            spread: Distribution | None = getattr(s, name)
            if spread is None or (name == "client_queue" and not any(spread.percentiles.values())):
                continue
            figures = [spread.mean, *(spread[p] for p in percentiles)]
            rows.append([s.label, words, *(number(value) for value in figures)])
    columns = ["load", "milliseconds", "mean", *(percentile_name(p) for p in percentiles)]
    return _without_lone_label(Table("Latency", columns, rows, num_labels=2), summaries)


def first_token(summaries: Sequence[Summary]) -> Table:
    """Where the time to the first token goes, as the server tells: by speed for one load, else one column a load."""
    told = [s for s in summaries if s.ttft_parts]
    groups = told[0].ttft_parts if len(summaries) == 1 and told else {s.label: s.ttft_parts["all"] for s in told}
    rows = [[part, *(number(parts[part]) for parts in groups.values())] for part in PARTS]
    rows.append(["TTFT", *(number(sum(parts.values())) for parts in groups.values())])
    note = "Mean ms. Stages overlap; each moment counts once, for the stage the first token still waited for."
    return Table("First token by stage", ["", *groups], rows if groups else [], notes=[note])


def failures(summaries: Sequence[Summary]) -> Table:
    rows = [[s.label, reason, str(count)] for s in summaries for reason, count in s.failures.items()]
    return Table("Failures", ["load", "reason", "requests"], rows, num_labels=2)


def comparison(names: tuple[str, str, str], summaries: Sequence[Summary]) -> Table:
    """Text requests alone and beside images. A ratio of 1: neither notices the other."""
    alone, images, both = names
    found = {(s.phase, s.source): s for s in summaries}
    pairs = (
        ("text", found[alone, "text"], found[both, "text"]),
        ("images", found[images, "images"], found[both, "images"]),
    )
    rows = []
    for source, before, beside in pairs:
        for words, first, second in (
            ("requests/s", before.requests_per_s, beside.requests_per_s),
            ("ITL p50, ms", _at(before.itl, 50), _at(beside.itl, 50)),
            ("ITL p99, ms", _at(before.itl, 99), _at(beside.itl, 99)),
            ("TTFT p50, ms", _at(before.ttft, 50), _at(beside.ttft, 50)),
        ):
            ratio = second / first if first and second is not None else None
            rows.append([source, words, number(first), number(second), NONE if ratio is None else f"{ratio:.2f} x"])
    return Table("Text beside images", ["requests", "", "alone", "beside the others", "ratio"], rows, num_labels=2)


def number(value: float | None) -> str:
    """Three significant digits, and whole numbers from a hundred on."""
    if value is None:
        return NONE
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.0e}"


def _without_lone_label(table: Table, summaries: Sequence[Summary]) -> Table:
    """A column that says the same in every row says nothing."""
    if len(summaries) > 1:
        return table
    rows = [row[1:] for row in table.rows]
    return Table(table.title, table.columns[1:], rows, num_labels=1, notes=table.notes)


def _at(spread: Distribution | None, percentile: float) -> float | None:
    return None if spread is None else spread[percentile]


def _notes(summaries: Iterable[Summary]) -> Iterable[str]:
    for s in summaries:
        if not s.source:
            continue  # the sum of others
        if not s.num_completed and not s.num_failed:
            yield f"{s.label}: no answer ended inside the window; measure longer."
        if s.num_late:
            yield f"{s.label}: {s.num_late} good answers ended after the window; latencies count them, rates do not."
        if s.num_unsent:
            yield f"{s.label}: the cap still held {s.num_unsent} arrivals back when the window closed."
        if s.client_queue is not None and s.client_queue[50] > 1:
            yield f"{s.label}: the cap binds; TTFT and E2E do not contain the wait for it."
        if s.client_lag is not None and s.client_lag[99] > LATE_CLIENT_MS:
            yield f"{s.label}: the client itself sent late, p99 {number(s.client_lag[99])} ms after the due time."
