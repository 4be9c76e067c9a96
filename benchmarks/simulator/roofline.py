"""Cards of hardware that nobody measured: published peaks, stated efficiencies, and the shape of a model.

A roofline: something takes as long as its arithmetic or its bytes, whichever is longer, plus what it takes beside.

* ViT: 2 x parameters for each of 1025 positions of a tile, and attention, 4 x positions^2 x hidden for each layer.
* Prompt: 2 x active parameters for each token, and attention, 2 x tokens^2 x heads x head size for each layer (causal:
  half of all pairs).
* Decode step: reads the weights once (of experts those that so many tokens choose between them), and every
  sequence's keys and values.
* Tensor parallel: peaks times devices; two all-reduces for each layer and step.
"""

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final, TypeVar

import msgspec

from benchmarks.simulator.hardware import (
    DecodePoint,
    HardwareCard,
    LanguageRates,
    PrefillPoint,
    RouterRates,
    Source,
    TransportRates,
    VisionPoint,
    VisionRates,
)
from common.service.errors import ConfigError

Value = TypeVar("Value")
_POSITIONS: Final = 1025
"""Of a tile in the ViT: 32 x 32 patches and CLS."""
_BYTES: Final = 2
"""Of a number, BF16."""
_BATCHES: Final = (1, 2, 4, 8, 16, 32)
_LENGTHS: Final = (1, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_SEQUENCES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS: Final = (1, 1024, 4096, 16384, 40960)
_LEAST_KV_SHARE: Final = 0.1
"""Of the memory: a layout with less room for KV does not count as one that fits."""
_MOST_DEVICES: Final = 64


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of one device."""

    name: str
    tflop_per_s: float
    gb_per_s: float
    memory_gb: float
    allreduce_us: float
    source: str


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """Shares of the peaks, and seconds beside."""

    vision: float
    prefill: float
    prefill_experts: float
    bandwidth: float
    memory: float
    vision_overhead_s: float
    step_overhead_s: float
    source: str


@dataclass(frozen=True, slots=True)
class VisionShape:
    parameters: int
    layers: int
    hidden: int

    @property
    def flop_per_tile(self) -> float:
        return 2.0 * self.parameters * _POSITIONS + 4.0 * self.layers * _POSITIONS**2 * self.hidden


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """``experts`` 0: dense. Parameters count the embeddings, of which a token needs one half: the head."""

    vision: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int = 0
    experts_per_token: int = 0
    expert_hidden: int = 0

    @property
    def expert_parameters(self) -> int:
        """Of all experts: gate, up and down."""
        return 3 * self.layers * self.experts * self.hidden * self.expert_hidden

    @property
    def active_parameters(self) -> float:
        return self.weights_read(1)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * _BYTES

    def weights_read(self, num_tokens: float) -> float:
        """Parameters that so many tokens need together, where each chooses its experts evenly."""
        if not self.experts:
            return self.parameters
        missed: float = (1 - self.experts_per_token / self.experts) ** num_tokens
        return self.parameters - self.expert_parameters * missed


@dataclass(frozen=True, slots=True)
class Published:
    """The data file."""

    devices: dict[str, Device]
    efficiencies: Efficiencies
    transports: dict[str, dict[str, float]]
    transports_source: str
    router: dict[str, float]
    router_source: str
    vision_models: dict[str, VisionShape]
    models: dict[str, LanguageShape]
    models_source: str


@cache
def published() -> Published:
    """Devices, models and efficiencies that come with the benchmarks."""
    content = (files("benchmarks.simulator") / "published.json").read_bytes()
    return msgspec.json.decode(content, type=Published)


def published_card(
    device_name: str,
    model_name: str,
    language_devices: int | None = None,
    vision_devices: int = 1,
    efficiencies: Efficiencies | None = None,
) -> HardwareCard:
    """The card of a device for a model. ``language_devices``: of one server; None: the fewest that hold the model.

    Raises:
        ConfigError: an unknown device or model, or a model that does not fit.
    """
    known = published()
    device = _known("device", device_name, known.devices)
    shape = _known("model", model_name, known.models)
    shares = efficiencies or known.efficiencies
    num_devices = language_devices or _fewest_devices(device, shape, shares)
    kv_tokens = _kv_tokens(device, shape, shares, num_devices)
    if kv_tokens < 1:
        raise ConfigError(
            f"{model_name} on {num_devices} x {device.name}: does not fit; {_fewest_devices(device, shape, shares)} do"
        )
    vision = known.vision_models[shape.vision]
    sources = [device.source, known.models_source, _words(shares)]
    sources += [f"Transports: {known.transports_source}", f"Router: {known.router_source}"]
    return HardwareCard(
        name=device.name,
        model=model_name,
        source=Source(kind="computed", text=". ".join(sources)),
        hardware=f"vision servers of {vision_devices}, language servers of {num_devices} x {device.name}",
        vision=_vision_rates(device, vision, shares, vision_devices),
        language=_language_rates(device, shape, shares, num_devices, kv_tokens),
        transports={kind: TransportRates(**rates) for kind, rates in known.transports.items()},
        router=RouterRates(**known.router),
    )


def _known(kind: str, name: str, values: dict[str, Value]) -> Value:
    if name not in values:
        raise ConfigError(f"{kind} {name[:64]}: expected one of {', '.join(values)}")
    return values[name]


def _words(shares: Efficiencies) -> str:
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {getattr(shares, name):g}" for name in Efficiencies.__slots__ if name != "source"
    )
    return f"{shares.source}: {numbers}"


def _vision_rates(device: Device, shape: VisionShape, shares: Efficiencies, num_devices: int) -> VisionRates:
    def seconds(num_tiles: int) -> float:
        arithmetic = num_tiles * shape.flop_per_tile / (device.tflop_per_s * 1e12 * shares.vision)
        weights = shape.parameters * _BYTES / (device.gb_per_s * 1e9 * shares.bandwidth)
        return shares.vision_overhead_s + max(arithmetic, weights) / num_devices

    points = tuple(VisionPoint(batch=batch, tiles_per_s=batch / seconds(batch)) for batch in _BATCHES)
    return VisionRates(devices=num_devices, max_batch=_BATCHES[-1], tiles=points)


def _language_rates(
    device: Device, shape: LanguageShape, shares: Efficiencies, num_devices: int, kv_tokens: int
) -> LanguageRates:
    flop_per_s = device.tflop_per_s * 1e12 * num_devices
    flop_per_s *= shares.prefill_experts if shape.experts else shares.prefill
    bytes_per_s = device.gb_per_s * 1e9 * shares.bandwidth * num_devices
    beside = shares.step_overhead_s + (2 * shape.layers * device.allreduce_us * 1e-6 if num_devices > 1 else 0.0)

    def prefill(length: int) -> float:
        attention = 2.0 * shape.layers * length**2 * shape.heads * shape.head_size
        arithmetic = (2.0 * shape.active_parameters * length + attention) / flop_per_s
        return beside + max(arithmetic, shape.weights_read(length) * _BYTES / bytes_per_s)

    def decode(batch: int, context: int) -> float:
        arithmetic = 2.0 * shape.active_parameters * batch / flop_per_s
        num_bytes = shape.weights_read(batch) * _BYTES + batch * context * shape.kv_bytes_per_token
        return beside + max(arithmetic, num_bytes / bytes_per_s)

    return LanguageRates(
        devices=num_devices,
        kv_tokens=kv_tokens,
        bytes_per_token=shape.hidden * _BYTES,
        prefill=tuple(PrefillPoint(length=n, tokens_per_s=n / prefill(n)) for n in _LENGTHS),
        decode=tuple(DecodePoint(batch=b, context=c, step_s=decode(b, c)) for b in _SEQUENCES for c in _CONTEXTS),
    )


def _kv_tokens(device: Device, shape: LanguageShape, shares: Efficiencies, num_devices: int) -> int:
    room = device.memory_gb * 1e9 * shares.memory * num_devices - shape.parameters * _BYTES
    return math.floor(room / shape.kv_bytes_per_token)


def _fewest_devices(device: Device, shape: LanguageShape, shares: Efficiencies) -> int:
    """A power of two, as heads are divided. Raises ConfigError where not even the most do."""
    num_devices = 1
    while num_devices <= _MOST_DEVICES:
        kv_bytes = _kv_tokens(device, shape, shares, num_devices) * shape.kv_bytes_per_token
        if kv_bytes >= _LEAST_KV_SHARE * device.memory_gb * 1e9 * num_devices:
            return num_devices
        num_devices *= 2
    raise ConfigError(f"{device.name}: {_MOST_DEVICES} of them do not hold {shape.parameters:,} parameters and KV")
