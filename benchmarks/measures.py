"""Samples -> figures (API.md section 10). Pure: reads no clock and asks no server. Milliseconds and 1/s outside.

Which requests count:

* **Rates** (requests/s, tokens/s, images/s, goodput) count the good answers that ended inside the window, whenever
  they were sent, over the length of the window.
* **Latencies** describe the good answers to requests due inside the window, all of which were waited for: leaving
  out those that ended after it would leave out the slowest.
* **Failures** are those of requests due inside the window. They count for no rate and no latency.

TTFT: sending to first token event. ITL: between token events of one answer. E2E: sending to ``finish_reason``. TPOT:
(E2E - TTFT)/(output tokens - 1). Goodput: good answers per second that meet every limit; an answer of one token has
no TPOT to miss.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from benchmarks.samples import PhaseResult, Sample
from benchmarks.stages import STAGES, mean_parts, server_stages

METRICS: Final = ("ttft", "tpot", "itl", "e2el")
PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of some values: percentiles by linear interpolation between the two nearest of them."""

    count: int
    mean: float
    percentiles: dict[str, float]

    def __getitem__(self, percentile: float) -> float:
        return self.percentiles[percentile_name(percentile)]


@dataclass(frozen=True, slots=True)
class Summary:
    """One source in one phase, or all of them together (``source`` empty). Rates are 1/s, distributions
    milliseconds."""

    phase: str
    source: str
    label: str
    workload: str
    window_s: float
    num_sent: int
    num_completed: int
    num_failed: int
    num_unsent: int
    num_late: int
    """Good answers that ended after the window."""
    failures: dict[str, int]
    requests_per_s: float
    goodput_per_s: float | None
    output_tokens_per_s: float
    total_tokens_per_s: float
    peak_output_tokens_per_s: float
    images_per_s: float
    tiles_per_s: float | None
    image_tokens_per_s: float | None
    mean_in_flight: float
    peak_in_flight: int
    mean_prompt_tokens: float | None
    mean_output_tokens: float | None
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2el: Distribution | None
    client_queue: Distribution | None
    client_lag: Distribution | None
    stages: dict[str, Distribution] = field(default_factory=dict)
    ttft_parts: dict[str, dict[str, float]] = field(default_factory=dict)


def summarize(
    result: PhaseResult,
    percentiles: Sequence[float] = PERCENTILES,
    goodput: Mapping[str, float] | None = None,
) -> list[Summary]:
    """All sources of a phase, one by one; with more than one the first entry is the sum of them."""
    wanted = sorted({50.0, 99.0, *percentiles})
    sources = result.phase.sources
    groups = [(s.name, result.phase.label(s), s.asks, result.of(s)) for s in sources]
    if len(groups) > 1:
        groups.insert(0, ("", result.phase.name, "all of them", result.samples))
    return [_summary(result, *group, wanted, goodput) for group in groups]


def _summary(
    result: PhaseResult,
    source: str,
    label: str,
    workload: str,
    samples: Sequence[Sample],
    percentiles: Sequence[float],
    goodput: Mapping[str, float] | None,
) -> Summary:
    sent = [s for s in samples if _is_due(result, s)]
    good = measured(result, samples)
    done = completed(result, samples)
    failures = Counter(str(s.failure) for s in sent if s.failure is not None)

    def rate(values: Iterable[float]) -> float:
        return sum(values) / result.seconds if result.seconds > 0 else 0.0

    def spread(values: Iterable[float | None]) -> Distribution | None:
        return distribution([1e3 * value for value in values if value is not None], percentiles)

    has_stages = any("dvd" in s.metrics for s in done)
    in_flight = _in_flight(result, samples)
    return Summary(
        phase=result.phase.name,
        source=source,
        label=label,
        workload=workload,
        window_s=result.seconds,
        num_sent=len(sent),
        num_completed=len(done),
        num_failed=len(sent) - len(good),
        num_unsent=result.num_unsent[source] if source else result.num_unsent.total(),
        num_late=sum(s.ended_at > result.closed_at for s in good),
        failures=dict(failures.most_common()),
        requests_per_s=rate(1 for _ in done),
        goodput_per_s=None if not goodput else rate(meets(s, goodput) for s in done),
        output_tokens_per_s=rate(s.output_tokens for s in done),
        total_tokens_per_s=rate(s.output_tokens + (s.prompt_tokens or 0) for s in done),
        peak_output_tokens_per_s=_peak_rate(result, samples),
        images_per_s=rate(s.num_images for s in done),
        tiles_per_s=rate(server_stages(s).get("tiles") or 0 for s in done) if has_stages else None,
        image_tokens_per_s=rate(s.image_tokens for s in done) if any(s.image_tokens for s in done) else None,
        mean_in_flight=in_flight[0],
        peak_in_flight=in_flight[1],
        mean_prompt_tokens=_mean([s.prompt_tokens for s in good if s.prompt_tokens is not None]),
        mean_output_tokens=_mean([s.output_tokens for s in good]),
        ttft=spread(s.ttft for s in good),
        tpot=spread(s.tpot for s in good),
        itl=spread(gap for s in good for gap in s.gaps),
        e2el=spread(s.e2e for s in good),
        client_queue=spread(s.queue for s in sent),
        client_lag=spread(s.lag for s in sent),
        stages=_stages(good, percentiles),
        ttft_parts=mean_parts(good),
    )


def measured(result: PhaseResult, samples: Sequence[Sample]) -> list[Sample]:
    """Good answers to requests that were due inside the window: what latencies describe."""
    return [s for s in samples if s.is_ok and _is_due(result, s)]


def _is_due(result: PhaseResult, sample: Sample) -> bool:
    return result.opened_at <= sample.scheduled_at <= result.closed_at


def completed(result: PhaseResult, samples: Sequence[Sample]) -> list[Sample]:
    """Good answers that ended inside the window: what rates count."""
    return [s for s in samples if s.is_ok and result.opened_at <= s.ended_at <= result.closed_at]


def meets(sample: Sample, limits: Mapping[str, float]) -> bool:
    """Whether a good answer keeps within all ``limits``: milliseconds by ``ttft``, ``tpot``, ``e2el``."""
    values = {"ttft": sample.ttft, "tpot": sample.tpot or 0.0, "e2el": sample.e2e}
    return all(1e3 * values[name] <= limit for name, limit in limits.items())


def distribution(values: Sequence[float], percentiles: Sequence[float] = PERCENTILES) -> Distribution | None:
    """None of nothing."""
    if not values:
        return None
    found = np.percentile(values, list(percentiles))
    named = {percentile_name(p): float(value) for p, value in zip(percentiles, found, strict=True)}
    return Distribution(len(values), float(np.mean(values)), named)


def percentile_name(percentile: float) -> str:
    return f"p{percentile:g}"


def _stages(samples: Sequence[Sample], percentiles: Sequence[float]) -> dict[str, Distribution]:
    reports = [server_stages(sample) for sample in samples]
    spreads = {
        name: distribution([report[name] for report in reports if report.get(name) is not None], percentiles)
        for name in STAGES
    }
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _in_flight(result: PhaseResult, samples: Sequence[Sample]) -> tuple[float, int]:
    """Mean and most requests on their way inside the window."""
    if result.seconds <= 0 or not samples:
        return 0.0, 0
    begins = np.clip([s.sent_at for s in samples], result.opened_at, result.closed_at)
    ends = np.clip([s.ended_at for s in samples], result.opened_at, result.closed_at)
    inside = ends > begins
    steps = np.concatenate([begins[inside], ends[inside]])
    signs = np.concatenate([np.ones(inside.sum(), int), -np.ones(inside.sum(), int)])
    # Where one ends as another begins, the end comes first.
    order = np.lexsort((signs, steps))
    peak = int(np.cumsum(signs[order]).max(initial=0))
    return float((ends - begins).sum() / result.seconds), peak


def _peak_rate(result: PhaseResult, samples: Sequence[Sample]) -> float:
    """Most token events in one whole second of the window; of a shorter window, its mean rate."""
    times = [at - result.opened_at for sample in samples for at in sample.token_times]
    inside = [at for at in times if 0 <= at < result.seconds]
    if not inside:
        return 0.0
    num_bins = int(result.seconds)
    if num_bins < 1:
        return len(inside) / result.seconds
    return float(np.histogram(inside, bins=num_bins, range=(0, num_bins))[0].max())
