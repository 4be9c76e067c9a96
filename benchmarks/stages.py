"""Where a time to first token went, from the server's own account of it (API.md section 4). Pure. Peers give none."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.samples import Sample

STAGES: Final = (
    "fetch_ms",
    "decode_ms",
    "vision_queue_ms",
    "encode_ms",
    "transfer_ms",
    "feature_wait_ms",
    "language_queue_ms",
    "prefill_ms",
)
"""As the server calls them, in the order in which a request meets them."""
_MIN_GROUPED: Final = 20
PARTS: Final = ("fetch", "decode", "vision queue", "encode", "transfer", "language queue", "prefill", "other")
"""What a time to first token is made of, see ``split_ttft``."""


def server_stages(sample: Sample) -> dict[str, Any]:
    """The server's own account of one request; empty where it gives none."""
    found = sample.metrics.get("dvd")
    return found if isinstance(found, dict) else {}


def split_ttft(ttft_ms: float, stages: Mapping[str, Any]) -> dict[str, float]:
    """A time to first token as a sum of ``PARTS``.

    The server's stages overlap. Here every moment counts once, for the stage that the first token still waited for:
    while features were missing, the way of the slowest image (decode, queue, encode, then what of the transfer was
    not hidden behind encoding); without images, and after the last feature, the language server. ``other`` is the
    rest: network, router, client.
    """
    left = ttft_ms
    parts = dict.fromkeys(PARTS, 0.0)

    def take(part: str, milliseconds: float) -> float:
        nonlocal left
        taken = min(left, max(0.0, milliseconds))
        parts[part] += taken
        left -= taken
        return taken

    def stage(name: str) -> float:
        return float(stages.get(name) or 0.0)

    take("fetch", stage("fetch_ms"))
    language = stage("language_queue_ms") + stage("prefill_ms")
    waiting = min(stage("feature_wait_ms"), language) if stages.get("images") else 0.0
    missing = waiting
    for part, name in (("decode", "decode_ms"), ("vision queue", "vision_queue_ms"), ("encode", "encode_ms")):
        missing -= take(part, min(missing, stage(name)))
    take("transfer", missing)
    queued = min(max(0.0, stage("language_queue_ms") - waiting), language - waiting)
    take("language queue", queued)
    take("prefill", language - waiting - queued)
    parts["other"] = left
    return parts


def mean_parts(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Mean parts in ms of all requests; of enough of them also of the faster half and the slowest tenth by TTFT."""
    told = sorted((s for s in samples if server_stages(s)), key=lambda sample: sample.ttft)
    if not told:
        return {}
    groups = {"all": told}
    if len(told) >= _MIN_GROUPED:
        groups |= {"fastest 50 %": told[: len(told) // 2], "slowest 10 %": told[-(len(told) // 10) :]}
    return {name: _mean_of_parts(group) for name, group in groups.items()}


def _mean_of_parts(samples: Sequence[Sample]) -> dict[str, float]:
    splits = [split_ttft(1e3 * sample.ttft, server_stages(sample)) for sample in samples]
    return {part: sum(split[part] for split in splits) / len(splits) for part in PARTS}
