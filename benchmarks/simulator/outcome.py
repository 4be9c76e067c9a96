"""What happened in a run -> figures. Rates count what ended in the window, latencies what arrived in it.

Gaps between tokens are those of the whole run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.simulator.jobs import Job
from benchmarks.simulator.lanes import Busy


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds, and 1/s. A latency is None where there was none; a cost where no price is known or nothing ended."""

    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    e2e_mean: float | None
    utilisation: dict[str, float]
    """Share of the window in which the servers of a group worked, on average; of groups that there are."""
    num_devices: int
    cost_per_million: float | None
    """Of requests, in the currency of the card's price."""
    num_requests: int
    num_events: int


def summarize(
    jobs: Sequence[Job],
    gaps: Sequence[tuple[float, int]],
    busy: Mapping[str, Sequence[Busy]],
    warmup: float,
    seconds: float,
    num_devices: int,
    price_per_hour: float | None,
    num_events: int,
) -> Outcome:
    """``price_per_hour``: of all devices together."""
    closes = warmup + seconds
    ended = [job for job in jobs if job.ended_at is not None and warmup <= job.ended_at <= closes]
    timely = [job for job in jobs if warmup <= job.arrived_at <= closes and job.ended_at is not None]
    ttft = [job.first_at - job.arrived_at for job in timely if job.first_at is not None]
    e2e = [job.ended_at - job.arrived_at for job in timely if job.ended_at is not None]
    rate = len(ended) / seconds
    cost = None if price_per_hour is None or not ended else price_per_hour / 3600 / rate * 1e6
    return Outcome(
        requests_per_s=rate,
        output_tokens_per_s=sum(job.num_answered for job in ended) / seconds,
        ttft_p50=_percentile(ttft, 50),
        ttft_p99=_percentile(ttft, 99),
        itl_p50=_weighted_percentile(gaps, 50),
        itl_p99=_weighted_percentile(gaps, 99),
        e2e_mean=float(np.mean(e2e)) if e2e else None,
        utilisation={
            group: sum(each.seconds for each in watched) / (seconds * len(watched))
            for group, watched in busy.items()
            if watched
        },
        num_devices=num_devices,
        cost_per_million=cost,
        num_requests=len(jobs),
        num_events=num_events,
    )


def _percentile(values: Sequence[float], percentile: float) -> float | None:
    return float(np.percentile(values, percentile)) if values else None


def _weighted_percentile(gaps: Sequence[tuple[float, int]], percentile: float) -> float | None:
    """The least gap that this share of all gaps does not exceed."""
    if not gaps:
        return None
    values, weights = (np.array(each, float) for each in zip(*gaps, strict=True))
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] * percentile / 100)])
