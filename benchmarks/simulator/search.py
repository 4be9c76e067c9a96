"""How to divide devices between vision and language: the split that answers most while it keeps the limits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from benchmarks.arrivals import ClosedLoop, OpenLoop
from benchmarks.simulator.jobs import jobs
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.pipeline import Cards, Layout, Pipeline, Scenario, simulate
from common.service.errors import ConfigError

_ALL_SPLITS: Final = 10
"""So many are tried one and all; of more those around the balance."""
_LEAST_SPLITS: Final = 3
"""So many are shown, however much worse than the first."""
_AROUND: Final = (0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.3)
_FIRST_SHARE: Final = 0.75
"""Of the capacity: about what limits leave of it."""
_CLOSE: Final = 0.05
"""A rate is found when it is known so well; a split that keeps no limits at so little of its capacity keeps none."""
_OVER: Final = 1.05
"""A system may do so much better than its estimate: others are left out below that."""
_SAMPLE: Final = 500
_PROBE_REQUESTS: Final = 1000
_PROBE_ROUTERS: Final = 64
_MOST_REQUESTS: Final = 40_000
_LEAST_SECONDS: Final = 10.0
_KEPT_UP: Final = 0.9
"""A system that answers less than this share of what arrives is overloaded, whatever its latencies still are."""
_ROUTER_LOAD: Final = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that the p99 may take."""

    ttft: float
    itl: float

    def hold(self, outcome: Outcome) -> bool:
        ttft, itl = outcome.ttft_p99, outcome.itl_p99
        return ttft is not None and ttft <= self.ttft and (itl is None or itl <= self.itl)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One split at the highest rate at which it keeps the limits, or at the rate that was asked for."""

    layout: Layout
    rate: float
    outcome: Outcome
    keeps_limits: bool

    @property
    def merit(self) -> tuple[bool, float, float]:
        """The larger the better: limits, then throughput, then a soon first token."""
        ttft = self.outcome.ttft_p99
        return self.keeps_limits, round(self.outcome.requests_per_s, 3), -(float("inf") if ttft is None else ttft)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests/s of one server of each kind at most, estimated."""

    vision: float
    language: float
    router: float

    def of(self, layout: Layout) -> float:
        if not layout.num_vision:
            return layout.num_language * self.language
        return min(layout.num_vision * self.vision, layout.num_language * self.language)

    def num_routers(self, rate: float) -> int:
        return max(1, round(rate / (self.router * _ROUTER_LOAD) + 0.5))


def estimate(cards: Cards, scenario: Scenario) -> Capacity:
    """Of a language server by how long it takes over many requests at once, with features as fast as they can be; of
    the others by their cards."""
    sample = list(islice(jobs(scenario.workload, scenario.seed, scenario.vir_share), _SAMPLE))
    tiles = sum(image.num_tiles - image.num_there for job in sample for image in job.images) / len(sample)
    tokens = sum(job.output_tokens for job in sample) / len(sample)
    vision, router = cards.vision.vision_part(), cards.language.router
    per_vision = vision.max_batch / vision.batch_seconds(vision.max_batch) / tiles if tiles else float("inf")
    per_router = 1 / max(1e-9, router.s_per_request + router.s_per_token * tokens)
    ample = Layout(max(1, math.ceil(_PROBE_REQUESTS * tiles / vision.max_batch)), 1, _PROBE_ROUTERS)
    crowd = replace(scenario, arrivals=ClosedLoop(_PROBE_REQUESTS), seconds=0.0, warmup=1e-9, loss=None, burst=None)
    pipeline = Pipeline(ample, cards, crowd)
    pipeline.drain()
    return Capacity(per_vision, _PROBE_REQUESTS / pipeline.clock.now, per_router)


def splits(num_devices: int, cards: Cards, capacity: Capacity) -> list[Layout]:
    """Those worth a look, most promising first. Raises ConfigError where not even one of each fits."""
    of_vision, of_language = cards.vision.vision_part().devices, cards.language.language_part().devices
    most = (num_devices - of_vision) // of_language
    if most < 1:
        raise ConfigError(
            f"--devices {num_devices}: expected at least {of_vision + of_language}, one vision server of {of_vision}"
            f" and one language server of {of_language}"
        )

    def layout(num_language: int) -> Layout:
        return Layout((num_devices - num_language * of_language) // of_vision, num_language)

    numbers = set(range(1, most + 1))
    if most > _ALL_SPLITS:
        best = max(numbers, key=lambda number: capacity.of(layout(number)))
        numbers = {min(most, max(1, round(best * share))) for share in _AROUND}
    return sorted(map(layout, numbers), key=capacity.of, reverse=True)


def search(
    layouts: list[Layout],
    cards: Cards,
    scenario: Scenario,
    limits: Limits,
    capacity: Capacity,
    rate: float | None,
    num_routers: int | None = None,
    on_progress: Callable[[Candidate], None] = lambda candidate: None,
) -> Iterator[Candidate]:
    """Each split at its best, or at ``rate``; those that cannot be better than what was found are left out."""
    best = 0.0
    for number, layout in enumerate(layouts):
        if rate is None and number >= _LEAST_SPLITS and capacity.of(layout) * _OVER < best:
            continue
        routers = num_routers or capacity.num_routers(rate or capacity.of(layout))
        candidate = evaluate(replace(layout, num_routers=routers), cards, scenario, limits, capacity, rate)
        best = max(best, candidate.outcome.requests_per_s if candidate.keeps_limits else 0.0)
        on_progress(candidate)
        yield candidate


def evaluate(
    layout: Layout, cards: Cards, scenario: Scenario, limits: Limits, capacity: Capacity, rate: float | None
) -> Candidate:
    """At ``rate``, or by halving at the highest rate that keeps the limits."""
    if rate is not None:
        return _at_rate(layout, cards, scenario, limits, rate)
    low, high = 0.0, capacity.of(layout) * _OVER
    kept: Candidate | None = None
    tried = _at_rate(layout, cards, scenario, limits, _FIRST_SHARE * high)
    while True:
        if tried.keeps_limits:
            low, kept = tried.rate, tried
        else:
            high = tried.rate
        if high - low < _CLOSE * high or high < _CLOSE * capacity.of(layout):
            return kept or tried
        tried = _at_rate(layout, cards, scenario, limits, (low + high) / 2)


def _at_rate(layout: Layout, cards: Cards, scenario: Scenario, limits: Limits, rate: float) -> Candidate:
    asked = at_rate(scenario, rate)
    outcome = simulate(layout, cards, asked)
    keeps_up = outcome.requests_per_s >= _KEPT_UP * rate or outcome.num_requests < _SAMPLE
    return Candidate(layout, rate, outcome, keeps_up and limits.hold(outcome))


def at_rate(scenario: Scenario, rate: float) -> Scenario:
    """The same requests at another rate, and not more of them than it takes to know."""
    burstiness = scenario.arrivals.burstiness if isinstance(scenario.arrivals, OpenLoop) else 1.0
    seconds = max(min(scenario.seconds, _LEAST_SECONDS), min(scenario.seconds, _MOST_REQUESTS / rate))
    return replace(scenario, arrivals=OpenLoop(rate, burstiness), seconds=seconds)
