"""Table 18 of the InternVL3.5 report (arXiv 2508.18265), simulated: ``python -m benchmarks simulator.paper``.

The report says: language models on 8 A100 in every row, 16 requests/s sent, images of 448, 896 and 1344 px. It says
nothing of the vision devices, the engine, the lengths or the images of a request, so these are assumed here, the same
for every figure of a model. Throughput is requests over the time until all of them are answered.

They were chosen among some ninety sets, so that rates and ratios come near the published ones: what agrees shows
that the model and the table are consistent, not that the model predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from rich.console import Console

from benchmarks.arrivals import OpenLoop
from benchmarks.serve import print_table
from benchmarks.simulator.pipeline import Cards, Layout, Pipeline, Scenario
from benchmarks.simulator.roofline import Efficiencies, published, published_card
from benchmarks.table18 import BASELINE, DIVIDED, PAPER, SIDES, WITH_VIR
from benchmarks.tables import Table
from benchmarks.workload import Size, Workload, fixed

_MODELS: Final = {"38B": "InternVL3_5-38B", "241B-A28B": "InternVL3_5-241B-A28B"}
_RATE: Final = 16.0
_TOKENS_IN: Final = 64
_TOKENS_OUT: Final = 128
_MAX_NUM_SEQS: Final = 128
_NUM_VISION: Final = 16
_VIR_SHARE: Final = 2 / 3
_EFFICIENCIES: Final = {"vision": 0.2, "prefill": 0.2, "prefill_experts": 0.16}
_SECONDS: Final = 30.0
ASSUMED: Final = (
    f"Assumed: {_NUM_VISION} A100 more for vision, one for each server; in the baseline each of the 8 encodes tiles of"
    f" its own; one image, {_TOKENS_IN} tokens in and {_TOKENS_OUT} out; at most {_MAX_NUM_SEQS} sequences;"
    f" {_VIR_SHARE:.0%} of tiles compressed, which is the report's half of all tokens; shares of the peak:"
    f" {', '.join(f'{name} {share:g}' for name, share in _EFFICIENCIES.items())}."
)
PAIRS: Final = ((DIVIDED, BASELINE), (WITH_VIR, BASELINE), (WITH_VIR, DIVIDED))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as many requests/s one row has as another, at one size."""

    of: str
    over: str
    side: int
    simulated: float
    published: float

    @property
    def error(self) -> float:
        """0.2: a fifth too high."""
        return self.simulated / self.published - 1


def requests_per_s(size: str) -> dict[str, tuple[float, ...]]:
    """The three rows of a model (``38B`` or ``241B-A28B``), simulated."""
    card = published_card("a100", _MODELS[size], 8, 1, _efficiencies())
    language = card.language_part().model_copy(update={"max_num_seqs": _MAX_NUM_SEQS})
    cards = Cards(card, card.model_copy(update={"language": language}))
    rows = {BASELINE: (0, 0.0), DIVIDED: (_NUM_VISION, 0.0), WITH_VIR: (_NUM_VISION, _VIR_SHARE)}
    return {
        name: tuple(_rate(Layout(num_vision, 1, 4), cards, side, vir_share) for side in SIDES)
        for name, (num_vision, vir_share) in rows.items()
    }


def _efficiencies() -> Efficiencies:
    return replace(
        published().efficiencies,
        vision=_EFFICIENCIES["vision"],
        prefill=_EFFICIENCIES["prefill"],
        prefill_experts=_EFFICIENCIES["prefill_experts"],
    )


def ratios(size: str, rows: dict[str, tuple[float, ...]]) -> list[Ratio]:
    """All nine."""
    return [
        Ratio(
            of,
            over,
            side,
            rows[of][index] / rows[over][index],
            PAPER[size][of][index] / PAPER[size][over][index],
        )
        for of, over in PAIRS
        for index, side in enumerate(SIDES)
    ]


def main(argv: Sequence[str]) -> int:
    """Print both models beside the published figures; takes no options."""
    console = Console(width=120)
    for size in PAPER:
        rows = requests_per_s(size)
        columns = ["", *(f"{side} px" for side in SIDES)]
        rates = [[name, *_beside(rows[name], PAPER[size][name])] for name in rows]
        print_table(console, Table(f"{size}, requests/s: simulated (published)", columns, rates))
        found = ratios(size, rows)
        lines = []
        for of, over in PAIRS:
            each = [ratio for ratio in found if (ratio.of, ratio.over) == (of, over)]
            shown = [f"{ratio.simulated:.2f} ({ratio.published:.2f}, {ratio.error:+.0%})" for ratio in each]
            lines.append([f"{of} over {over}", *shown])
        print_table(console, Table(f"{size}, times as many", columns, lines, notes=[ASSUMED]))
    return 0


def _beside(simulated: Sequence[float], published: Sequence[float]) -> list[str]:
    return [f"{ours:.2f} ({theirs:.2f})" for ours, theirs in zip(simulated, published, strict=True)]


def _rate(layout: Layout, cards: Cards, side: int, vir_share: float) -> float:
    workload = Workload(
        image_sizes=((Size(side, side), 1.0),), input_tokens=fixed(_TOKENS_IN), output_tokens=fixed(_TOKENS_OUT)
    )
    pipeline = Pipeline(layout, cards, Scenario(workload, OpenLoop(_RATE), _SECONDS, vir_share=vir_share))
    pipeline.drain()
    return len(pipeline.jobs) / pipeline.clock.now
