"""What this router measures anyway, under the names of vLLM: for boards, autoscalers and benchmarks that know no other.

Nothing is counted here: families are read, their labels summed away, and named again (API.md section 8). Requests move
between language servers and are counted where they come in, so they are those of one engine, "0". What a language
server says of itself has that server's place in the order of names as its engine; every router says the same of it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.service import metrics
from protos.status_pb2 import LanguageLoad
from router.admission import Admission
from router.fleet import Fleet

_LABELS: Final = ["model_name", "engine"]


@dataclass(frozen=True, slots=True)
class _Alias:
    """Another name of a family.

    Args:
        first: label values of a series that is there before anything has happened, as vLLM's are.
        keeps: its labels that stay, with their other names; the rest is summed.
        only: the series that are meant; empty: all.
    """

    source: Counter | Histogram
    first: tuple[str, ...] = ()
    keeps: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Make the first series."""
        if self.first:
            self.source.labels(*self.first)

    def named(self, name: str, labels: Mapping[str, str]) -> Metric:
        """The family as ``name``, with ``labels`` on every sample."""
        (family,) = self.source.collect()
        renamed = Metric(name, family.documentation, family.type)
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            if suffix == "_created" or not self.only.items() <= sample.labels.items():
                continue
            kept = {theirs: sample.labels[ours] for ours, theirs in self.keeps.items()}
            if "le" in sample.labels:
                kept["le"] = sample.labels["le"]
            key = suffix, tuple(kept.items())
            sums[key] = sums.get(key, 0.0) + sample.value
        for (suffix, kept_items), value in sums.items():
            renamed.add_sample(name + suffix, {**labels, **dict(kept_items)}, value)
        return renamed


def _stage(name: str) -> _Alias:
    return _Alias(metrics.REQUEST_STAGE_SECONDS, first=(name,), only={"stage": name})


_ALIASES: Final[dict[str, _Alias]] = {
    "time_to_first_token_seconds": _Alias(metrics.TIME_TO_FIRST_TOKEN_SECONDS, first=("text",)),
    "inter_token_latency_seconds": _Alias(metrics.INTER_TOKEN_LATENCY_SECONDS, first=("text",)),
    "e2e_request_latency_seconds": _Alias(metrics.REQUEST_DURATION_SECONDS, first=("text",)),
    "prompt_tokens": _Alias(metrics.PROMPT_TOKENS, first=("text",)),
    "generation_tokens": _Alias(metrics.GENERATION_TOKENS),
    "prefix_cache_queries": _Alias(metrics.PROMPT_TOKENS, first=("text",)),
    "prefix_cache_hits": _Alias(metrics.CACHED_PROMPT_TOKENS),
    "mm_cache_queries": _Alias(metrics.ENCODE_REPLIES, first=("model",)),
    "mm_cache_hits": _Alias(metrics.ENCODE_REPLIES, first=("cache",), only={"source": "cache"}),
    "request_success": _Alias(metrics.REQUEST_SUCCESS, first=("stop",), keeps={"finish_reason": "finished_reason"}),
    "admission_rejections": _Alias(
        metrics.ADMISSION_REJECTIONS, first=("text", "queue_full"), keeps={"reason": "reason"}
    ),
    "request_prompt_tokens": _Alias(metrics.REQUEST_PROMPT_TOKENS),
    "request_generation_tokens": _Alias(metrics.REQUEST_GENERATION_TOKENS),
    "request_params_n": _Alias(metrics.REQUEST_PARAMS_N),
    "request_params_max_tokens": _Alias(metrics.REQUEST_PARAMS_MAX_TOKENS),
    "request_time_per_output_token_seconds": _Alias(metrics.TIME_PER_OUTPUT_TOKEN_SECONDS, first=("text",)),
    "request_queue_time_seconds": _stage("queue"),
    "request_prefill_time_seconds": _stage("prefill"),
    "request_decode_time_seconds": _stage("decode"),
    "request_inference_time_seconds": _stage("inference"),
}


class VllmMetrics(Collector):
    """Samples as ``/metrics`` of vLLM has them.

    Args:
        model_name: what clients call the model; "" while that is not known.
    """

    def __init__(self, admission: Admission, fleet: Fleet, model_name: Callable[[], str]) -> None:
        self._admission = admission
        self._fleet = fleet
        self._model_name = model_name
        for alias in _ALIASES.values():
            alias.begin()

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        model_name = self._model_name()
        num_waiting = self._admission.num_waiting
        num_running = self._admission.num_running - num_waiting  # those are among them
        yield _gauge("num_requests_running", "Requests behind their first token.", model_name, {0: num_running})
        yield _gauge("num_requests_waiting", "Requests before their first token.", model_name, {0: num_waiting})
        yield _gauge("kv_cache_usage_perc", "KV blocks in use, 0 to 1.", model_name, self._kv_cache_usage())
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Sequences put back to waiting.", labels=_LABELS)
        for engine, load in self._loads().items():
            preemptions.add_metric([model_name, str(engine)], load.num_preemptions)
        yield preemptions
        for name, alias in _ALIASES.items():
            yield alias.named(f"vllm:{name}", {"model_name": model_name, "engine": "0"})

    def _kv_cache_usage(self) -> dict[int, float]:
        return {engine: _usage(load) for engine, load in self._loads().items() if load.total_kv_blocks}

    def _loads(self) -> dict[int, LanguageLoad]:
        """Of the language servers that have said something."""
        servers = sorted(self._fleet.language, key=lambda server: (server.name, server.address))
        return {i: server.status.language for i, server in enumerate(servers) if server.status is not None}


def _usage(load: LanguageLoad) -> float:
    return 1 - load.free_kv_blocks / load.total_kv_blocks


def _gauge(name: str, documentation: str, model_name: str, values: Mapping[int, float]) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", documentation, labels=_LABELS)
    for engine, value in values.items():
        family.add_metric([model_name, str(engine)], value)
    return family
