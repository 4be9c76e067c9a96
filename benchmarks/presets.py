"""Options -> a plan: one phase for an ordinary command line, several for a preset. Refuses what does not go together.

* ``internvl``: images of 448, 896 and 1344 px, one size after the other, under the load that is asked for.
* ``reuse``: 0, 50 and 90 % of the images repeated.
* ``text-beside-images``: four clients that ask for text alone, two that ask about 896 px images alone, then all six
  at once: what images cost the text requests beside them.
* ``language``: sixteen clients that ask for text (256 tokens in, 64 out), then sixteen of which half of the requests
  carry a 448 px image: what the language engine does with a full batch.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec

from benchmarks.arrivals import Arrivals, ClosedLoop, OpenLoop, Ramp, Replay
from benchmarks.plan import Phase, Plan, Source
from benchmarks.settings import BenchServeSettings, Preset
from benchmarks.traces import read_trace
from benchmarks.workload import Lengths, Size, Workload, fixed
from common.service.errors import ConfigError

_DEFAULT_CONCURRENCY: Final = 8
_DEFAULT_REQUESTS: Final = 100
_PRESET_SECONDS: Final = 30.0
_MIXED: Final = "448:0.5,896:0.3,1080p:0.2"
_NAMED_SIZES: Final = {"1080p": Size(1920, 1080), "720p": Size(1280, 720)}
_MAX_SIDE: Final = 16384
_GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
_LOADS: Final = ("concurrency", "request_rate", "ramp_up_strategy", "trace")


def make_plan(settings: BenchServeSettings) -> Plan:
    """What the options ask for.

    Raises:
        ConfigError: options that contradict each other, or a value that cannot be read; names the flag.
    """
    _check(settings)
    plan = _single(settings) if settings.preset is None else _PRESETS[settings.preset](settings)
    return plan if settings.salt is None else replace(plan, salt=settings.salt)


def _single(settings: BenchServeSettings) -> Plan:
    source = Source("requests", _arrivals(settings), _workload(settings), _num_requests(settings))
    return Plan((Phase("load", (source,), settings.duration, settings.warmup),), settings.seed)


def goodput_limits(settings: BenchServeSettings) -> dict[str, float]:
    """Milliseconds by metric. Raises ConfigError."""
    limits = {}
    for item in settings.goodput:
        name, _, value = item.partition(":")
        number = _number(value)
        if name not in _GOODPUT_METRICS or number is None or number <= 0:
            raise ConfigError(f"--goodput {item[:64]}: expected ttft:MS, tpot:MS or e2el:MS")
        limits[name] = number
    return limits


def percentiles(settings: BenchServeSettings) -> list[float]:
    """Raises ConfigError."""
    for value in settings.metric_percentiles:
        if not 0 <= value <= 100:
            raise ConfigError(f"--metric-percentiles {value:g}: expected numbers from 0 to 100, such as 50,90,99")
    return list(settings.metric_percentiles)


def _check(settings: BenchServeSettings) -> None:
    given = settings.model_fields_set
    loads = [_flag(name) for name in _LOADS if getattr(settings, name) is not None]
    if len(loads) > 1:
        raise ConfigError(f"{loads[1]}: cannot be combined with {loads[0]}; choose one kind of load")
    if settings.duration is not None and settings.num_prompts is not None:
        raise ConfigError("--duration: cannot be combined with --num-prompts; choose one end")
    is_open = bool(loads) and settings.concurrency is None
    for name, is_used, needed in (
        ("max_concurrency", is_open, "an open loop (--request-rate, --ramp-up-strategy or --trace); see --concurrency"),
        ("burstiness", is_open and settings.trace is None, "--request-rate or --ramp-up-strategy"),
        ("trace_speed", settings.trace is not None, "--trace"),
        ("trace_limit", settings.trace is not None, "--trace"),
        ("ramp_up_start_rps", settings.ramp_up_strategy is not None, "--ramp-up-strategy"),
        ("ramp_up_end_rps", settings.ramp_up_strategy is not None, "--ramp-up-strategy"),
    ):
        if name in given and getattr(settings, name) is not None and not is_used:
            raise ConfigError(f"{_flag(name)}: only with {needed}")
    for name in ("num_prompts", "input_tokens", "output_tokens"):
        if settings.trace is not None and name in given and getattr(settings, name) is not None:
            raise ConfigError(f"{_flag(name)}: the trace decides it; --trace-limit takes its first requests only")
    if settings.ramp_up_strategy is not None:
        for name in ("ramp_up_start_rps", "ramp_up_end_rps"):
            if getattr(settings, name) is None:
                raise ConfigError(f"{_flag(name)}: --ramp-up-strategy needs it")
    if settings.request_rate == math.inf and settings.duration is not None:
        raise ConfigError("--duration: all at once (--request-rate inf) needs --num-prompts instead")


def _refuse(settings: BenchServeSettings, names: Iterable[str]) -> None:
    for name in names:
        if name in settings.model_fields_set and getattr(settings, name) is not None:
            raise ConfigError(f"{_flag(name)}: decided by --preset {settings.preset}")


def _num_requests(settings: BenchServeSettings) -> int | None:
    if settings.duration is not None or settings.trace is not None:
        return None
    return settings.num_prompts or _DEFAULT_REQUESTS


def _arrivals(settings: BenchServeSettings) -> Arrivals:
    cap = settings.max_concurrency
    if settings.trace is not None:
        return Replay(read_trace(settings.trace, settings.trace_limit), settings.trace_speed, cap)
    if settings.request_rate is not None:
        return OpenLoop(settings.request_rate, settings.burstiness, cap)
    if settings.ramp_up_strategy is not None:
        strategy, start, end = settings.ramp_up_strategy, settings.ramp_up_start_rps, settings.ramp_up_end_rps
        assert start is not None and end is not None  # checked before
        if settings.duration is not None:
            return Ramp(strategy, start, end, settings.duration, settings.burstiness, cap)
        num_requests = settings.num_prompts or _DEFAULT_REQUESTS
        return Ramp.for_requests(strategy, start, end, num_requests, settings.burstiness, cap)
    return ClosedLoop(settings.concurrency or _DEFAULT_CONCURRENCY)


def _workload(settings: BenchServeSettings) -> Workload:
    images = settings.images_per_request or ("0" if settings.trace is not None else "1")
    return Workload(
        image_sizes=image_sizes(settings.image_size),
        images_per_request=lengths("images_per_request", images, 0),
        image_reuse_ratio=settings.image_reuse_ratio,
        text_only_share=settings.text_only_share,
        input_tokens=lengths("input_tokens", settings.input_tokens, 1),
        output_tokens=lengths("output_tokens", settings.output_tokens, 1),
        ignore_eos=settings.ignore_eos,
        options={"temperature": settings.temperature, **_extra_body(settings.extra_body)},
    )


def image_sizes(text: str) -> tuple[tuple[Size, float], ...]:
    """``mixed``: half small, some large, as in a chat with photos and screenshots. Raises ConfigError."""
    items = (_MIXED if text == "mixed" else text).split(",")
    return tuple(_weighted_size(item.strip(), text) for item in items)


def _weighted_size(item: str, whole: str) -> tuple[Size, float]:
    name, colon, weight = item.partition(":")
    number = _number(weight) if colon else 1.0
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", name)
    size = _NAMED_SIZES.get(name)
    if size is None and match is not None:
        size = Size(int(match[1]), int(match[2] or match[1]))
    if size is None or number is None or number <= 0 or not all(0 < side <= _MAX_SIDE for side in size):
        raise ConfigError(f"--image-size {whole[:64]}: expected 448, 1080p, WxH, or a mix such as 448:0.5,1080p:0.5")
    return size, number


def lengths(name: str, text: str, least: int) -> Lengths:
    """Of the option ``name``. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text.strip())
    found = None if match is None else Lengths(int(match[1]), int(match[2] or match[1]))
    if found is None or not least <= found.low <= found.high:
        raise ConfigError(f"{_flag(name)} {text[:64]}: expected N or LOW-HIGH, at least {least}")
    return found


def _extra_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body: expected a JSON object: {error}") from None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _internvl(settings: BenchServeSettings) -> Plan:
    _refuse(settings, ("image_size", "trace"))
    base = _workload(settings)
    sizes = [Size(side, side) for side in (448, 896, 1344)]
    return _sweep(settings, {f"{size} px": replace(base, image_sizes=((size, 1.0),)) for size in sizes})


def _reuse(settings: BenchServeSettings) -> Plan:
    _refuse(settings, ("image_reuse_ratio", "trace"))
    base = _workload(settings)
    return _sweep(
        settings, {f"{ratio:.0%} repeated": replace(base, image_reuse_ratio=ratio) for ratio in (0, 0.5, 0.9)}
    )


def _sweep(settings: BenchServeSettings, workloads: Mapping[str, Workload]) -> Plan:
    """The same load on each of the workloads. Answers have their full length, so that nothing else differs."""
    duration = settings.duration or (None if settings.num_prompts else _PRESET_SECONDS)
    arrivals = _arrivals(settings.model_copy(update={"duration": duration}))
    phases = [
        Phase(
            name,
            (Source("requests", arrivals, replace(workload, ignore_eos=True), settings.num_prompts),),
            duration,
            settings.warmup,
        )
        for name, workload in workloads.items()
    ]
    return Plan(tuple(phases), settings.seed)


def _text_beside_images(settings: BenchServeSettings) -> Plan:
    decided = ("image_size", "images_per_request", "text_only_share", "output_tokens", "num_prompts", *_LOADS)
    _refuse(settings, decided)
    base = replace(_workload(settings), ignore_eos=True)
    text = Source("text", ClosedLoop(4), replace(base, text_only_share=1.0, output_tokens=fixed(64)))
    image_sizes = ((Size(896, 896), 1.0),)
    images = Source("images", ClosedLoop(2), replace(base, image_sizes=image_sizes, output_tokens=fixed(32)))
    seconds = settings.duration or _PRESET_SECONDS
    names = ("text alone", "images alone", "text beside images")
    phases = [
        Phase(name, sources, seconds, settings.warmup)
        for name, sources in zip(names, ((text,), (images,), (text, images)), strict=True)
    ]
    return Plan(tuple(phases), settings.seed, compared=names)


def _language(settings: BenchServeSettings) -> Plan:
    decided = ("image_size", "images_per_request", "text_only_share", "input_tokens", "output_tokens")
    _refuse(settings, (*decided, "num_prompts", *_LOADS))
    base = replace(_workload(settings), input_tokens=fixed(256), output_tokens=fixed(64), ignore_eos=True)
    mixed = replace(base, image_sizes=((Size(448, 448), 1.0),), text_only_share=0.5)
    seconds = settings.duration or _PRESET_SECONDS
    phases = [
        Phase(name, (Source("requests", ClosedLoop(16), workload),), seconds, settings.warmup)
        for name, workload in (("text", replace(base, text_only_share=1.0)), ("text and images", mixed))
    ]
    return Plan(tuple(phases), settings.seed)


_PRESETS: Final[Mapping[Preset, Callable[[BenchServeSettings], Plan]]] = {
    "internvl": _internvl,
    "reuse": _reuse,
    "text-beside-images": _text_beside_images,
    "language": _language,
}
