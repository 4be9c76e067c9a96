"""A hardware card: how fast one server of each kind is. JSON, frozen, validated; measured or computed, as it says.

    card = HardwareCard.load(Path("h100.json"))
    card.vision_part().batch_seconds(12)          # 12 tiles in one batch
    card.language_part().decode_seconds(32, 1500)  # one step of 32 sequences that are 1500 tokens long on average

Rates are kept as they were found, by size. Between two sizes the *seconds* are a straight line, so that a larger batch
never takes less time, whatever noise a measurement had: a point that took less than a smaller one counts as that one.
Beyond the last point the last rate goes on. Knows nothing of requests, queues or time.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.service.errors import ConfigError

FORMAT: Final = 1
"""Of the file. A card of another format is refused."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds by size. ``sizes`` rise strictly from above 0; ``seconds`` never fall."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Self:
        """Points (size, seconds) in any order."""
        sizes, seconds = zip(*sorted(points), strict=True)
        return cls(sizes, tuple(accumulate(seconds, max)))

    def at(self, size: float) -> float:
        """Below the first size its seconds, above the last one its rate."""
        if size <= self.sizes[0]:
            return self.seconds[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        after = bisect_right(self.sizes, size)
        low, high = self.sizes[after - 1], self.sizes[after]
        share = (size - low) / (high - low)
        return self.seconds[after - 1] + share * (self.seconds[after] - self.seconds[after - 1])


@dataclass(frozen=True, slots=True)
class Surface:
    """Seconds by batch and length: one line along the length for each batch, all with the same lengths."""

    batches: tuple[float, ...]
    lines: tuple[Line, ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float, float]]) -> Self:
        """Points (batch, length, seconds) of a whole grid, in any order."""
        rows: dict[float, dict[float, float]] = {}
        for batch, length, seconds in sorted(points):
            rows.setdefault(batch, {})[length] = seconds
        lines: list[Line] = []
        for row in rows.values():
            line = Line.through(row.items())
            if lines:  # more sequences never take less time either
                line = Line(line.sizes, tuple(map(max, line.seconds, lines[-1].seconds)))
            lines.append(line)
        return cls(tuple(rows), tuple(lines))

    def at(self, batch: float, length: float) -> float:
        """Between batches as between lengths, and beyond them too."""
        if batch <= self.batches[0]:
            return self.lines[0].at(length)
        if batch >= self.batches[-1]:
            return self.lines[-1].at(length) * batch / self.batches[-1]
        after = bisect_right(self.batches, batch)
        low, high = self.batches[after - 1], self.batches[after]
        below, above = self.lines[after - 1].at(length), self.lines[after].at(length)
        return below + (batch - low) / (high - low) * (above - below)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VisionPoint(_Part):
    """Tiles/s while batches of this many tiles follow one another."""

    batch: _Count
    tiles_per_s: _Positive


class PrefillPoint(_Part):
    """Prompt tokens/s, all sequences together, while ``batch`` prompts of ``length`` tokens are read at once."""

    length: _Count
    batch: _Count = 1
    tokens_per_s: _Positive


class DecodePoint(_Part):
    """One step: one token for each of ``batch`` sequences that are ``context`` tokens long."""

    batch: _Count
    context: _Count
    step_s: _Positive


class VisionRates(_Part):
    """One vision server: ViT, projector, and the Visual Resolution Router where there is one."""

    devices: _Count = 1
    max_batch: _Count = 32
    """Tiles of one batch at most."""
    image_s_per_tile: _NotNegative = 0.0
    """CPU seconds to decode and cut an image, for each of its tiles, before the ViT sees it."""
    tiles: tuple[VisionPoint, ...] = Field(min_length=1)

    @field_validator("tiles")
    @classmethod
    def _check_tiles(cls, points: tuple[VisionPoint, ...]) -> tuple[VisionPoint, ...]:
        _refuse_twins([(point.batch,) for point in points])
        return points

    @cached_property
    def _line(self) -> Line:
        return Line.through((point.batch, point.batch / point.tiles_per_s) for point in self.tiles)

    def batch_seconds(self, num_tiles: int) -> float:
        """A batch of this many tiles."""
        return self._line.at(num_tiles)


class LanguageRates(_Part):
    """One language server, over ``devices`` devices where it is tensor parallel."""

    devices: _Count = 1
    kv_tokens: _Count
    """Tokens of all its sequences together that its KV memory holds."""
    max_num_seqs: _Count = 256
    max_num_batched_tokens: _Count = 2048
    """Tokens of one step at most: the token budget."""
    bytes_per_token: _Count
    """Of one visual token on its way: hidden size times two for BF16."""
    prefill: tuple[PrefillPoint, ...] = Field(min_length=1)
    decode: tuple[DecodePoint, ...] = Field(min_length=1)

    @field_validator("prefill")
    @classmethod
    def _check_prefill(cls, points: tuple[PrefillPoint, ...]) -> tuple[PrefillPoint, ...]:
        _refuse_holes([(point.batch, point.length) for point in points], "length")
        return points

    @field_validator("decode")
    @classmethod
    def _check_decode(cls, points: tuple[DecodePoint, ...]) -> tuple[DecodePoint, ...]:
        _refuse_holes([(point.batch, point.context) for point in points], "context")
        return points

    @cached_property
    def _prefill(self) -> Surface:
        return Surface.through((p.batch, p.length, p.batch * p.length / p.tokens_per_s) for p in self.prefill)

    @cached_property
    def _decode(self) -> Surface:
        return Surface.through((p.batch, p.context, p.step_s) for p in self.decode)

    def prefill_seconds(self, length: float, batch: float = 1) -> float:
        """``batch`` prompts of ``length`` tokens from their start, together."""
        return self._prefill.at(batch, length)

    def decode_seconds(self, batch: float, context: float) -> float:
        """One step of ``batch`` sequences of mean length ``context``."""
        return self._decode.at(batch, context)


class TransportRates(_Part):
    """One way from a vision to a language server."""

    gb_per_s: _Positive
    latency_s: _NotNegative = 0.0

    def seconds(self, num_bytes: float) -> float:
        """From the first byte sent to the last one there, on a way that is free."""
        return self.latency_s + num_bytes / (self.gb_per_s * 1e9)


class RouterRates(_Part):
    """CPU seconds of a router process: it has one core."""

    s_per_request: _NotNegative
    s_per_token: _NotNegative = 0.0
    """For each token it passes on."""


class Source(_Part):
    """Where the numbers come from. ``text``: the command that measured, or figures and efficiencies in words."""

    kind: Literal["measured", "computed"]
    text: str = Field(min_length=1)


class HardwareCard(_Part):
    """One kind of device with one model on it. A card of a single tier leaves out the other."""

    format: Literal[1] = FORMAT
    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    source: Source
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: str
    price_per_device_hour: _NotNegative | None = None
    vision: VisionRates | None = None
    language: LanguageRates | None = None
    transports: dict[str, TransportRates] = Field(min_length=1)
    """By kind: tcp, shm, ..., as `--transports` names them."""
    router: RouterRates

    @model_validator(mode="after")
    def _must_have_a_tier(self) -> Self:
        if self.vision is None and self.language is None:
            raise ValueError("expected vision, language or both")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigError: names the file, the key and what is allowed."""
        try:
            return cls.from_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What ``to_json`` made. Raises ConfigError: names the key and what is allowed."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    def to_json(self) -> str:
        """With line breaks, to be read by people."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    def vision_part(self) -> VisionRates:
        """Raises ConfigError where the card has none."""
        if self.vision is None:
            raise ConfigError(f"card {self.name}: has no vision figures; name another card for the vision servers")
        return self.vision

    def language_part(self) -> LanguageRates:
        """Raises ConfigError where the card has none."""
        if self.language is None:
            raise ConfigError(f"card {self.name}: has no language figures; name another card for the language servers")
        return self.language

    def transport(self, kind: str) -> TransportRates:
        """Raises ConfigError where the card has no such way."""
        if kind not in self.transports:
            known = ", ".join(sorted(self.transports))
            raise ConfigError(f"transport {kind[:64]}: card {self.name} has {known}")
        return self.transports[kind]


def _refuse_twins(keys: Sequence[tuple[int, ...]]) -> None:
    if len(set(keys)) < len(keys):
        raise ValueError("two points for the same size")


def _refuse_holes(keys: Sequence[tuple[int, int]], other: str) -> None:
    """Between points of a grid there is an answer; of some points far apart nobody knows."""
    _refuse_twins(keys)
    batches, others = {batch for batch, _ in keys}, {size for _, size in keys}
    missing = {(batch, size) for batch in batches for size in others} - set(keys)
    if missing:
        batch, size = min(missing)
        raise ValueError(f"expected a point for each batch with each {other}; batch {batch} has none for {size}")


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | list | tuple) else f" (given: {str(first['input'])[:64]})"
    return f"{where}: {said}{given}" if where else f"{said}{given}"
