"""Splits -> a picture: what each answers, and how busy its servers are."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.simulator.search import Candidate


def draw(candidates: Sequence[Candidate], best: Candidate, path: Path) -> None:
    """Write it; the ending of ``path`` says in which format."""
    names = [f"{each.layout.num_vision} : {each.layout.num_language}" for each in candidates]
    places = range(len(names))
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    colours = ["C2" if each is best else "C0" if each.keeps_limits else "0.8" for each in candidates]
    top.bar(places, [each.outcome.requests_per_s for each in candidates], color=colours)
    top.set_ylabel("requests/s")
    top.set_title("Green: chosen. Grey: misses the limits.", loc="left", fontsize=9)
    for group in ("vision", "language", "way", "router"):
        shares = [100 * each.outcome.utilisation.get(group, 0.0) for each in candidates]
        bottom.plot(places, shares, marker="o", label=group)
    bottom.set_ylim(0, 105)
    bottom.set_ylabel("busy, %")
    bottom.set_xlabel("vision servers : language servers")
    bottom.set_xticks(list(places), names)
    bottom.legend(frameon=False)
    figure.savefig(path)
