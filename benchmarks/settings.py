"""Options of ``dvd bench``. Imports neither aiohttp nor numpy: the command line reads it to know its variables."""

import importlib.util
from pathlib import Path
from typing import ClassVar, Final, Literal

from common.service.errors import ConfigError
from common.service.settings import Field, SecretStr, Settings

Preset = Literal["internvl", "reuse", "text-beside-images", "language"]

_EXTRA: Final = ("aiohttp", "hypothesis", "matplotlib", "jinja2", "simpy")


class BenchServeSettings(Settings):
    """Load any OpenAI-compatible server and measure it. Default: 100 requests, 8 at a time, one 448 px image each."""

    program: ClassVar[str] = "dvd bench serve"

    base_url: str = Field("http://127.0.0.1:8000", description="server to measure, of any make")
    model: str | None = Field(None, description="model to ask for; unset: the first that the server names")
    api_key: SecretStr = Field(SecretStr(""), description="bearer token of the server")
    timeout: float = Field(600.0, gt=0, description="seconds one request may take")

    num_prompts: int | None = Field(None, ge=1, description="requests to measure; unset: 100")
    duration: float | None = Field(None, gt=0, description="seconds to measure, instead of --num-prompts")
    warmup: float = Field(0.0, ge=0, description="seconds of load before anything is measured")
    concurrency: int | None = Field(None, ge=1, description="closed loop: this many requests at a time")
    request_rate: float | None = Field(
        None, gt=0, allow_inf_nan=True, description="open loop: requests/s on average; inf: all at once"
    )
    burstiness: float = Field(1.0, gt=0, description="of an open loop: 1 Poisson, below bursts, above regular")
    max_concurrency: int | None = Field(
        None, ge=1, description="open loop: hold arrivals back beyond this many at a time (the wait is reported)"
    )
    ramp_up_strategy: Literal["linear", "exponential"] | None = Field(
        None, description="open loop whose rate goes from --ramp-up-start-rps to --ramp-up-end-rps"
    )
    ramp_up_start_rps: float | None = Field(None, gt=0, description="requests/s at the start of the ramp")
    ramp_up_end_rps: float | None = Field(None, gt=0, description="requests/s at its end")
    trace: Path | None = Field(
        None, description="replay arrivals and lengths: BurstGPT or Azure CSV, or Mooncake JSON lines"
    )
    trace_speed: float = Field(1.0, gt=0, description="replay this many times as fast as recorded")
    trace_limit: int | None = Field(None, ge=1, description="replay only the first requests of the trace")
    preset: Preset | None = Field(None, description="several phases that belong together, one after the other")

    image_size: str = Field("448", description="448, 1080p, WxH, ..., a mix by weight (448:0.5,1080p:0.5) or `mixed`")
    images_per_request: str | None = Field(None, description="N or LOW-HIGH; unset: 1, with --trace 0")
    image_reuse_ratio: float = Field(0.0, ge=0, le=1, description="share of images that repeat one of the last 32")
    text_only_share: float = Field(0.0, ge=0, le=1, description="share of requests without images")
    input_tokens: str = Field("128", description="text of a prompt, about N or LOW-HIGH tokens")
    output_tokens: str = Field("64", description="longest answer, N or LOW-HIGH tokens")
    ignore_eos: bool = Field(False, description="let every answer have its full length (not every server can)")
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy")
    extra_body: str | None = Field(None, description="JSON object of further fields of every request")
    seed: int = Field(0, ge=0, description="of arrivals, sizes and lengths")
    salt: int | None = Field(
        None, ge=0, lt=2**62, description="of what texts and images contain; unset: another in every run, for no cache"
    )

    goodput: list[str] = Field([], description="limits in ms that a good answer meets: ttft:500,tpot:50,e2el:5000")
    metric_percentiles: list[float] = Field([50, 90, 95, 99], description="percentiles to report")
    results: Path | None = Field(None, description="directory for the raw figures (JSON) and a report (HTML)")


class Table18Settings(Settings):
    """Table 18 of the InternVL3.5 report on this machine: the undivided baseline, DvD, DvD with ViR; 448 to 1344 px."""

    program: ClassVar[str] = "dvd bench table18"

    model: str = Field("nano", description="directory of the checkpoint, or `nano` for the one that comes with DvD")
    flash_model: str | None = Field(None, description="Flash checkpoint for the row with the Visual Resolution Router")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: GPUs where there are any")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of every row")
    concurrency: int = Field(8, ge=1, description="closed loop: this many requests at a time")
    request_rate: float | None = Field(None, gt=0, description="open loop instead: requests/s (the paper offers 16)")
    duration: float = Field(60.0, gt=0, description="seconds to measure at each size")
    warmup: float = Field(10.0, ge=0, description="seconds of load before anything is measured")
    input_tokens: int = Field(64, ge=1, description="text of a prompt, about this many tokens")
    output_tokens: int = Field(32, ge=1, description="tokens of an answer")
    seed: int = Field(0, ge=0, description="of texts and images")
    results: Path | None = Field(None, description="directory for the raw figures (JSON) and a page (HTML)")


class PlanSettings(Settings):
    """How many vision and how many language servers? Simulates the pipeline on hardware that need not be here."""

    program: ClassVar[str] = "dvd plan"

    model: str = Field("InternVL3_5-8B", description="shape that published figures are turned into a card for")
    card: str = Field("h100", description="a100, h100, h200, l4, or the JSON file of a hardware card")
    vision_card: str | None = Field(None, description="the same for the vision servers; unset: --card")
    devices: int = Field(8, ge=2, le=100_000, description="devices to divide between the two kinds of servers")
    language_devices: int | None = Field(
        None, ge=1, le=64, description="devices of one language server; unset: the fewest that hold the model"
    )
    vision: int | None = Field(None, ge=1, description="vision servers, with --language instead of a search")
    language: int | None = Field(None, ge=1, description="language servers, with --vision instead of a search")
    routers: int | None = Field(None, ge=1, description="router processes; unset: as many as the load needs")
    transport: str = Field("tcp", description="way of the features, one that the card knows")

    request_rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="requests/s; unset: the most that keeps the limits"
    )
    burstiness: float = Field(1.0, gt=0, description="of arrivals: 1 Poisson, below bursts, above regular")
    image_size: str = Field("896", description="448, 1080p, WxH, ..., a mix by weight (448:0.5,1080p:0.5) or `mixed`")
    images_per_request: str = Field("1", description="N or LOW-HIGH")
    image_reuse_ratio: float = Field(0.0, ge=0, le=1, description="share of images that repeat one of the last 32")
    text_only_share: float = Field(0.0, ge=0, le=1, description="share of requests without images")
    input_tokens: str = Field("128", description="text of a prompt, N or LOW-HIGH tokens")
    output_tokens: str = Field("64", description="an answer, N or LOW-HIGH tokens")
    vir_share: float = Field(0.0, ge=0, le=1, description="share of tiles that a Flash model compresses to 64 tokens")

    ttft_limit: float = Field(2000.0, gt=0, description="ms that the p99 of the first token may take")
    itl_limit: float = Field(200.0, gt=0, description="ms that the p99 between tokens may take")
    price: float | None = Field(None, ge=0, description="of a device-hour, where the card has none or another")
    burst: int = Field(100, ge=1, description="requests that come at once, to see what becomes of the limits")
    duration: float = Field(60.0, gt=0, description="simulated seconds to measure; fewer where requests are very many")
    warmup: float = Field(10.0, ge=0, description="simulated seconds of load before anything is measured")
    seed: int = Field(0, ge=0, description="of arrivals, sizes and lengths")
    model_path: str | None = Field(None, description="directory of the checkpoint on every node, for cluster.yaml")
    results: Path | None = Field(None, description="directory for plan.json, plan.svg and cluster.yaml")


def require_extra() -> None:
    """Raises ConfigError unless what the benchmarks need beside DvD is installed."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"dvd bench needs {' and '.join(missing)}: pip install 'dvd-serve[bench]'")
