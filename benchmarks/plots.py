"""Samples -> pictures as SVG text, to stand inside an HTML page. Knows no HTML beyond that.

Colours are names of the page's style sheet (``var(--ink)``, ``var(--s0)``, ...), so that one picture is readable on
light and on dark. matplotlib only takes real colours: each name has a stand-in that is replaced in the finished SVG.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from benchmarks.measures import Summary
from benchmarks.samples import PhaseResult, Sample
from benchmarks.stages import PARTS
from benchmarks.tables import number
from benchmarks.timeline import Timeline, timeline

_INK, _MUTED, _GRID, _BAD = "#010101", "#010102", "#010103", "#010104"
_SERIES: Final = tuple(f"#0200{index:02x}" for index in range(8))
_PART_COLOURS: Final = tuple(f"#0300{index:02x}" for index in range(len(PARTS)))
_NAMES: Final = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _BAD: "--bad",
    **{colour: f"--s{index}" for index, colour in enumerate(_SERIES)},
    **{colour: f"--p{index}" for index, colour in enumerate(_PART_COLOURS)},
}
_WIDTH: Final = 9.6
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dvd",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_TAIL_TICKS: Final = (50.0, 90.0, 99.0, 99.9, 99.99)
_MAX_POINTS: Final = 160
_LOG_FROM: Final = 12.0
"""Where the largest value is this many times the least median, the axis is logarithmic."""
Load = tuple[str, list[Sample]]
"""Name of a line in a picture, and the answers it describes."""


def percentile_curves(loads: Sequence[Load]) -> str:
    """TTFT, ITL and E2E by percentile, the tail stretched."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, title, values in zip(
            panels,
            ("First token (TTFT)", "Between tokens (ITL)", "Whole answer (E2E)"),
            (
                [[s.ttft for s in samples] for _, samples in loads],
                [[gap for s in samples for gap in s.gaps] for _, samples in loads],
                [[s.e2e for s in samples] for _, samples in loads],
            ),
            strict=True,
        ):
            axes.set_title(title)
            _percentile_panel(axes, [name for name, _ in loads], values)
        panels[0].set_ylabel("milliseconds")
        if len(loads) > 1:
            handles, names = panels[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(loads)))
        return _svg(figure)


def _percentile_panel(axes: Axes, names: Sequence[str], values: Sequence[list[float]]) -> None:
    longest = max((len(each) for each in values), default=0)
    # A percentile beyond 1 in n of n values says nothing.
    top = 100 * (1 - 1 / max(2, longest))
    for index, (name, each) in enumerate(zip(names, values, strict=True)):
        if not each:
            continue
        stretched = np.linspace(0, _tail(100 * (1 - 1 / max(2, len(each)))), _MAX_POINTS)
        found = np.percentile(each, 100 * (1 - 10**-stretched)) * 1e3
        axes.plot(stretched, found, color=_SERIES[index % len(_SERIES)], label=name)
    ticks = [tick for tick in _TAIL_TICKS if tick <= top] or [50.0]
    axes.xaxis.set_major_locator(FixedLocator([_tail(tick) for tick in ticks]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"p{100 * (1 - 10**-at):.6g}"))
    medians = [1e3 * float(np.median(each)) for each in values if each]
    highest = max((1e3 * max(each) for each in values if each), default=0.0)
    if medians and highest > _LOG_FROM * min(medians) > 0:
        _logarithmic(axes, min(medians) / 4, highest * 1.3)
    else:
        axes.set_ylim(bottom=0)


def _tail(percentile: float) -> float:
    """Equal steps for p90, p99, p99.9."""
    return -math.log10(1 - percentile / 100)


def _logarithmic(axes: Axes, bottom: float, top: float) -> None:
    """From well below the medians: events that were read at once have gaps of zero."""
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def timelines(result: PhaseResult) -> str:
    """Requests in flight, and answers and tokens per second, along a phase."""
    sources = [(source.name, result.of(source)) for source in result.phase.sources]
    lines = [(name, timeline(result, samples)) for name, samples in sources if samples]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        for index, (name, line) in enumerate(lines):
            colour = _SERIES[index % len(_SERIES)]
            top.stairs(line.in_flight, line.edges, color=colour, label=name, linewidth=1.4, baseline=None)
            top.stairs(line.in_flight, line.edges, color=colour, alpha=0.15, fill=True)
            middle.stairs(line.completed_per_s, line.edges, color=colour, linewidth=1.4, baseline=None)
            bottom.stairs(line.output_tokens_per_s, line.edges, color=colour, linewidth=1.4, baseline=None)
        _failures_panel(middle, [line for _, line in lines])
        top.set_title("In flight")
        middle.set_title("Good answers per second")
        bottom.set_title("Tokens per second")
        bottom.set_xlabel("seconds since the window opened")
        for axes in (top, middle, bottom):
            axes.set_ylim(0, 1.08 * max(axes.dataLim.ymax, 1e-9))
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=axes is top))
            for edge in (0.0, result.seconds):
                axes.axvline(edge, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        if len(lines) > 1:
            top.legend(loc="upper right", bbox_to_anchor=(1, 1.35), ncols=len(lines))
        return _svg(figure)


def _failures_panel(axes: Axes, lines: Sequence[Timeline]) -> None:
    for line in lines:
        if any(line.failed_per_s):
            axes.stairs(line.failed_per_s, line.edges, color=_BAD, fill=True, alpha=0.8, label="failed")
            axes.legend(loc="upper right")


def first_token_stages(summaries: Sequence[Summary]) -> str | None:
    """Stacked parts of the mean TTFT; None where no server told."""
    rows = [
        (f"{summary.label}, {group}" if len(summaries) > 1 else group, parts)
        for summary in summaries
        for group, parts in summary.ttft_parts.items()
    ]
    if not rows:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        heights = np.arange(len(rows))[::-1]
        lefts = np.zeros(len(rows))
        for index, part in enumerate(PARTS):
            widths = np.array([parts[part] for _, parts in rows])
            if widths.any():
                axes.barh(heights, widths, left=lefts, height=0.66, color=_PART_COLOURS[index], label=part)
            lefts += widths
        for height, left in zip(heights, lefts, strict=True):
            axes.annotate(f"{number(float(left))} ms", (left, height), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(heights, [name for name, _ in rows])
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, float(lefts.max()) * 1.12)
        axes.set_xlabel("milliseconds, mean")
        figure.legend(loc="outside upper left", ncols=len(PARTS), handlelength=1, columnspacing=1.2)
        return _svg(figure)


def grouped_bars(groups: Sequence[str], values: Mapping[str, Sequence[float]], unit: str) -> str:
    """One group of bars for each of ``groups``, in it one bar for each name, with its value on top."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / max(1, len(values))
        places = np.arange(len(groups))
        for index, (name, heights) in enumerate(values.items()):
            offset = (index - (len(values) - 1) / 2) * width
            drawn = axes.bar(places + offset, heights, 0.92 * width, color=_SERIES[index % len(_SERIES)], label=name)
            axes.bar_label(drawn, [number(height) for height in heights], padding=2)
        axes.set_xticks(places, groups)
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=max(1, len(values)), handlelength=1)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """As part of a page: no XML header, no metadata, no fixed size, the page's colours and font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    start, end = text.split(">", 1)
    text = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", start) + ">" + end
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    return re.sub("|".join(_NAMES), lambda found: f"var({_NAMES[found[0]]})", text)
