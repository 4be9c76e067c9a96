"""The ServiceMonitors use fields that the Prometheus operator knows (monitoring.coreos.com/v1), and a route of ours."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from router.api.openapi import OPERATIONS

FILE = Path(__file__).parents[2] / "deploy" / "grafana" / "servicemonitor.yaml"
Name = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Duration = Annotated[str, Meta(pattern=r"^[1-9][0-9]*(ms|s|m)$")]
Labels = dict[str, Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,63}$")]]


class Record(Struct, forbid_unknown_fields=True):
    pass


class SecretKey(Record):
    name: Name
    key: str


class Authorization(Record):
    type: Literal["Bearer"]
    credentials: SecretKey


class Endpoint(Record):
    port: Name
    path: str
    interval: Duration
    scrapeTimeout: Duration
    authorization: Authorization | None = None


class Requirement(Record):
    key: str
    operator: Literal["In", "Exists", "DoesNotExist"]
    values: list[str] = []


class Selector(Record):
    matchLabels: Labels
    matchExpressions: list[Requirement] = []


class Spec(Record):
    selector: Selector
    endpoints: Annotated[list[Endpoint], Meta(min_length=1)]


class Metadata(Record):
    name: Name
    labels: Labels = {}


class ServiceMonitor(Record):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["ServiceMonitor"]
    metadata: Metadata
    spec: Spec


MONITORS = [msgspec.convert(document, ServiceMonitor) for document in yaml.safe_load_all(FILE.read_text("utf-8"))]


def test_each_has_a_name_of_its_own():
    assert sorted(monitor.metadata.name for monitor in MONITORS) == ["dvd-router", "dvd-servers"]


def test_they_ask_for_metrics_in_time():
    paths = {operation.path for operation in OPERATIONS}
    for endpoint in (endpoint for monitor in MONITORS for endpoint in monitor.spec.endpoints):
        assert endpoint.path in paths
        assert int(endpoint.scrapeTimeout.rstrip("s")) <= int(endpoint.interval.rstrip("s"))


def test_only_routers_are_shown_a_key_and_all_tiers_are_scraped():
    router, servers = sorted(MONITORS, key=lambda monitor: monitor.metadata.name)
    assert [endpoint.authorization is not None for endpoint in router.spec.endpoints] == [True]
    assert [endpoint.authorization for endpoint in servers.spec.endpoints] == [None]
    (tiers,) = servers.spec.selector.matchExpressions
    assert {router.spec.selector.matchLabels[tiers.key], *tiers.values} == {"router", "vision", "language"}
