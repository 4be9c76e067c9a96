"""``dvd bench table18``: table 18 of the InternVL3.5 report (arXiv 2508.18265), on whatever hardware is here.

Rows: the undivided baseline (``--colocated``), DvD, and DvD with the Visual Resolution Router, which needs a Flash
checkpoint. Columns: images of 448, 896 and 1344 px. Once with the same devices in every row, and once in the paper's
way: the language model keeps the baseline's devices, and the vision server gets others beside them.

The paper offers 16 requests/s and says neither how many images a request has, nor its lengths, nor what the vision
servers run on. Here a request has one image, and unless ``--request-rate`` asks for the paper's load a closed loop
finds what the system can do.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from benchmarks.arrivals import Arrivals, ClosedLoop, OpenLoop
from benchmarks.measures import Summary, summarize
from benchmarks.plan import Phase, Plan, Source
from benchmarks.plots import grouped_bars
from benchmarks.progress import ProgressBar
from benchmarks.record import environment
from benchmarks.report import render
from benchmarks.runner import run
from benchmarks.serve import print_table, shown_command
from benchmarks.settings import Table18Settings
from benchmarks.systems import Dvd, System
from benchmarks.tables import NONE, Table, number
from benchmarks.workload import Size, Workload, fixed

SIDES: Final = (448, 896, 1344)
BASELINE, DIVIDED, WITH_VIR = "baseline", "+ DvD", "+ DvD + ViR"
PAPER: Final[Mapping[str, Mapping[str, tuple[float, float, float]]]] = {
    "38B": {BASELINE: (12.39, 2.71, 1.48), DIVIDED: (14.69, 5.06, 2.92), WITH_VIR: (18.62, 10.97, 5.14)},
    "241B-A28B": {BASELINE: (11.29, 2.54, 1.37), DIVIDED: (14.05, 4.73, 2.75), WITH_VIR: (20.84, 8.81, 4.27)},
}
"""Requests/s at 448, 896 and 1344 px, language models on 8 A100, 16 requests/s offered (report, table 18)."""
_TEMPLATE: Final = "table18.html.jinja"
NEEDS_FLASH: Final = "needs a Flash checkpoint: --flash-model DIRECTORY"


@dataclass(frozen=True, slots=True)
class Row:
    """One system of a layout, or why there is none."""

    name: str
    system: System | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """One of the two tables."""

    name: str
    devices: str
    rows: tuple[Row, ...]
    reason: str = ""
    """Why it cannot be measured here."""


@dataclass(slots=True)
class Cell:
    """What one system did at one size."""

    requests_per_s: float
    ttft_ms: float | None
    summary: dict[str, Any]


Figures = dict[str, list[Cell]]
"""Cells of a layout in the order of ``SIDES``, by row."""


def main(settings: Table18Settings, argv: Sequence[str]) -> int:
    """Measure, print, and write what ``--results`` asks for. Raises DvdError."""
    plan, found = make_plan(settings), layouts(settings)
    console = Console(stderr=True)
    figures = {layout.name: measure(layout, plan, console) for layout in found}
    tables = [*(table_of(layout, figures[layout.name]) for layout in found), *paper_tables()]
    out = Console(width=120)
    for table in tables:
        print_table(out, table)
    if settings.results is not None:
        for path in _write(settings, argv, plan, found, figures, tables):
            out.print(str(path), soft_wrap=True, highlight=False)
    return 0


def make_plan(settings: Table18Settings) -> Plan:
    """One phase for each size, with the same load."""
    workload = Workload(
        input_tokens=fixed(settings.input_tokens), output_tokens=fixed(settings.output_tokens), ignore_eos=True
    )
    arrivals: Arrivals = ClosedLoop(settings.concurrency)
    if settings.request_rate is not None:
        arrivals = OpenLoop(settings.request_rate)
    phases = [
        Phase(
            f"{side} px",
            (Source("requests", arrivals, replace(workload, image_sizes=((Size(side, side), 1.0),))),),
            settings.duration,
            settings.warmup,
        )
        for side in SIDES
    ]
    return Plan(tuple(phases), settings.seed)


def layouts(settings: Table18Settings) -> list[Layout]:
    """Both tables, for the devices that are here."""
    equal, added = _on_cpu(settings) if _num_gpus(settings) == 0 else _on_gpus(settings)
    return [equal, added]


def measure(layout: Layout, plan: Plan, console: Console) -> Figures:
    """Every row that has a system, one after the other."""
    figures: Figures = {}
    for row in layout.rows:
        if row.system is None:
            continue
        console.print(f"{layout.name}: {row.name}", highlight=False)
        with row.system.serving() as target:
            result = run(plan, target, ProgressBar(console))
        figures[row.name] = [_cell(summary) for phase in result.phases for summary in summarize(phase)]
    return figures


def table_of(layout: Layout, figures: Figures) -> Table:
    """Requests/s and, against the baseline, how many times as many."""
    title = f"Requests/s, {layout.name}"
    columns = ["", *(f"{side} px" for side in SIDES)]
    if layout.reason:
        return Table(title, columns, [[layout.reason, *[NONE] * len(SIDES)]])
    base = [cell.requests_per_s for cell in figures.get(BASELINE, [])]
    rows = []
    for row in layout.rows:
        if row.system is None:
            rows.append([f"{row.name} ({row.reason})", *[NONE] * len(SIDES)])
        else:
            values = base if row.name == BASELINE else [cell.requests_per_s for cell in figures[row.name]]
            rows.append([row.name, *_against(values, base)])
    return Table(title, columns, rows, notes=[layout.devices])


def paper_tables() -> Iterator[Table]:
    """The published figures, for the eye; other hardware, other models."""
    for model, rows in PAPER.items():
        shown = [[name, *_against(values, rows[BASELINE], "{:.2f}".format)] for name, values in rows.items()]
        note = (
            "Report, table 18: language model on 8 A100 in every row, vision devices not stated; 16 requests/s offered."
        )
        yield Table(f"The paper, {model}", ["", *(f"{side} px" for side in SIDES)], shown, notes=[note])


def bars(layout: Layout, figures: Figures) -> dict[str, list[float]]:
    """Requests/s in the order of ``SIDES``, by row, for the picture."""
    return {row.name: [cell.requests_per_s for cell in figures[row.name]] for row in layout.rows if row.name in figures}


def _write(
    settings: Table18Settings,
    argv: Sequence[str],
    plan: Plan,
    found: Sequence[Layout],
    figures: Mapping[str, Figures],
    tables: Sequence[Table],
) -> list[Path]:
    """Raw figures as JSON, and the tables with pictures as a page. Returns both paths."""
    assert settings.results is not None  # asked before
    known = environment(shown_command("table18", argv))
    record = {
        **known,
        "options": settings.dump().splitlines(),
        "load": plan.describe(),
        "layouts": [
            {
                "name": layout.name,
                "devices": layout.devices,
                "reason": layout.reason,
                "commands": {row.name: row.system.command for row in layout.rows if row.system is not None},
                "cells": {name: [asdict(cell) for cell in cells] for name, cells in figures[layout.name].items()},
            }
            for layout in found
        ],
    }
    pictures = [(layout.name, bars(layout, figures[layout.name])) for layout in found if figures[layout.name]]
    pictures += [
        (f"the paper, {model}", {name: list(row) for name, row in rows.items()}) for model, rows in PAPER.items()
    ]
    settings.results.mkdir(parents=True, exist_ok=True)
    stem = settings.results / f"{datetime.now(UTC):%Y-%m-%d}-table18-{Path(settings.model).name}"
    raw, page = stem.with_suffix(".json"), stem.with_suffix(".html")
    raw.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    columns = [f"{side} px" for side in SIDES]
    drawn = [(name, grouped_bars(columns, values, "requests/s")) for name, values in pictures]
    page.write_text(
        render(_TEMPLATE, known=known, loads=plan.describe(), tables=tables, pictures=drawn, model=settings.model),
        "utf-8",
    )
    return [raw, page]


def _against(values: Sequence[float], base: Sequence[float], show: Callable[[float], str] = number) -> Iterator[str]:
    """Each value, and how many times as much as the baseline it is; the baseline itself is compared with nothing."""
    for index, value in enumerate(values):
        has_ratio = values is not base and index < len(base) and base[index] > 0
        yield show(value) + (f" ({value / base[index]:.2f}x)" if has_ratio else "")


def _cell(summary: Summary) -> Cell:
    ttft = None if summary.ttft is None else summary.ttft[50]
    return Cell(summary.requests_per_s, ttft, asdict(summary))


def _on_cpu(settings: Table18Settings) -> tuple[Layout, Layout]:
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    kept, added = frozenset(cores[:half]), frozenset(cores[half:])
    equal = Layout(
        "equal devices",
        f"{_cores(len(cores))} in every row, shared by all processes of the row",
        _rows(settings, {"colocated": True}, {}),
    )
    if not half:
        reason = "needs two cores: one for the language model, one that is added for vision"
        return equal, Layout("vision devices added", "", (), reason)
    divided = {"vision_cores": sorted(added), "language_cores": sorted(kept)}
    note = f"baseline and language model on {_cores(half)}, vision server on {len(added)} more"
    rows = _rows(settings, {"colocated": True}, divided, kept)
    return equal, Layout("vision devices added", note, rows)


def _on_gpus(settings: Table18Settings) -> tuple[Layout, Layout]:
    first = {"device": "cuda:0"}
    equal = Layout(
        "equal devices",
        "one GPU in every row, shared by both tiers",
        _rows(settings, {"colocated": True, **first}, first),
    )
    if _num_gpus(settings) < 2:
        reason = "needs two GPUs: one for the language model, one that is added for vision"
        return equal, Layout("vision devices added", "", (), reason)
    divided = {"language_devices": ["cuda:0"], "vision_devices": ["cuda:1"]}
    note = "baseline and language model on one GPU; vision server on a second one"
    return equal, Layout("vision devices added", note, _rows(settings, {"colocated": True, **first}, divided))


def _cores(number: int) -> str:
    return "1 core" if number == 1 else f"{number} cores"


def _rows(
    settings: Table18Settings,
    undivided: Mapping[str, Any],
    divided: Mapping[str, Any],
    baseline_cores: frozenset[int] = frozenset(),
) -> tuple[Row, ...]:
    common = {} if settings.dtype == "auto" else {"dtype": settings.dtype}
    with_vir = Row(WITH_VIR, None, NEEDS_FLASH)
    if settings.flash_model is not None:
        with_vir = Row(WITH_VIR, Dvd(WITH_VIR, settings.flash_model, {**common, **divided}))
    return (
        Row(BASELINE, Dvd(BASELINE, settings.model, {**common, **undivided}, baseline_cores)),
        Row(DIVIDED, Dvd(DIVIDED, settings.model, {**common, **divided})),
        with_vir,
    )


def _num_gpus(settings: Table18Settings) -> int:
    """Those this process may use; none where ``--device cpu`` asks for none."""
    import torch  # seconds, and only this question needs it

    return 0 if settings.device == "cpu" else torch.cuda.device_count()
