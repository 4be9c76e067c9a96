"""Mistakes in cluster.yaml, in words: which key, what is wrong with it, what was meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from pydantic import BaseModel, ValidationError

from common.service.errors import ConfigError
from common.service.settings import Settings
from deploy.cluster.tiers import Tier
from deploy.settings import PLACED, PROGRAMS

_MAX_GOT_CHARS: Final = 64
# Options of the programs that have a key of their own, or that placement decides.
_ELSEWHERE: Final[Mapping[str, str]] = {
    "model": "model",
    "served_model_name": "served_model_name",
    "transports": "transports",
    "tensor_parallel_size": "language.tensor_parallel_size",
    "api_key": "api_keys",
    "host": "routers.host",
    "port": "routers.port",
    "keys": "keys",
    "insecure_network": "insecure_network",
}
_DECIDED: Final = (PLACED | {"metrics_listen", *_ELSEWHERE}) - {"nice"}
# Stands for what a program requires and placement will fill in.
_FILLED_IN: Final[Mapping[Tier, Mapping[str, Any]]] = {
    "vision": {"model": "/"},
    "language": {"model": "/"},
    "router": {"vision": ["file:/vision"], "language": ["file:/language"]},
}


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first mistake: key, what is wrong, what was found."""
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "missing":
        return f"{key}: is required"
    if first["type"] == "extra_forbidden":
        known = _model_at(model, location[:-1]).model_fields
        return f"{key[:_MAX_GOT_CHARS]}: unknown key{_nearest(str(location[-1]), known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{key}: {message}"
    return f"{key}: {message} (got {str(first['input'])[:_MAX_GOT_CHARS]!r})"


def _model_at(model: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel]:
    for part in location:
        model = cast(type[BaseModel], model.model_fields[str(part)].annotation)
    return model


def check_options(key: str, tier: Tier, options: Mapping[str, Any]) -> None:
    """Raises ConfigError for what the program would refuse, and for what is decided elsewhere."""
    declared = PROGRAMS[tier]
    allowed = [name for name in declared.model_fields if name not in _DECIDED]
    for name in options:
        if name in _DECIDED and name in declared.model_fields:
            where = f"say {_ELSEWHERE[name]}" if name in _ELSEWHERE else "dvd up decides it"
            raise ConfigError(f"{key}.{name}: {where}")
        if name not in allowed:
            raise ConfigError(f"{key}.{name}: unknown option of dvd {tier}{_nearest(str(name), allowed)}")
    _try_out(key, declared, {**_FILLED_IN[tier], **options})


def _try_out(key: str, declared: type[Settings], values: dict[str, Any]) -> None:
    try:
        declared(**values)
    except ValidationError as error:
        explained = explain(declared, error)
        raise ConfigError(f"{key}{explained if explained.startswith(':') else '.' + explained}") from None
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
