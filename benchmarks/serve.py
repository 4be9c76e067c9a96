"""``dvd bench serve``: options -> plan -> run -> tables, raw figures and a report."""

import shlex
import sys
from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.measures import Summary, summarize
from benchmarks.plan import Target
from benchmarks.presets import goodput_limits, make_plan, percentiles
from benchmarks.progress import ProgressBar
from benchmarks.report import write_report
from benchmarks.runner import run
from benchmarks.samples import Result
from benchmarks.settings import BenchServeSettings
from benchmarks.tables import Table, tables

_FILE_WIDTH: Final = 120


def main(settings: BenchServeSettings, argv: Sequence[str]) -> int:
    """Run what the options ask for and show it: 0 unless every request of some phase failed. Raises DvdError."""
    plan, limits, shown = make_plan(settings), goodput_limits(settings), percentiles(settings)
    target = Target(settings.base_url, settings.model, settings.api_key.get_secret_value(), settings.timeout)
    result = run(plan, target, ProgressBar(Console(stderr=True)))
    summaries = [summary for phase in result.phases for summary in summarize(phase, shown, limits)]
    found = tables(plan, summaries, shown)
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    print_result(console, result, summaries, found)
    if settings.results is not None:
        for path in write_report(
            settings.results, shown_command("serve", argv), settings.dump(), result, summaries, found
        ):
            console.print(str(path), soft_wrap=True, highlight=False)
    return 0 if all(summary.num_completed for summary in summaries) else 1


def print_result(console: Console, result: Result, summaries: Sequence[Summary], found: Sequence[Table]) -> None:
    """What was asked of whom, then the tables."""
    console.print(f"[bold]{escape(result.model)}[/] at {escape(result.base_url)}", highlight=False)
    for line in result.plan.describe():
        console.print(f"[dim]{escape(line)}[/]", soft_wrap=True, highlight=False)
    for table in found:
        console.print()
        print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """A table and its notes."""
    console.print(_rich(table))
    for note in table.notes:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True, highlight=False)


def shown_command(name: str, argv: Sequence[str], program: str = "dvd bench") -> str:
    """What was typed, without the key: it is going to be published."""
    shown = [argument if not argument.startswith("--api-key=") else "--api-key=***" for argument in argv]
    for index, argument in enumerate(shown[:-1]):
        if argument == "--api-key":
            shown[index + 1] = "***"
    return shlex.join([*program.split(), name, *shown])


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        shown.add_column(
            column, justify="left" if index < table.num_labels else "right", no_wrap=index < table.num_labels
        )
    before = ""
    for row in table.rows:
        first = "" if row[0] == before and table.num_labels > 1 else row[0]
        before = row[0]
        shown.add_row(*(escape(cell) for cell in (first, *row[1:])))
    return shown
