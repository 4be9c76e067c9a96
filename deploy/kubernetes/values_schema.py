"""What the values of the Helm chart may be, as the JSON schema by which Helm refuses others.

    python -m deploy.kubernetes.values_schema

writes it. The options of the three programs come from their own settings, without those that the chart decides.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from common.service.settings import Settings
from deploy.settings import PROGRAMS

FILE: Final = Path(__file__).parent / "helm" / "dvd" / "values.schema.json"

PLACED: Final = frozenset(
    {
        *("config", "dump_config", "announce", "name", "model", "served_model_name", "listen", "metrics_listen"),
        *("feature_listen", "feature_advertise", "host", "port", "uds", "vision", "language", "keys"),
        *("insecure_network", "shutdown_timeout", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "api_key"),
        *("api_keys_file", "root_path"),
    }
)
"""What the chart says itself, or has a value or a Secret for."""

_KEPT: Final = (
    *("type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "minItems", "maxItems"),
)
_Schema = dict[str, Any]

_NAME: Final = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
_GROUP_NAME: Final = r"^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$"
_QUANTITY: Final = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


def make_schema() -> _Schema:
    """Of all values, nothing but the known ones allowed."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart dvd",
        "definitions": {program: _group(program) for program in _SCALED_BY},
        **_object(
            {
                "global": {"type": "object"},  # Helm adds it where the chart is part of another one
                "image": _object(
                    {
                        "repository": {"type": "string", "minLength": 1},
                        "tag": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{0,128}$"},
                        "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
                        "pullPolicy": {"enum": ["IfNotPresent", "Always", "Never"]},
                    }
                ),
                "imagePullSecrets": _list({"type": "string", "pattern": _NAME}),
                "model": _object(
                    {
                        "path": {"type": "string", "pattern": r"^(/.+|nano|nano-flash)$"},
                        "servedName": {"type": "string"},
                        "volume": {"type": "object", "maxProperties": 1},
                        "mountPath": {"type": "string", "pattern": "^/."},
                    }
                ),
                "keys": _object({role: {"type": "string", "pattern": _NAME} for role in PROGRAMS}),
                "insecureNetwork": {"type": "boolean"},
                "preStopSeconds": _integer(0, 120),
                "shutdownTimeout": _integer(1, 3600),
                "startupSeconds": _integer(10, 86400),
                "router": _router(),
                "vision": _tier("vision"),
                "language": _tier("language"),
                "prometheus": _object({"address": {"type": "string", "pattern": r"^(https?://\S+)?$"}}),
                "serviceMonitor": _object(
                    {
                        "enabled": {"type": "boolean"},
                        "interval": {"type": "string", "pattern": "^[1-9][0-9]*(s|m)$"},
                        "labels": _strings(),
                        "keySecret": {"type": "string", "pattern": _NAME},
                    }
                ),
                "networkPolicy": _object(
                    {
                        "enabled": {"type": "boolean"},
                        "clients": _list(_peer()),
                        "monitoring": _list(_peer()),
                        "routerEgress": _list({"type": "object"}),
                        "serverEgress": _list({"type": "object"}),
                    }
                ),
            }
        ),
    }


def _router() -> _Schema:
    return _object(
        {
            "replicas": _integer(1),
            "options": options_schema(PROGRAMS["router"]),
            "apiKeys": _object(
                {
                    "secret": {"type": "string", "pattern": f"^$|{_NAME}"},
                    "key": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
                }
            ),
            "tls": _object({"secret": {"type": "string", "pattern": f"^$|{_NAME}"}}),
            "service": _object(
                {
                    "type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                    "port": _integer(1, 65535),
                    "annotations": _strings(),
                }
            ),
            "autoscaling": _object(
                {
                    "enabled": {"type": "boolean"},
                    "minReplicas": _integer(1),
                    "maxReplicas": _integer(1),
                    "cpuUtilization": _integer(1, 100),
                }
            ),
            **_scheduled(),
        }
    )


def _tier(program: str) -> _Schema:
    """What is for all servers of a tier, and groups that have some of it otherwise; null takes a default one away."""
    groups = {
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {_GROUP_NAME: {"anyOf": [{"$ref": f"#/definitions/{program}"}, {"type": "null"}]}},
    }
    return _object({**_group(program)["properties"], "groups": groups})


def _group(program: str) -> _Schema:
    return _object(
        {
            "replicas": _integer(1),
            "options": options_schema(PROGRAMS[program]),
            "gpus": _integer(0, 64),
            "gpuResource": {"type": "string", "pattern": r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$"},
            "maxSurge": _integer(0, 1024),
            "shmSize": _quantity(),
            "cacheSize": _quantity(),
            "autoscaling": _object(
                {
                    "enabled": {"type": "boolean"},
                    "by": {"enum": ["keda", "hpa"]},
                    "minReplicas": _integer(1),
                    "maxReplicas": _integer(1),
                    **_SCALED_BY[program],
                }
            ),
            "runtimeClassName": {"type": "string"},
            **_scheduled(),
        }
    )


def _scheduled() -> dict[str, _Schema]:
    """Of what pods are made."""
    amounts = {"type": "object", "additionalProperties": _quantity()}
    return {
        "resources": _object({"requests": amounts, "limits": amounts}),
        "podAnnotations": _strings(),
        "nodeSelector": _strings(),
        "tolerations": _list({"type": "object"}),
        "affinity": {"type": "object"},
        "priorityClassName": {"type": "string"},
    }


def options_schema(program: type[Settings]) -> _Schema:
    """The options of a program that a values file may set."""
    declared = program.model_json_schema()
    properties = {
        name: _plain(field, declared.get("$defs", {}))
        for name, field in declared["properties"].items()
        if name not in PLACED
    }
    return _object(properties)


def _plain(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> _Schema:
    """A field as drafts of JSON schema before 2019 know it: no references, no formats."""
    if "$ref" in field:
        return _plain(definitions[field["$ref"].rpartition("/")[2]], definitions)
    found = {name: field[name] for name in _KEPT if name in field}
    if "anyOf" in field:
        found["anyOf"] = [_plain(choice, definitions) for choice in field["anyOf"]]
    if isinstance(field.get("items"), Mapping):
        found["items"] = _plain(field["items"], definitions)
    return found


def _object(properties: Mapping[str, _Schema]) -> _Schema:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}


def _list(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


def _strings() -> _Schema:
    return {"type": "object", "additionalProperties": {"type": "string"}}


def _integer(minimum: int, maximum: int | None = None) -> _Schema:
    bound = {} if maximum is None else {"maximum": maximum}
    return {"type": "integer", "minimum": minimum, **bound}


def _quantity() -> _Schema:
    return {"anyOf": [{"type": "string", "pattern": _QUANTITY}, {"type": "number", "exclusiveMinimum": 0}]}


def _peer() -> _Schema:
    names = ("podSelector", "namespaceSelector", "ipBlock")
    return {**_object({name: {"type": "object"} for name in names}), "minProperties": 1}


_SCALED_BY: Final[Mapping[str, dict[str, _Schema]]] = {
    "vision": {"queuedTiles": _integer(1)},
    "language": {"kvUsagePercent": _integer(1, 99), "waiting": _integer(1)},
}
"""What a group's autoscaling aims for."""


def text() -> str:
    """As the file has it."""
    return json.dumps(make_schema(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
