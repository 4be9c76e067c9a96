"""Every metric of the three programs, declared once (API.md section 8).

Families are grouped by tier, so that a vision server does not export empty language metrics. All samples carry the
label ``model``, added when they are read: it is one value per process, set by ``set_model``. Those of
several router processes that answer at one address carry ``worker`` as well.
"""

from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from common.service.listen import cannot_listen, split_host_port

Tier = Literal["router", "vision", "language", "colocated", "cluster"]

# vLLM's bounds, so that its dashboards and ours can be laid over each other.
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_END_TO_END = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_PER_TOKEN = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_STAGE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TRANSFER = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TILES = (1, 2, 3, 5, 7, 10, 13, 20, 30, 41)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)

_everywhere, _router, _vision, _transfer, _language, _cluster = (CollectorRegistry() for _ in range(6))
_REGISTRIES: dict[Tier, tuple[CollectorRegistry, ...]] = {
    "router": (_everywhere, _router),
    "vision": (_everywhere, _vision, _transfer),
    "language": (_everywhere, _language, _transfer),
    "colocated": (_everywhere, _vision, _transfer, _language),
    "cluster": (_everywhere, _cluster),
}
ProcessCollector(registry=_everywhere)
PlatformCollector(registry=_everywhere)

# --- all tiers
BUILD_INFO = Gauge("dvd_build_info", "Version of this build.", ["version", "wire_version"], registry=_everywhere)
MODEL_INFO = Gauge("dvd_model_info", "Fingerprint of the checkpoint.", ["fingerprint"], registry=_everywhere)
STATE = Gauge("dvd_state", "1 for the state the server is in.", ["state"], registry=_everywhere)
LOAD_SECONDS = Gauge("dvd_load_seconds", "Time from start to ready, by phase.", ["phase"], registry=_everywhere)
EVENT_LOOP_LAG_SECONDS = Histogram(
    "dvd_event_loop_lag_seconds", "How late timers come.", buckets=_STAGE, registry=_everywhere
)
OUT_OF_MEMORY = Counter(
    "dvd_oom", "Work that device memory did not suffice for at first, by stage.", ["stage"], registry=_everywhere
)
SPANS_DROPPED = Counter("dvd_spans_dropped", "Spans that no collector took.", registry=_everywhere)
CANCELLED = Counter("dvd_cancelled", "Work dropped because its caller left, by stage.", ["stage"], registry=_everywhere)
GPU_MEMORY_BYTES = Gauge(
    "dvd_gpu_memory_bytes", "Device memory of this server, by kind: in use, held by its allocator.", ["kind"],
    registry=_everywhere,
)  # fmt: skip
AUTH_FAILURES = Counter("dvd_auth_failures", "Requests without a valid key.", ["channel"], registry=_everywhere)
CERT_EXPIRY_TIMESTAMP_SECONDS = Gauge(
    "dvd_cert_expiry_timestamp_seconds",
    "Unix time at which the certificate ends; 0: there is none.",
    registry=_everywhere,
)
FAILPOINT_HITS = Counter("dvd_failpoint_hits", "Faults made on command (test builds).", ["name"], registry=_everywhere)

# --- router
HTTP_REQUESTS = Counter("dvd_http_requests", "Answered HTTP requests.", ["route", "method", "status"], registry=_router)
REQUESTS_RUNNING = Gauge("dvd_requests_running", "Requests being worked on.", registry=_router)
REQUESTS_WAITING = Gauge("dvd_requests_waiting", "Requests waiting, by reason.", ["reason"], registry=_router)
REQUEST_SUCCESS = Counter("dvd_request_success", "Finished choices.", ["finish_reason"], registry=_router)
REQUEST_ERRORS = Counter("dvd_request_errors", "Failed requests.", ["code", "stage"], registry=_router)
REQUESTS_ABORTED = Counter("dvd_requests_aborted", "Requests whose client left, by stage.", ["stage"], registry=_router)
ADMISSION_REJECTIONS = Counter(
    "dvd_admission_rejections", "Refused at the door.", ["class", "reason"], registry=_router
)
QUOTA_REJECTIONS = Counter(
    "dvd_quota_rejections",
    "Refused because a tenant had used up what it may, by limit: concurrency, requests, tokens, tiles. Which tenant is"
    " in the log: whoever has a key may read metrics.",
    ["reason"],
    registry=_router,
)
REQUEST_QUEUE_SECONDS = Histogram(
    "dvd_request_queue_seconds", "Arrival to admission.", ["class"], buckets=_TTFT, registry=_router
)
REQUEST_DURATION_SECONDS = Histogram(
    "dvd_request_duration_seconds", "Arrival to last byte.", ["class"], buckets=_END_TO_END, registry=_router
)
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "dvd_time_to_first_token_seconds", "Arrival to first token.", ["class"], buckets=_TTFT, registry=_router
)
INTER_TOKEN_LATENCY_SECONDS = Histogram(
    "dvd_inter_token_latency_seconds", "Between tokens of one choice.", ["class"], buckets=_PER_TOKEN, registry=_router
)
TIME_PER_OUTPUT_TOKEN_SECONDS = Histogram(
    "dvd_time_per_output_token_seconds", "Mean after the first token.", ["class"], buckets=_PER_TOKEN, registry=_router
)
PROMPT_TOKENS = Counter("dvd_prompt_tokens", "Prompt tokens.", ["kind"], registry=_router)
CACHED_PROMPT_TOKENS = Counter("dvd_cached_prompt_tokens", "Prompt tokens whose KV was reused.", registry=_router)
SAVED_PROMPT_TOKENS = Counter("dvd_saved_prompt_tokens", "Prompt tokens that ViR made unnecessary.", registry=_router)
GENERATION_TOKENS = Counter("dvd_generation_tokens", "Generated tokens.", registry=_router)
REQUEST_PROMPT_TOKENS = Histogram("dvd_request_prompt_tokens", "Per request.", buckets=_TOKENS, registry=_router)
REQUEST_GENERATION_TOKENS = Histogram(
    "dvd_request_generation_tokens", "Per request.", buckets=_TOKENS, registry=_router
)
REQUEST_PARAMS_N = Histogram(
    "dvd_request_params_n", "Choices asked for, per request.", buckets=_COUNTS, registry=_router
)
REQUEST_PARAMS_MAX_TOKENS = Histogram(
    "dvd_request_params_max_tokens", "Asked for, per request that says so.", buckets=_TOKENS, registry=_router
)
REQUEST_STAGE_SECONDS = Histogram(
    "dvd_request_stage_seconds",
    "Of a choice, on its language server: queue, prefill, decode, and inference, which is the last two.",
    ["stage"],
    buckets=_TTFT,
    registry=_router,
)
REQUEST_IMAGES = Histogram("dvd_request_images", "Per request.", buckets=_COUNTS, registry=_router)
REQUEST_TILES = Histogram("dvd_request_tiles", "Per request, thumbnails included.", buckets=_TILES, registry=_router)
MEDIA_BYTES = Counter("dvd_media_bytes", "Compressed image bytes taken in.", ["scheme"], registry=_router)
NAMED_MEDIA_BYTES = Gauge(
    "dvd_named_media_bytes", "Bytes of media kept because clients gave them a name.", registry=_router
)
MEDIA_FETCH_SECONDS = Histogram(
    "dvd_media_fetch_seconds", "Name looked up to last byte.", ["scheme"], buckets=_STAGE, registry=_router
)
MEDIA_FETCHES_INFLIGHT = Gauge("dvd_media_fetches_inflight", "Fetches begun.", ["scheme"], registry=_router)
MEDIA_REJECTED = Counter(
    "dvd_media_rejected", "Media refused before any server saw them.", ["reason"], registry=_router
)
SLOW_READERS_DROPPED = Counter(
    "dvd_slow_readers_dropped", "Clients that left their answer unread for too long.", registry=_router
)
DISPATCH = Counter("dvd_dispatch", "Calls to servers.", ["tier", "server", "outcome"], registry=_router)
DISPATCH_RETRIES = Counter(
    "dvd_dispatch_retries", "Calls repeated on another server.", ["tier", "reason"], registry=_router
)
RETRY_BUDGET_EXHAUSTED = Counter(
    "dvd_retry_budget_exhausted", "Calls not repeated, as too many were.", ["tier"], registry=_router
)
ENCODE_REPLIES = Counter(
    "dvd_encode_replies",
    "Encoded images and parts of images, by where features were: cache, model.",
    ["source"],
    registry=_router,
)
HEDGES = Counter("dvd_hedges", "Second attempts of slow encodes.", ["outcome"], registry=_router)
LATE_RESULTS = Counter("dvd_late_results", "Results nobody waited for any more.", ["reason"], registry=_router)
QUARANTINED_REQUESTS = Counter("dvd_quarantined_requests", "Refused for content that killed servers.", registry=_router)
QUARANTINE_ENTRIES = Gauge("dvd_quarantine_entries", "Content that is refused.", registry=_router)
CIRCUIT_STATE = Gauge(
    "dvd_circuit_state", "0 in use, 1 on trial, 2 ejected as an outlier.", ["tier", "server"], registry=_router
)
HEARTBEAT_AGE_SECONDS = Gauge(
    "dvd_heartbeat_age_seconds", "Since the last status.", ["tier", "server"], registry=_router
)
FAILURE_DETECTION_SECONDS = Histogram(
    "dvd_failure_detection_seconds",
    "Last sign of life of a server to its ejection.",
    ["tier", "kind"],
    buckets=_STAGE,
    registry=_router,
)
WATCHDOG_STALLS = Counter(
    "dvd_watchdog_stalls", "Servers that spoke and made no progress, by stage.", ["stage"], registry=_router
)
STREAM_BUFFER_BYTES = Gauge("dvd_stream_buffer_bytes", "Answers that clients have not read.", registry=_router)
REPLAYS = Counter("dvd_replays", "Replies whose language server was lost, by end.", ["outcome"], registry=_router)
SERVERS = Gauge("dvd_servers", "Known servers by state.", ["tier", "state"], registry=_router)
SERVER_EJECTIONS = Counter("dvd_server_ejections", "Servers dropped.", ["tier", "server", "reason"], registry=_router)
DISCOVERY_FAILURES = Counter(
    "dvd_discovery_failures", "Look-ups of servers that failed.", ["tier", "kind"], registry=_router
)

# --- vision
VISION_ITEMS = Counter("dvd_vision_items", "Images by outcome.", ["outcome"], registry=_vision)
VISION_ITEMS_RUNNING = Gauge("dvd_vision_items_running", "Images being encoded.", registry=_vision)
VISION_ITEMS_WAITING = Gauge("dvd_vision_items_waiting", "Images waiting for decode or a batch.", registry=_vision)
VISION_TILES_WAITING = Gauge("dvd_vision_tiles_waiting", "Tiles waiting for a batch.", registry=_vision)
VISION_DECODE_SECONDS = Histogram("dvd_vision_decode_seconds", "Bytes to tiles.", buckets=_STAGE, registry=_vision)
VISION_QUEUE_SECONDS = Histogram("dvd_vision_queue_seconds", "Tiles to batch.", buckets=_STAGE, registry=_vision)
VISION_ENCODE_SECONDS = Histogram(
    "dvd_vision_encode_seconds", "One batch on the device.", buckets=_STAGE, registry=_vision
)
VISION_ITEM_DURATION_SECONDS = Histogram(
    "dvd_vision_item_duration_seconds", "Call to reply.", buckets=_STAGE, registry=_vision
)
VISION_TILES = Counter("dvd_vision_tiles", "Encoded tiles.", ["tokens_per_tile"], registry=_vision)
VISION_FEATURE_TOKENS = Counter("dvd_vision_feature_tokens", "Feature rows made.", registry=_vision)
VISION_BATCH_TILES = Histogram("dvd_vision_batch_tiles", "Tiles per batch.", buckets=_TILES, registry=_vision)
VISION_BATCH_ITEMS = Histogram("dvd_vision_batch_items", "Images per batch.", buckets=_COUNTS, registry=_vision)
VISION_ITEM_TILES = Histogram("dvd_vision_item_tiles", "Tiles per image.", buckets=_TILES, registry=_vision)
VISION_DECODE_REJECTED = Counter(
    "dvd_vision_decode_rejected", "Images that cannot be read.", ["reason"], registry=_vision
)
VISION_DECODER_CRASHES = Counter("dvd_vision_decoder_crashes", "Decode workers that died or hung.", registry=_vision)
VISION_NONFINITE = Counter("dvd_vision_nonfinite", "Groups of tiles with NaN or infinite features.", registry=_vision)
VISION_CACHE_ENTRIES = Gauge("dvd_vision_cache_entries", "Images in the cache.", registry=_vision)
VISION_CACHE_BYTES = Gauge("dvd_vision_cache_bytes", "Of images in the cache.", registry=_vision)
VISION_CACHE_LIMIT_BYTES = Gauge("dvd_vision_cache_limit_bytes", "What the cache may hold.", registry=_vision)
VISION_CACHE_QUERIES = Counter("dvd_vision_cache_queries", "Images looked up.", registry=_vision)
VISION_CACHE_HITS = Counter("dvd_vision_cache_hits", "Images found.", registry=_vision)
VISION_CACHE_HIT_TOKENS = Counter("dvd_vision_cache_hit_tokens", "Feature rows of images found.", registry=_vision)
VISION_CACHE_EVICTIONS = Counter("dvd_vision_cache_evictions", "Images that made room.", registry=_vision)
VISION_COALESCED = Counter(
    "dvd_vision_coalesced", "Images that another call was encoding at that moment.", registry=_vision
)

# --- transfer, both ends
_ENDS = ["transport", "direction"]
TRANSFER_SECONDS = Histogram("dvd_transfer_seconds", "One frame.", _ENDS, buckets=_TRANSFER, registry=_transfer)
TRANSFER_CREDIT_WAIT_SECONDS = Histogram(
    "dvd_transfer_credit_wait_seconds", "Waiting to be allowed to send.", _ENDS, buckets=_TRANSFER, registry=_transfer
)
TRANSFER_BYTES = Counter("dvd_transfer_bytes", "Payload bytes.", _ENDS, registry=_transfer)
TRANSFER_ITEMS = Counter("dvd_transfer_items", "Frames by outcome.", [*_ENDS, "outcome"], registry=_transfer)
TRANSFER_RECONNECTS = Counter("dvd_transfer_reconnects", "Connections made again.", _ENDS, registry=_transfer)
TRANSFER_INFLIGHT_BYTES = Gauge("dvd_transfer_inflight_bytes", "Sent, not acknowledged.", _ENDS, registry=_transfer)
TRANSFER_FAILURES = Counter("dvd_transfer_failures", "Failed sends.", [*_ENDS, "reason"], registry=_transfer)
TRANSFER_FALLBACKS = Counter("dvd_transfer_fallbacks", "Sends moved to another transport.", ["to"], registry=_transfer)
TRANSFER_FRAMES_REJECTED = Counter(
    "dvd_transfer_frames_rejected", "Frames that never reached the model.", [*_ENDS, "reason"], registry=_transfer
)
TRANSFER_RESERVATIONS = Gauge("dvd_transfer_reservations", "Feature reservations.", ["state"], registry=_transfer)
TRANSFER_RESERVATIONS_EXPIRED = Counter(
    "dvd_transfer_reservations_expired", "Reservations whose features did not come in time.", registry=_transfer
)
TRANSFER_SHM_SEGMENTS = Gauge("dvd_transfer_shm_segments", "Shared memory that this process maps.", registry=_transfer)
TRANSFER_POOL_BYTES = Gauge("dvd_transfer_pool_bytes", "Feature memory.", ["state"], registry=_transfer)

# --- language
LANGUAGE_REQUESTS_RUNNING = Gauge("dvd_language_requests_running", "Sequences in the batch.", registry=_language)
LANGUAGE_REQUESTS_WAITING = Gauge("dvd_language_requests_waiting", "Admitted, not scheduled.", registry=_language)
LANGUAGE_REQUESTS_WAITING_FOR_FEATURES = Gauge(
    "dvd_language_requests_waiting_for_features", "Nothing to prefill until features arrive.", registry=_language
)
LANGUAGE_KV_CACHE_USAGE_RATIO = Gauge("dvd_language_kv_cache_usage_ratio", "KV blocks in use.", registry=_language)
LANGUAGE_FEATURES_HELD_BYTES = Gauge("dvd_language_features_held_bytes", "Features in memory.", registry=_language)
LANGUAGE_FEATURE_WAIT_SECONDS = Histogram(
    "dvd_language_feature_wait_seconds", "Per request.", buckets=_STAGE, registry=_language
)
LANGUAGE_QUEUE_SECONDS = Histogram(
    "dvd_language_queue_seconds", "Arrival to first step.", buckets=_STAGE, registry=_language
)
LANGUAGE_PREFILL_SECONDS = Histogram(
    "dvd_language_prefill_seconds", "First step to first token.", buckets=_STAGE, registry=_language
)
LANGUAGE_DECODE_SECONDS = Histogram(
    "dvd_language_decode_seconds", "First to last token.", buckets=_END_TO_END, registry=_language
)
LANGUAGE_REQUEST_DURATION_SECONDS = Histogram(
    "dvd_language_request_duration_seconds", "Call to end.", buckets=_END_TO_END, registry=_language
)
LANGUAGE_PROMPT_TOKENS = Counter("dvd_language_prompt_tokens", "Prompt tokens.", ["kind"], registry=_language)
LANGUAGE_VIR_SAVED_TOKENS = Counter(
    "dvd_language_vir_saved_tokens", "Image tokens that ViR made unnecessary.", registry=_language
)
LANGUAGE_GENERATION_TOKENS = Counter("dvd_language_generation_tokens", "Generated tokens.", registry=_language)
LANGUAGE_PREEMPTIONS = Counter("dvd_language_preemptions", "Sequences put back to waiting.", registry=_language)
LANGUAGE_PREFIX_CACHE_QUERIES = Counter(
    "dvd_language_prefix_cache_queries", "Prompt tokens looked up.", registry=_language
)
LANGUAGE_PREFIX_CACHE_HITS = Counter("dvd_language_prefix_cache_hits", "Prompt tokens found.", registry=_language)
LANGUAGE_FEATURES_REUSED = Counter(
    "dvd_language_features_reused", "Images not encoded again, by what was here.", ["source"], registry=_language
)
LANGUAGE_PLACEHOLDER_MISMATCH = Counter(
    "dvd_language_placeholder_mismatch", "Requests whose features and placeholders differ.", registry=_language
)
LANGUAGE_GRAMMAR_FAILURES = Counter(
    "dvd_language_grammar_failures", "Grammars refused: malformed, too complex or too slow.", registry=_language
)
LANGUAGE_GRAMMAR_COMPILE_SECONDS = Histogram(
    "dvd_language_grammar_compile_seconds", "Of those that were not refused.", buckets=_STAGE, registry=_language
)
LANGUAGE_STEP_TOKENS = Histogram("dvd_language_step_tokens", "Tokens per step.", buckets=_TOKENS, registry=_language)
LANGUAGE_STEP_REQUESTS = Histogram(
    "dvd_language_step_requests", "Sequences per step.", buckets=_COUNTS, registry=_language
)

# --- the controller of a cluster
CLUSTER_CONTROLLER_UP = Gauge("dvd_cluster_controller_up", "1 while it looks after the cluster.", registry=_cluster)
CLUSTER_SERVERS_DESIRED = Gauge(
    "dvd_cluster_servers_desired", "Servers that there should be.", ["tier"], registry=_cluster
)
CLUSTER_SCALE_EVENTS = Counter(
    "dvd_cluster_scale_events", "Changes of the desired number.", ["tier", "direction"], registry=_cluster
)

_labels: dict[str, str] = {"model": ""}
"""Of every sample of this process."""


def set_model(name: str) -> None:
    """The value of the label ``model`` on every sample of this process."""
    _labels["model"] = name


def set_worker(index: int) -> None:
    """The label ``worker`` on every sample: this is one of several processes that answer at one address."""
    _labels["worker"] = str(index)


def set_state(state: str) -> None:
    """``starting``, ``ready`` or ``draining``."""
    for known in ("starting", "ready", "draining"):
        STATE.labels(known).set(known == state)


def forget_server(tier: str, server: str) -> None:
    """Drop the series of a server that has left, or whose name has changed."""
    for family in (DISPATCH, SERVER_EJECTIONS, CIRCUIT_STATE, HEARTBEAT_AGE_SECONDS):
        family.remove_by_labels({"tier": tier, "server": server})


def exposition(tier: Tier, *others: Collector) -> bytes:
    """What ``GET /metrics`` answers, in Prometheus text format; ``others`` are exported as they are, behind ours."""
    registry = _labelled(tier)
    for other in others:
        registry.register(other)
    return generate_latest(registry)


def start_server(listen: str, tier: Tier, option: str = "--metrics-listen") -> str:
    """Serve ``/metrics`` from a thread of its own on ``host:port`` (0: any free port); returns the address.

    Args:
        option: where the operator has said it.

    Raises:
        ConfigError: the address is taken, not ours, or none.
    """
    host, port = split_host_port(listen)
    try:
        server, _ = start_http_server(port, host, registry=_labelled(tier))
    except OSError as error:
        raise cannot_listen(f"{listen} ({option})", error) from None
    return f"{listen.rpartition(':')[0]}:{server.server_port}"


def _labelled(tier: Tier) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_WithModel(_REGISTRIES[tier]))
    return registry


class _WithModel(Collector):
    def __init__(self, registries: tuple[CollectorRegistry, ...]) -> None:
        self._registries = registries

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for registry in self._registries:
            for family in registry.collect():
                family.samples = [_with_model(sample) for sample in family.samples]
                yield family


def _with_model(sample: Sample) -> Sample:
    return sample._replace(labels={**sample.labels, **_labels})
