"""cluster.yaml: what a cluster shall be. Every mistake is named by file and key before anything starts.

Knows nothing of Ray, and nothing of what is true on other machines: whether a node has the model is asked there.
"""

import json
from pathlib import Path
from typing import Any, Final, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from common.service.errors import ConfigError
from common.service.listen import is_loopback
from common.transport.registry import TransportChoice
from deploy.cluster.mistakes import check_options, explain
from deploy.cluster.tiers import TIERS, Tier
from deploy.settings import EMBEDDED, NANO

LOCAL: Final = "local"
AUTO: Final = "auto"

_NAME_PATTERN: Final = r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RaySpec(_Part):
    """Which Ray cluster."""

    address: str = Field(default=AUTO, description="auto, HOST:PORT, or local: start a head on this machine")

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address not in (AUTO, LOCAL) and not (host and port.isascii() and port.isdecimal()):
            raise ValueError("expected auto, local or HOST:PORT")
        return address


class _Group(_Part):
    """Servers of one kind. What one of them takes of a node is what Ray counts; nothing is pinned."""

    replicas: int = Field(default=1, ge=1, le=1024)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("expected a share of one GPU, or whole GPUs")
        return gpus

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory") or amount <= 0:
                raise ValueError(f"{name}: expected a custom resource of your nodes and an amount above 0")
        return resources

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one server."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in named.items() if amount > 0}

    @model_validator(mode="after")
    def _must_take_something(self) -> Self:
        if not self.bundle:
            raise ValueError("cpus, gpus or resources must be above 0: Ray places servers by them")
        return self


class _ScaledGroup(_Group):
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(
        default=None, ge=1, description="unset: nobody but `dvd scale` changes their number"
    )

    @field_validator("min_replicas")
    @classmethod
    def _check_least(cls, least: int, info: ValidationInfo) -> int:
        if least > info.data.get("replicas", least):
            raise ValueError(f"expected at most replicas, {info.data['replicas']}")
        return least

    @field_validator("max_replicas")
    @classmethod
    def _check_most(cls, most: int | None, info: ValidationInfo) -> int | None:
        if most is not None and most < info.data.get("replicas", most):
            raise ValueError(f"expected at least replicas, {info.data['replicas']}")
        return most


class VisionGroup(_ScaledGroup):
    """Vision servers."""


class LanguageGroup(_ScaledGroup):
    """Language servers. With tensor parallelism one server takes that many shares of its node."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=64)

    @field_validator("tensor_parallel_size")
    @classmethod
    def _check_size(cls, size: int, info: ValidationInfo) -> int:
        if size > 1 and info.data.get("gpus", 0) not in (0, 1):
            raise ValueError("each rank has a GPU of its own: say gpus: 1, or 0 for ranks on CPUs")
        return size

    @property
    def bundle(self) -> dict[str, float]:
        """All ranks in one bundle: a bundle never spans nodes, and its one server sees the devices of all ranks."""
        return {name: amount * self.tensor_parallel_size for name, amount in super().bundle.items()}


class RouterGroup(_Group):
    """Routers. With a fixed port every node takes one at most."""

    host: str | None = Field(default=None, description="address to listen on; unset: the node's own")
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free one")


class AutoscaleSpec(_Part):
    """When the vision and the language group grow and shrink between their bounds."""

    interval: float = Field(default=1.0, gt=0, le=60, description="seconds between two observations")
    vision_drain_seconds: float = Field(
        default=10.0, gt=0, description="queued tiles shall be encoded within this time"
    )
    language_kv_usage: float = Field(default=0.7, gt=0, le=1, description="share of the KV memory in use to aim for")
    language_waiting: float = Field(default=4.0, gt=0, description="waiting sequences that are worth one more server")
    hysteresis: float = Field(default=0.2, ge=0, lt=1, description="spare capacity that must remain after shrinking")
    confirmations: int = Field(default=3, ge=1, description="observations in a row before anything changes")
    cooldown_up: float = Field(default=15.0, ge=0, description="seconds from the last change to the next growth")
    cooldown_down: float = Field(default=120.0, ge=0, description="seconds from the last change to the next shrinking")
    max_step_up: int = Field(default=4, ge=1, description="servers added at once; they leave one at a time")


class ClusterSpec(_Part):
    """A cluster of one model."""

    name: str = Field(default="dvd", pattern=_NAME_PATTERN)
    model: str
    served_model_name: list[str] = Field(default_factory=list)
    ray: RaySpec = Field(default_factory=RaySpec)
    transports: tuple[TransportChoice, ...] = Field(default=("auto",), min_length=1)
    api_keys: list[SecretStr] = Field(default_factory=list)
    api_key_file: Path | None = None
    keys: str | None = None
    insecure_network: bool = False
    startup_timeout: float = Field(default=1800.0, gt=0)
    vision: VisionGroup = Field(default_factory=VisionGroup)
    language: LanguageGroup = Field(default_factory=LanguageGroup)
    routers: RouterGroup = Field(default_factory=RouterGroup)
    autoscale: AutoscaleSpec = Field(default_factory=AutoscaleSpec)

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: str) -> str:
        if model not in EMBEDDED and not model.startswith("/"):
            raise ValueError(f"expected {', '.join(EMBEDDED)}, or a directory from the root that every node has")
        return model

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, keys: str | None) -> str | None:
        if keys is not None and not keys.startswith("/"):
            raise ValueError("expected a directory from the root that every node has; dvd keys init makes it")
        return keys

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and judge the file.

        Raises:
            ConfigError: names the file, the key and what is allowed.
        """
        content = _read(path)
        try:
            spec = cls(**content)
        except ValidationError as error:
            raise ConfigError(f"{path}: {explain(cls, error)}") from None
        except TypeError:
            raise ConfigError(f"{path}: expected keys that are words") from None
        try:
            spec = spec._with_keys_of_file(path.parent)
            spec._check_programs()
            spec._check_exposure()
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return spec

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What ``to_json`` made."""
        return cls.model_validate_json(text)

    def to_json(self) -> str:
        """With the keys in it: for the controller only."""
        revealed = {"api_keys": [key.get_secret_value() for key in self.api_keys]}
        return json.dumps(self.model_dump(mode="json") | revealed)

    @property
    def keys_directory(self) -> Path | None:
        """Of every node."""
        return None if self.keys is None else Path(self.keys)

    @property
    def model_names(self) -> list[str]:
        """At least one; the first is what clients see."""
        return self.served_model_name or [Path(self.model).name]

    def group(self, tier: Tier) -> VisionGroup | LanguageGroup | RouterGroup:
        groups: dict[Tier, VisionGroup | LanguageGroup | RouterGroup] = {
            "vision": self.vision,
            "language": self.language,
            "router": self.routers,
        }
        return groups[tier]

    def is_scaled(self, tier: Tier) -> bool:
        """Whether the number of these servers follows the load."""
        group = self.group(tier)
        return isinstance(group, _ScaledGroup) and group.max_replicas is not None

    def is_one_per_node(self, tier: Tier) -> bool:
        """Whether two of them would want the same port."""
        return tier == "router" and self.routers.port != 0

    def bounds(self, tier: Tier) -> tuple[int, int | None]:
        """Fewest and most servers; None: as many as fit."""
        group = self.group(tier)
        return (group.min_replicas, group.max_replicas) if isinstance(group, _ScaledGroup) else (1, None)

    def options(self, tier: Tier) -> dict[str, Any]:
        """What every server of a group is told; the rest depends on its node."""
        options = dict(self.group(tier).options)
        if self.keys is not None:
            options["keys"] = self.keys
        if tier == "router":
            options["served_model_name"] = self.model_names
            options["api_key"] = [key.get_secret_value() for key in self.api_keys]
            return options
        if tier == "language":
            options["tensor_parallel_size"] = self.language.tensor_parallel_size
        if self.insecure_network:
            options["insecure_network"] = True
        return options | {"served_model_name": self.model_names[0], "transports": list(self.transports)}

    def _with_keys_of_file(self, directory: Path) -> Self:
        if self.api_key_file is None:
            return self
        path = directory / self.api_key_file
        try:
            lines = path.read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
            raise ConfigError(f"api_key_file: {path}: {reason}") from None
        if not lines:
            raise ConfigError(f"api_key_file: {path}: empty; expected a key a line")
        return self.model_copy(update={"api_keys": [*self.api_keys, *map(SecretStr, lines)], "api_key_file": None})

    def _check_programs(self) -> None:
        for tier in TIERS:
            key = "routers" if tier == "router" else tier
            check_options(f"{key}.options", tier, self.group(tier).options)

    def _check_exposure(self) -> None:
        host = self.routers.host
        if self.api_keys or self.insecure_network or (host is not None and is_loopback(host)):
            return
        raise ConfigError(
            "api_keys: without any, everybody who reaches the routers may use them; give some, or say"
            " routers.host: 127.0.0.1, or insecure_network: true where the network is yours alone"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `model: {NANO}`")
    return content
