"""A running deployment, measured from outside: what a hardware card says of its servers.

Every figure comes from answers to requests, from the block of times that the router adds to them
(``--enable-per-request-metrics``), or from its /metrics. Loads take turns, each a few times over. Rates are those of
one server: where there are several, as many times more clients ask, and what is counted is divided.

* pictures, one at a time: ``encode_ms``, ``decode_ms`` and ``tiles`` of the block; the largest, several at a time:
  tiles/s of answers
* prompts, one at a time: ``prefill_ms`` over the tokens of the prompt
* generation: streams that begin together, from the first token of the last of them to the end of the first
* transport: ``feature_bytes`` over ``transfer_ms`` of the smallest picture, whose sending spans no encoding
* router: CPU seconds of its process over short and long answers, less what it needs idle; where it does not tell,
  what of a first token's time no stage explains
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.arrivals import ClosedLoop, OpenLoop
from benchmarks.plan import Phase, Plan, Source, Target
from benchmarks.profile import answers
from benchmarks.profile.turns import Effort, Sizes, take_turns
from benchmarks.runner import run
from benchmarks.samples import PhaseResult
from benchmarks.simulator.hardware import LanguageRates, RouterRates, TransportRates, VisionRates
from benchmarks.workload import Size, Workload, fixed
from common.service.errors import Unavailable

Key = TypeVar("Key")

_FEW_TOKENS: Final = 16
_OUTPUT_TOKENS: Final = 64
_IDLE_SECONDS: Final = 1.0
"""In which a router is left alone, to see what it needs for nothing."""
_SCRAPE_SECONDS: Final = 10.0
_SOURCES: Final = (
    "vision: encode_ms and decode_ms of single pictures, tiles/s of several at once; "
    "prompts: prefill_ms; generation: token events seen by the client while all streams ran; "
    "transport: feature_bytes over transfer_ms, latency included; kv_tokens: as it was given; "
)


@dataclass(frozen=True, slots=True)
class Found:
    """``sources``: which figure comes from what, in words."""

    model: str
    vision: VisionRates
    language: LanguageRates
    transports: dict[str, TransportRates]
    router: RouterRates
    sources: str


@dataclass(frozen=True, slots=True)
class Servers:
    """How many are behind the router."""

    vision: int = 1
    language: int = 1


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds of a process until ``at``."""

    cpu_seconds: float
    at: float

    def share_since(self, before: "Usage") -> float:
        """CPU seconds a second."""
        return (self.cpu_seconds - before.cpu_seconds) / (self.at - before.at)

    def seconds_since(self, before: "Usage", idle_share: float) -> float:
        """CPU seconds beyond those of an idle process."""
        return max(0.0, self.cpu_seconds - before.cpu_seconds - idle_share * (self.at - before.at))


def measure_deployment(
    target: Target, image_sizes: Sequence[int], clients: Sequence[int], sizes: Sizes, kv_tokens: int, effort: Effort
) -> Found:
    """All of it.

    Raises:
        ConfigError: not a URL, or lengths that the model does not take.
        Unavailable: nobody answers, or requests fail, or the router tells no times of them.
    """
    loads, metrics = Loads(target), Metrics(target)
    servers = metrics.servers()
    images = _measure_images(loads, image_sizes, clients, servers, effort)
    prompts = answers.prefill_points(list(_measure_prompts(loads, sizes, effort).values()))
    idle = metrics.usage()
    time.sleep(_IDLE_SECONDS)
    used = metrics.usage()
    short = loads.ask(_text(_FEW_TOKENS, 1), max(sizes.batches), effort.seconds / effort.rounds)
    used_short = metrics.usage()
    steps = _measure_steps(loads, sizes, servers, prompts[-1].tokens_per_s, effort)
    used_long = metrics.usage()
    if idle is None or used is None or used_short is None or used_long is None:
        costs, told_by = answers.unexplained(short), "what of a first token's time no stage explains, an upper bound"
    else:
        long = [result for results in steps.values() for result in results]
        share = used.share_since(idle)
        costs = answers.cpu_costs(
            [short], used_short.seconds_since(used, share), long, used_long.seconds_since(used_short, share)
        )
        told_by = "CPU seconds of its process (process_cpu_seconds_total), less what it needs idle"
    smallest = answers.smallest(answers.good(images.alone))
    language = LanguageRates(
        kv_tokens=kv_tokens,
        bytes_per_token=round(answers.total(smallest, "feature_bytes") / answers.total(smallest, "image_tokens")),
        prefill=prompts,
        decode=answers.decode_points(steps),
    )
    return Found(
        model=loads.model,
        vision=answers.vision_rates(images, servers.vision),
        language=language,
        transports=answers.transport_rates(smallest),
        router=costs,
        sources=f"{_SOURCES}router: {told_by}",
    )


class Loads:
    """Closed loops against one server, one after the other."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.model = target.model or ""

    def ask(self, workload: Workload, num_clients: int, seconds: float) -> PhaseResult:
        """A closed loop. Raises Unavailable where no request ended well, and what ``runner.run`` does."""
        return self._run(Source("load", ClosedLoop(num_clients), workload), seconds)

    def ask_at_once(self, workload: Workload, num_requests: int) -> PhaseResult:
        """All of them sent together, and then none until the last is answered. Raises as ``ask``."""
        return self._run(Source("load", OpenLoop(math.inf), workload, num_requests), None)

    def _run(self, source: Source, seconds: float | None) -> PhaseResult:
        result = run(Plan((Phase("load", (source,), duration=seconds),)), self._target)
        self.model = result.model
        (measured,) = result.phases
        if not measured.samples:
            raise Unavailable(f"no request was sent in {seconds:.3g} s; measure longer, with --seconds")
        if not any(sample.is_ok for sample in measured.samples):
            raise Unavailable(f"no request ended well; the first: {measured.samples[0].failure}")
        return measured


class Metrics:
    """What the router says of itself, if it does."""

    def __init__(self, target: Target) -> None:
        self._url = f"{target.base_url.rstrip('/').removesuffix('/v1')}/metrics"
        self._headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}

    def servers(self) -> Servers:
        """One of each where it does not say."""
        ready = {"vision": 0, "language": 0}
        for sample in self._samples("dvd_servers"):
            if sample.labels.get("state") == "ready" and sample.labels.get("tier") in ready:
                ready[sample.labels["tier"]] += int(sample.value)
        return Servers(max(1, ready["vision"]), max(1, ready["language"]))

    def usage(self) -> Usage | None:
        """CPU of the router. None where it does not say, or is one of several processes."""
        found = self._samples("process_cpu_seconds")
        if len(found) != 1 or "worker" in found[0].labels:
            return None
        return Usage(float(found[0].value), time.perf_counter())

    def _samples(self, family: str) -> list[Any]:
        try:
            answer = httpx.get(self._url, headers=self._headers, timeout=_SCRAPE_SECONDS, trust_env=False)
            families = list(text_string_to_metric_families(answer.text)) if answer.is_success else []
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return []
        return [sample for each in families if each.name == family for sample in each.samples]


def _measure_images(
    loads: Loads, image_sizes: Sequence[int], clients: Sequence[int], servers: Servers, effort: Effort
) -> answers.Images:
    sides, numbers = sorted(set(image_sizes)), sorted({number for number in clients if number > 1})
    keys = [(side, 1) for side in sides] + [(sides[-1], number) for number in numbers]

    def ask(key: tuple[int, int], seconds: float) -> PhaseResult:
        side, number = key
        picture = ((Size(side, side), 1.0),)
        workload = Workload(picture, input_tokens=fixed(_FEW_TOKENS), output_tokens=fixed(1))
        return loads.ask(workload, number if number == 1 else number * servers.vision, seconds)

    results = _rounds(keys, ask, effort)
    answers.refuse_silence(results[keys[0]])
    alone = [result for side in sides for result in results[side, 1]]
    return answers.Images(alone, {number: results[sides[-1], number] for number in numbers})


def _measure_prompts(loads: Loads, sizes: Sizes, effort: Effort) -> dict[int, list[PhaseResult]]:
    def ask(length: int, seconds: float) -> PhaseResult:
        return loads.ask(_text(length, 1), 1, seconds)

    taken = _taken(sizes.lengths, lambda length: loads.ask_at_once(_text(length, 1), 1))
    return _rounds(taken, ask, effort)


def _measure_steps(
    loads: Loads, sizes: Sizes, servers: Servers, prompt_tokens_per_s: float, effort: Effort
) -> dict[tuple[int, int], list[PhaseResult]]:
    """By streams for each language server and by context; what takes too long to read is left out, batches last."""

    def ask(batch: int, context: int) -> PhaseResult:
        prompt = max(_FEW_TOKENS, context - _OUTPUT_TOKENS // 2)
        return loads.ask_at_once(_text(prompt, _OUTPUT_TOKENS), batch * servers.language)

    contexts = _taken(sizes.contexts, lambda context: ask(1, context))
    most = effort.limit * prompt_tokens_per_s
    batches = [n for n in sorted(set(sizes.batches)) if n * contexts[0] <= most] or [min(sizes.batches)]
    contexts = [each for each in contexts if batches[-1] * each <= most] or contexts[:1]
    keys = [(batch, context) for batch in batches for context in contexts]
    return _rounds(keys, lambda key, _: ask(*key), effort)


def _taken(lengths: Sequence[int], ask: Callable[[int], PhaseResult]) -> list[int]:
    """Rising lengths as far as the model takes them: how many tokens a text has, only the server knows."""
    taken: list[int] = []
    for length in sorted(set(lengths)):
        try:
            ask(length)
        except Unavailable:
            if not taken:
                raise
            break
        taken.append(length)
    return taken


def _rounds(
    keys: Sequence[Key], ask: Callable[[Key, float], PhaseResult], effort: Effort
) -> dict[Key, list[PhaseResult]]:
    """Each load a few times over, in turn, in about ``effort.seconds`` altogether."""
    results: dict[Key, list[PhaseResult]] = {key: [] for key in keys}
    seconds = effort.seconds / (effort.rounds * len(keys))

    def turn(key: Key) -> Callable[[], float]:
        def once() -> float:
            results[key].append(ask(key, seconds))
            return results[key][-1].seconds

        return once

    take_turns({key: turn(key) for key in keys}, 0.0, effort.rounds)
    return results


def _text(input_tokens: int, output_tokens: int) -> Workload:
    return Workload(
        text_only_share=1.0, input_tokens=fixed(input_tokens), output_tokens=fixed(output_tokens), ignore_eos=True
    )
