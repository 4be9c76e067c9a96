"""``python -m benchmarks page``: the records in ``benchmarks/results/`` as one page that compares them.

Every record says which command made it, from which commit, on what. The page shows the newest first and adds nothing
of its own; a record of a kind that it does not know is listed with its command.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.compare import by_system, comparison
from benchmarks.gpu_shapes import comparison as shapes_compared
from benchmarks.overlap import make_table as overlap_compared
from benchmarks.table18 import BASELINE, SIDES
from benchmarks.tables import NONE, Table, number
from common.service.errors import ConfigError

RESULTS: Final = Path(__file__).parent / "results"
_PAGE: Final = "README.md"
_INTRODUCTION: Final = """\
# Measured

Made by `python -m benchmarks page` from the records in this folder. Machines differ from run to run and are shared with
others: compare figures within one record only; ratios were measured side by side.
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the records")
    arguments = parser.parse_args(argv)
    path = arguments.results / _PAGE
    path.write_text(page(arguments.results), "utf-8")
    print(path)


def page(folder: Path) -> str:
    """Markdown of all records. Raises ConfigError for a file that is none."""
    sections = [_section(path, _read(path)) for path in sorted(folder.glob("*.json"), reverse=True)]
    return "\n".join([_INTRODUCTION, *sections])


def _section(path: Path, record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    where = f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_gib']} GiB"
    where = ", ".join([where, *hardware.get("gpus", [])])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"## {path.stem}",
        "",
        f"`{record['command']}`  ",
        f"{record['time']}, commit {record['commit']}, {where}  ",
        f"{versions}",
        "",
    ]
    page_file = path.with_suffix(".html")
    if page_file.exists():
        lines += [f"[The whole report]({page_file.name})", ""]
    return "\n".join([*lines, *(_markdown(table) for table in _tables(record))])


def _tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """What is known of a kind of record."""
    for key, show in _KINDS.items():
        if key in record or key in _figures(record):
            yield from show(record)
            return


def _compared(record: Mapping[str, Any]) -> Iterator[Table]:
    found = record["figures"]
    commands = dict.fromkeys(f"{run['system']}: `{run['command']}`" for run in found["runs"])
    table = shapes_compared(found["shape"], found["runs"]) if "shape" in found else _systems_compared(found)
    yield replace(table, notes=[*table.notes, *found["load"], *commands])


def _systems_compared(found: Mapping[str, Any]) -> Table:
    return comparison(by_system(found["runs"]), found.get("title", "Text beside images"))


def _table18(record: Mapping[str, Any]) -> Iterator[Table]:
    for layout in record["layouts"]:
        base = [cell["requests_per_s"] for cell in layout["cells"].get(BASELINE, [])]
        rows = []
        for name, cells in layout["cells"].items():
            values = [cell["requests_per_s"] for cell in cells]
            ratios = [f" ({value / under:.2f}x)" if under else "" for value, under in zip(values, base, strict=False)]
            rows.append([name, *(number(value) + ratio for value, ratio in zip(values, ratios, strict=False))])
        title = f"Table 18, {layout['name']}: requests/s"
        notes = [note for note in (layout["devices"], layout["reason"]) if note]
        yield Table(title, ["", *(f"{side} px" for side in SIDES)], rows, notes=notes)


def _served(record: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for summary in record["summaries"]:
        latencies = [_at(summary, metric, p) for metric in ("ttft", "itl") for p in ("p50", "p99")]
        figures = (summary["requests_per_s"], summary["output_tokens_per_s"], *latencies)
        rows.append([summary["label"], *(number(value) for value in figures), str(summary["num_failed"])])
    columns = ["load", "requests/s", "tokens out/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "failed"]
    yield Table("Throughput and latency (ms)", columns, rows, notes=record["load"])


def _flat(record: Mapping[str, Any]) -> Iterator[Table]:
    """Figures that are one number each, of one case or of a list of them."""
    if isinstance(record["figures"], list):
        yield _cases(record["figures"])
        return
    rows = [[name.replace("_", " "), _cell(value)] for name, value in _figures(record).items() if _is_flat(value)]
    yield Table("Figures", ["", ""], rows)


def _cases(cases: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each case; whatever a case holds as one number is a column."""
    names = [name for name, value in cases[0].items() if _is_flat(value)]
    rows = [[_cell(case[name]) for name in names] for case in cases]
    return Table("Cases", [name.replace("_", " ") for name in names], rows)


def _transports(record: Mapping[str, Any]) -> Iterator[Table]:
    ratios = ("of_raw_socket", "of_memcpy", "of_bare_zmq")
    rows = [
        [
            case["message"],
            case["subject"],
            number(case["gb_per_s"]),
            number(case["microseconds"]),
            *(NONE if case[ratio] is None else f"{case[ratio]:.2f}" for ratio in ratios),
        ]
        for case in record["figures"]
    ]
    columns = ["message", "subject", "GB/s", "µs each", *(ratio.replace("_", " ") for ratio in ratios)]
    yield Table("Features on their way", columns, rows, num_labels=2)


def _overlapped(record: Mapping[str, Any]) -> Iterator[Table]:
    yield overlap_compared(record["figures"]["runs"])


def _overloaded(record: Mapping[str, Any]) -> Iterator[Table]:
    found = record["figures"]
    rows = [
        [name, number(phase["goodput"]), number(phase["rejection_ms"]), number(phase["text_ms"])]
        for name, phase in (("at the peak", found["peak"]), ("beyond", found["overload"]))
    ]
    columns = ["", "pictures answered a second", "refused after, p99 ms", "text alone, p99 ms"]
    notes = [
        f"goodput {found['goodput_ratio']:.2f} of the peak, text {found['text_ratio']:.2f} times as long",
        *found["failures"],
    ]
    yield Table("Overload", columns, rows, notes=notes)


def _routed(record: Mapping[str, Any]) -> Iterator[Table]:
    """What the router costs beside a bare application, the marks beneath."""
    figures = record["figures"]
    columns = [
        "body",
        "tokens",
        "requests/s",
        "of the bare app",
        "of a bare relay",
        "first token later, p50 ms",
        "p99 ms",
        "its core busy",
    ]
    rows = [
        [
            case["body"],
            str(case["num_tokens"]),
            number(case["requests_per_s"]),
            f"{case['of_bare_app']:.2f}",
            f"{case['of_bare_relay']:.2f}",
            f"{case['added_p50_ms']:.2f}",
            f"{case['added_p99_ms']:.2f}",
            f"{100 * case['core_busy']:.0f} %",
        ]
        for case in figures
    ]
    yield Table("The router on one core", columns, rows, num_labels=2)


_KINDS: Final[Mapping[str, Callable[[Mapping[str, Any]], Iterator[Table]]]] = {
    "ratios": _overlapped,
    "goodput_ratio": _overloaded,
    "runs": _compared,
    "layouts": _table18,
    "summaries": _served,
    "of_raw_socket": _transports,
    "of_bare_app": _routed,
    "figures": _flat,
}


def _figures(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a record that ``write_record`` made; a list of them is known by its first."""
    figures = record.get("figures", {})
    first = figures[0] if isinstance(figures, list) and figures else figures
    return first if isinstance(first, Mapping) else {}


def _markdown(table: Table) -> str:
    head = [
        "| " + " | ".join(table.columns) + " |",
        "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|",
    ]
    rows = ["| " + " | ".join(row) + " |" for row in table.rows]
    notes = [f"* {note}" for note in table.notes]
    return "\n".join([f"**{table.title}**", "", *head, *rows, "", *notes, ""])


def _read(path: Path) -> dict[str, Any]:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        record["command"], record["hardware"], record["versions"], record["time"], record["commit"]
    except (msgspec.DecodeError, KeyError) as error:
        raise ConfigError(f"{path}: no record of ours: {error}") from None
    return record


def _at(summary: Mapping[str, Any], metric: str, percentile: str) -> float | None:
    spread = summary[metric]
    return None if spread is None else spread["percentiles"][percentile]


def _is_flat(value: object) -> bool:
    return isinstance(value, str | int | float)


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value) if value is not None else NONE
