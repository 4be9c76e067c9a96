"""When requests are sent. Knows no clock, no server and no request: seconds from the start of a source, seeded.

A closed loop has no times of its own: each of its clients sends when its last answer has come. Everything else is
open: an arrival waits for nobody, unless ``max_concurrency`` holds it back, and then the wait is measured
(``queue``).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Strategy = Literal["linear", "exponential"]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``concurrency`` clients, each with one request at a time."""

    concurrency: int

    def __str__(self) -> str:
        return f"closed loop of {self.concurrency}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """``rate`` requests/s on average; infinite: all at once. Gaps are gamma distributed with shape ``burstiness``.

    1 is a Poisson process, below 1 arrivals come in bursts, above 1 they become regular (as in ``vllm bench serve``).
    """

    rate: float
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def __str__(self) -> str:
        how = (
            "all at once" if math.isinf(self.rate) else f"open loop, {self.rate:g} requests/s{_shape(self.burstiness)}"
        )
        return how + _cap(self.max_concurrency)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that goes from ``start_rate`` to ``end_rate`` requests/s within ``seconds``, then stays there."""

    strategy: Strategy
    start_rate: float
    end_rate: float
    seconds: float
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def __str__(self) -> str:
        rise = f"from {self.start_rate:g} to {self.end_rate:g} requests/s in {self.seconds:g} s"
        return f"{self.strategy} ramp {rise}{_shape(self.burstiness)}{_cap(self.max_concurrency)}"

    @classmethod
    def for_requests(
        cls,
        strategy: Strategy,
        start_rate: float,
        end_rate: float,
        num_requests: int,
        burstiness: float = 1.0,
        max_concurrency: int | None = None,
    ) -> "Ramp":
        """As long as it takes to send ``num_requests`` on average."""
        unit = cls(strategy, start_rate, end_rate, 1.0)
        seconds = num_requests / expected_requests(unit, 1.0)
        return cls(strategy, start_rate, end_rate, seconds, burstiness, max_concurrency)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace: seconds since its first one, and its lengths in tokens."""

    at: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace, ``speed`` times as fast as it was recorded."""

    requests: tuple[Recorded, ...]
    speed: float = 1.0
    max_concurrency: int | None = None

    def __str__(self) -> str:
        seconds = self.requests[-1].at / self.speed
        return f"trace of {len(self.requests)} requests in {seconds:.3g} s{_cap(self.max_concurrency)}"


def _shape(burstiness: float) -> str:
    return ", Poisson" if burstiness == 1 else f", burstiness {burstiness:g}"


def _cap(max_concurrency: int | None) -> str:
    return "" if max_concurrency is None else f", at most {max_concurrency} at a time"


Open = OpenLoop | Ramp | Replay
Arrivals = ClosedLoop | Open


def send_times(arrivals: Open, rng: np.random.Generator, warmup: float = 0.0) -> Iterator[float]:
    """Seconds at which requests leave, endless but for a trace. A ramp begins to rise after ``warmup`` seconds."""
    match arrivals:
        case Replay(requests=requests, speed=speed):
            yield from (request.at / speed for request in requests)
        case OpenLoop(rate=rate) if math.isinf(rate):
            yield from itertools.repeat(0.0)
        case OpenLoop(rate=rate, burstiness=burstiness):
            yield from (work / rate for work in _unit_arrivals(burstiness, rng))
        case Ramp(burstiness=burstiness, start_rate=start_rate):
            before = warmup * start_rate
            for work in _unit_arrivals(burstiness, rng):
                yield work / start_rate if work < before else warmup + _time_of(arrivals, work - before)


def expected_requests(ramp: Ramp, seconds: float) -> float:
    """How many requests a ramp sends on average within ``seconds``: the integral of its rate."""
    rising = min(seconds, ramp.seconds)
    flat = (seconds - rising) * ramp.end_rate
    if ramp.strategy == "linear":
        slope = (ramp.end_rate - ramp.start_rate) / ramp.seconds
        return ramp.start_rate * rising + slope * rising**2 / 2 + flat
    growth = math.log(ramp.end_rate / ramp.start_rate) / ramp.seconds
    if growth == 0:
        return ramp.start_rate * seconds
    return ramp.start_rate * math.expm1(growth * rising) / growth + flat


def _time_of(ramp: Ramp, num_requests: float) -> float:
    """The inverse of ``expected_requests``."""
    whole = expected_requests(ramp, ramp.seconds)
    if num_requests >= whole:
        return ramp.seconds + (num_requests - whole) / ramp.end_rate
    if ramp.start_rate == ramp.end_rate:
        return num_requests / ramp.start_rate
    if ramp.strategy == "linear":
        slope = (ramp.end_rate - ramp.start_rate) / ramp.seconds
        # The smaller root, written so that nothing cancels.
        return 2 * num_requests / (ramp.start_rate + math.sqrt(ramp.start_rate**2 + 2 * slope * num_requests))
    growth = math.log(ramp.end_rate / ramp.start_rate) / ramp.seconds
    return math.log1p(num_requests * growth / ramp.start_rate) / growth


def _unit_arrivals(burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Arrivals of mean gap 1. A changing rate stretches them (time rescaling)."""
    at = 0.0
    while True:
        for gap in rng.gamma(burstiness, 1 / burstiness, 256):
            at += float(gap)
            yield at
