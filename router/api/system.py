"""``GET /live /health /metrics /load /version``: what operators and load balancers ask."""

from collections.abc import Callable
from importlib.metadata import version

from prometheus_client.registry import Collector
from starlette.types import Receive, Scope, Send

from common.service import metrics
from protos import frame
from router.api.exchange import Exchange

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Live:
    """200 while the event loop runs, also while loading or draining."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange.of(scope).respond(200, b"", {})


class Health:
    """Readiness: 200 once a vision and a language server are warm, 503 while loading, draining or a tier is empty."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange.of(scope).respond(200 if self._is_ready() else 503, b"", {})


class Metrics:
    """Prometheus text of this process; ``others`` are exported beside what it measures."""

    def __init__(self, *others: Collector) -> None:
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange.of(scope).respond(
            200, metrics.exposition("router", *self._others), {"content-type": _METRICS_TYPE}
        )


class Load:
    """Requests that this process is working on, waiting ones included: what a load balancer compares. vLLM's shape."""

    def __init__(self, num_running: Callable[[], int]) -> None:
        self._num_running = num_running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange.of(scope).respond_json({"server_load": self._num_running()})


class Version:
    """Version of this build and of the wire it speaks."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange.of(scope).respond_json({"version": version("dvd-serve"), "wire_version": frame.VERSION})
