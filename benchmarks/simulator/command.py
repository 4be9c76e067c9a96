"""``dvd plan``: options -> simulations -> a table, a picture, JSON, and a cluster.yaml that `dvd up` takes."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from benchmarks.arrivals import OpenLoop
from benchmarks.presets import image_sizes, lengths
from benchmarks.record import environment
from benchmarks.serve import print_table
from benchmarks.settings import PlanSettings
from benchmarks.simulator.cluster import cluster_yaml
from benchmarks.simulator.hardware import HardwareCard
from benchmarks.simulator.picture import draw
from benchmarks.simulator.pipeline import Burst, Cards, Layout, Loss, Scenario, simulate
from benchmarks.simulator.roofline import published, published_card
from benchmarks.simulator.search import Candidate, Limits, at_rate, estimate, evaluate, search, splits
from benchmarks.tables import NONE, Table, number
from benchmarks.workload import Workload
from common.service.errors import ConfigError

_COLUMNS: Final = (
    *("requests/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "vision busy", "language busy", "cost per million"),
    "limits",
)


@dataclass(frozen=True, slots=True)
class Found:
    """What a plan is made of. ``others``: the best split when something is different, by what that is."""

    candidates: list[Candidate]
    best: Candidate
    others: dict[str, Candidate]


def main(settings: PlanSettings, argv: Sequence[str]) -> int:
    """Simulate, print, and write what ``--results`` asks for. Raises ConfigError."""
    cards = read_cards(settings)
    scenario = make_scenario(settings)
    found = plan(settings, cards, scenario, Console(stderr=True))
    out = Console(width=140)
    for table in tables(settings, cards, found):
        print_table(out, table)
    if settings.results is not None:
        for path in _write(settings, settings.results, cards, found, argv):
            out.print(str(path), soft_wrap=True, highlight=False)
    return 0


def read_cards(settings: PlanSettings) -> Cards:
    """Files, or cards of published hardware."""
    language = _card(settings.card, settings)
    vision = language if settings.vision_card is None else _card(settings.vision_card, settings)
    if vision.model != language.model:
        raise ConfigError(f"--vision-card: is for {vision.model}, --card for {language.model}; expected the same model")
    cards = Cards(vision, language, settings.transport)
    vision.vision_part(), language.language_part(), language.transport(settings.transport)
    return cards


def _card(name: str, settings: PlanSettings) -> HardwareCard:
    if name in published().devices:
        card = published_card(name, settings.model, settings.language_devices)
    elif name.endswith(".json"):
        card = HardwareCard.load(Path(name))
    else:
        raise ConfigError(f"--card {name[:64]}: expected {', '.join(published().devices)}, or a file *.json")
    return card if settings.price is None else card.model_copy(update={"price_per_device_hour": settings.price})


def make_scenario(settings: PlanSettings) -> Scenario:
    """The load. Raises ConfigError naming the option."""
    workload = Workload(
        image_sizes=image_sizes(settings.image_size),
        images_per_request=lengths("images_per_request", settings.images_per_request, 0),
        image_reuse_ratio=settings.image_reuse_ratio,
        text_only_share=settings.text_only_share,
        input_tokens=lengths("input_tokens", settings.input_tokens, 1),
        output_tokens=lengths("output_tokens", settings.output_tokens, 1),
    )
    arrivals = OpenLoop(settings.request_rate or 1.0, settings.burstiness)
    return Scenario(
        workload, arrivals, settings.duration, settings.warmup, vir_share=settings.vir_share, seed=settings.seed
    )


def plan(settings: PlanSettings, cards: Cards, scenario: Scenario, console: Console) -> Found:
    """The search, and what becomes of its best when something is different."""
    if (settings.vision is None) != (settings.language is None):
        raise ConfigError("--vision and --language: expected both, or neither for a search")
    limits = Limits(settings.ttft_limit / 1e3, settings.itl_limit / 1e3)
    capacity = estimate(cards, scenario)
    layouts = (
        [Layout(settings.vision, settings.language)]
        if settings.vision is not None and settings.language is not None
        else splits(settings.devices, cards, capacity)
    )

    def tell(candidate: Candidate) -> None:
        console.print(f"{candidate.layout}: {candidate.outcome.requests_per_s:.4g} requests/s", highlight=False)

    rate, routers = settings.request_rate, settings.routers
    candidates = list(search(layouts, cards, scenario, limits, capacity, rate, routers, tell))
    best = max(candidates, key=lambda candidate: candidate.merit)
    others = {
        words: _instead(best, cards, changed, limits)
        for words, changed in _differences(settings, best.layout, at_rate(scenario, best.rate)).items()
    }
    num_language = best.outcome.num_devices // cards.language.language_part().devices
    undivided = Layout(0, num_language, best.layout.num_routers)
    others["undivided"] = evaluate(undivided, cards, scenario, limits, capacity, rate)
    return Found(sorted(candidates, key=lambda each: each.layout.num_language), best, others)


def _differences(settings: PlanSettings, layout: Layout, scenario: Scenario) -> dict[str, Scenario]:
    middle = scenario.warmup + scenario.seconds / 2
    found = {f"{settings.burst} requests more at once": replace(scenario, burst=Burst(settings.burst, middle))}
    if layout.num_vision > 1:
        found["a vision server lost"] = replace(scenario, loss=Loss("vision", middle))
    if layout.num_language > 1:
        found["a language server lost"] = replace(scenario, loss=Loss("language", middle))
    if scenario.vir_share:
        found["without ViR"] = replace(scenario, vir_share=0.0)
    return found


def _instead(best: Candidate, cards: Cards, scenario: Scenario, limits: Limits) -> Candidate:
    outcome = simulate(best.layout, cards, scenario)
    return Candidate(best.layout, best.rate, outcome, limits.hold(outcome))


def tables(settings: PlanSettings, cards: Cards, found: Found) -> list[Table]:
    """Splits, and what becomes of the best of them."""
    chosen = [f"{'* ' if each is found.best else ''}{each.layout}" for each in found.candidates]
    rows = [[name, *_figures(each)] for name, each in zip(chosen, found.candidates, strict=True)]
    notes = [f"* chosen. {_load(settings)}", *_sources(cards)]
    limits = f"p99 of TTFT at most {settings.ttft_limit:g} ms, of ITL {settings.itl_limit:g} ms"
    rate = "" if settings.request_rate is None else f" at {settings.request_rate:g} requests/s"
    title = f"{found.best.outcome.num_devices} devices{rate}, {limits}"
    others = [[name, *_figures(each)] for name, each in found.others.items()]
    return [
        Table(title, ["", *_COLUMNS], rows, notes=notes),
        Table(f"{found.best.layout} at {number(found.best.rate)} requests/s, and", ["", *_COLUMNS], others),
    ]


def _figures(candidate: Candidate) -> list[str]:
    outcome = candidate.outcome
    busy = [outcome.utilisation.get(group) for group in ("vision", "language")]
    return [
        number(outcome.requests_per_s),
        *(_ms(value) for value in (outcome.ttft_p50, outcome.ttft_p99, outcome.itl_p50, outcome.itl_p99)),
        *(NONE if share is None else f"{share:.0%}" for share in busy),
        NONE if outcome.cost_per_million is None else number(outcome.cost_per_million),
        "kept" if candidate.keeps_limits else "missed",
    ]


def _ms(seconds: float | None) -> str:
    return NONE if seconds is None else number(1e3 * seconds)


def _load(settings: PlanSettings) -> str:
    vir = f", {settings.vir_share:.0%} of tiles compressed" if settings.vir_share else ""
    return f"Requests: {make_scenario(settings).workload}{vir}."


def _sources(cards: Cards) -> list[str]:
    each = {card.name: card for card in (cards.language, cards.vision)}
    return [f"{card.model}, {card.hardware}. {card.source.kind}: {card.source.text}" for card in each.values()]


def record(settings: PlanSettings, cards: Cards, found: Found, argv: Sequence[str]) -> dict[str, Any]:
    """Everything, to be read by programs."""
    return {
        **environment(shlex.join(["dvd", "plan", *argv])),
        "options": settings.dump().splitlines(),
        "cards": {"vision": cards.vision.model_dump(mode="json"), "language": cards.language.model_dump(mode="json")},
        "candidates": [asdict(each) for each in found.candidates],
        "best": asdict(found.best),
        "others": {name: asdict(each) for name, each in found.others.items()},
    }


def _write(
    settings: PlanSettings, folder: Path, cards: Cards, found: Found, argv: Sequence[str]
) -> tuple[Path, Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    raw, picture, cluster = folder / "plan.json", folder / "plan.svg", folder / "cluster.yaml"
    raw.write_bytes(msgspec.json.format(msgspec.json.encode(record(settings, cards, found, argv)), indent=1) + b"\n")
    draw(found.candidates, found.best, picture)
    directory = settings.model_path or f"/models/{cards.language.model}"
    cluster.write_text(cluster_yaml(found.best.layout, cards, directory), "utf-8")
    return raw, picture, cluster
