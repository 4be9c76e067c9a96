"""Answers of a deployment, with the times it tells -> rates of a hardware card. Pure: asks nobody, reads no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.profile.ways import router_rates
from benchmarks.samples import PhaseResult, Sample
from benchmarks.simulator.hardware import (
    DecodePoint,
    PrefillPoint,
    RouterRates,
    TransportRates,
    VisionPoint,
    VisionRates,
)
from benchmarks.stages import server_stages, split_ttft
from common.service.errors import Unavailable

_MIN_STEPS: Final = 4
"""Fewer say little."""
NEEDED: Final = frozenset({"encode_ms", "tiles", "transfer_ms", "feature_bytes", "image_tokens"})
"""What a router must tell of a picture."""


@dataclass(frozen=True, slots=True)
class Images:
    """``alone``: results of pictures one by one; ``at_once``: by number of clients for each vision server."""

    alone: list[PhaseResult]
    at_once: dict[int, list[PhaseResult]]


def refuse_silence(results: Sequence[PhaseResult]) -> None:
    """Raises Unavailable unless the router tells where the time of a picture went."""
    missing = NEEDED - {name for sample in good(results) for name, value in server_stages(sample).items() if value}
    if missing:
        raise Unavailable(
            f"answers do not tell {', '.join(sorted(missing))}; the router needs --enable-per-request-metrics, and no"
            " cache that knows these pictures"
        )


def vision_rates(images: Images, num_servers: int) -> VisionRates:
    """Of one server: pictures alone by what encoding took, several at once by what came back."""
    by_tiles: dict[int, list[Sample]] = {}
    for sample in good(images.alone):
        by_tiles.setdefault(int(server_stages(sample)["tiles"]), []).append(sample)
    rates = {tiles: 1e3 * tiles / _median(samples, "encode_ms") for tiles, samples in by_tiles.items()}
    most = max(by_tiles)
    for number, results in images.at_once.items():
        rates[number * most] = median(_tiles_per_s(result) for result in results) / num_servers
    return VisionRates(
        max_batch=max(rates),
        image_s_per_tile=_median(by_tiles[most], "decode_ms") / 1e3 / most,
        tiles=tuple(VisionPoint(batch=batch, tiles_per_s=rate) for batch, rate in sorted(rates.items())),
    )


def _tiles_per_s(result: PhaseResult) -> float:
    """From the first picture sent to the last one answered: a window would lose what it cuts, and it is short."""
    samples = good([result])
    seconds = max(sample.ended_at for sample in samples) - min(sample.sent_at for sample in samples)
    return total(samples, "tiles") / seconds


def prefill_points(prompts: Sequence[Sequence[PhaseResult]]) -> tuple[PrefillPoint, ...]:
    """One for each length that was asked for, by what the server counted."""
    points = {}
    for results in prompts:
        samples = good(results)
        length = round(median(sample.prompt_tokens or 0 for sample in samples))
        milliseconds = _median(samples, "prefill_ms")
        points[length] = PrefillPoint(length=length, tokens_per_s=1e3 * length / milliseconds)
    return tuple(points.values())


def decode_points(steps: Mapping[tuple[int, int], Sequence[PhaseResult]]) -> tuple[DecodePoint, ...]:
    """Results by batch and by the context asked for; a context is what the server counted, in the middle of an answer.

    Raises:
        Unavailable: no answer had two tokens.
    """
    lengths: dict[int, list[int]] = {}
    for (_, context), results in steps.items():
        lengths.setdefault(context, []).extend(
            (sample.prompt_tokens or 0) + sample.output_tokens // 2 for sample in good(results)
        )
    found = {context: round(median(each)) for context, each in lengths.items()}
    points = {}
    for (batch, context), results in steps.items():
        seconds = [took for result in results if (took := _step_seconds(good([result]))) is not None]
        if not seconds:
            raise Unavailable(f"{batch} streams of {context} tokens: no answer had two tokens")
        points[batch, found[context]] = DecodePoint(batch=batch, context=found[context], step_s=median(seconds))
    return tuple(points.values())


def _step_seconds(streams: Sequence[Sample]) -> float | None:
    """Seconds between two tokens of a stream while all of them ran; where they never did, of whole answers.

    Not the gaps themselves: a client that is late reads several tokens at once. None where no answer had two tokens.
    """
    begins_at = max((sample.token_times[0] for sample in streams), default=0.0)
    ends_at = min((sample.token_times[-1] for sample in streams), default=0.0)
    num_tokens = sum(begins_at < at <= ends_at for sample in streams for at in sample.token_times)
    if num_tokens >= _MIN_STEPS * len(streams) > 0:
        return (ends_at - begins_at) * len(streams) / num_tokens
    paces = [pace for sample in streams if (pace := sample.tpot)]
    return median(paces) if paces else None


def transport_rates(samples: Sequence[Sample]) -> dict[str, TransportRates]:
    """By what carried them. Raises Unavailable where the answers do not tell."""
    rates: dict[str, list[float]] = {}
    for sample in samples:
        stages = server_stages(sample)
        if stages.get("transfer_ms") and stages.get("feature_bytes") and stages.get("transport"):
            rates.setdefault(stages["transport"], []).append(stages["feature_bytes"] / stages["transfer_ms"] / 1e6)
    if not rates:
        raise Unavailable("answers do not tell which transport carried the features, or how long it took")
    return {name: TransportRates(gb_per_s=median(each)) for name, each in rates.items()}


def cpu_costs(
    short: Sequence[PhaseResult], cpu_short: float, long: Sequence[PhaseResult], cpu_long: float
) -> RouterRates:
    """CPU seconds of the router over what was asked meanwhile, a first request of each load included."""
    costs = []
    for results, cpu in ((short, cpu_short), (long, cpu_long)):
        num_requests = sum(len(result.samples) + 1 for result in results)
        tokens = [sample.output_tokens for sample in good(results)]
        costs.append((sum(tokens) / len(tokens), cpu / num_requests))
    (few, cpu_few), (many, cpu_many) = costs
    return router_rates((round(few), cpu_few), (max(round(few) + 1, round(many)), cpu_many))


def unexplained(result: PhaseResult) -> RouterRates:
    """What of a first token's time no stage explains: the router, the network and the client."""
    rests = [split_ttft(1e3 * sample.ttft, server_stages(sample))["other"] for sample in good([result])]
    return RouterRates(s_per_request=median(rests) / 1e3)


def good(results: Sequence[PhaseResult]) -> list[Sample]:
    return [sample for result in results for sample in result.samples if sample.is_ok]


def smallest(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the fewest tiles."""
    fewest = min(server_stages(sample)["tiles"] for sample in samples)
    return [sample for sample in samples if server_stages(sample)["tiles"] == fewest]


def _median(samples: Sequence[Sample], name: str) -> float:
    values = [server_stages(sample)[name] for sample in samples if server_stages(sample).get(name)]
    if not values:
        raise Unavailable(f"answers do not tell {name}; the router needs --enable-per-request-metrics")
    return float(median(values))


def total(samples: Sequence[Sample], name: str) -> float:
    return float(sum(server_stages(sample)[name] for sample in samples))
