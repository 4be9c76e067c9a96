"""The router as one ASGI application: who may come in, which route answers, and how failures leave.

Everything a request needs is owned here: the fleet's watchers, the admission bounds, the drain.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from math import inf
from typing import Final

from prometheus_client.registry import Collector
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from common.service import metrics
from common.service.errors import AuthenticationFailed, DvdError, HeadersTooLarge, RateLimited
from common.service.keys import Keys
from protos import frame
from router.admission import Admission, AdmissionLimits, Places, share
from router.api import system
from router.api.chat import ChatEndpoint, draining, not_ready
from router.api.completions import CompletionEndpoint
from router.api.deep_health import DeepHealth
from router.api.docs_page import StaticPage, render
from router.api.exchange import Exchange
from router.api.models import GetModel, ListModels, ModelList
from router.api.named_media import NamedMedia
from router.api.openapi import describe
from router.api.origins import Origins
from router.api.tokenize import DetokenizeEndpoint, TokenizeEndpoint
from router.cut_off import CutOff
from router.discovery import Discovery, log_death
from router.fetch.fetcher import MediaFetcher
from router.fleet import Fleet
from router.metrics_compat import VllmMetrics
from router.settings import RouterSettings
from router.tenants import Tenant, Tenants
from router.ui.page import Playground
from router.ui.pipeline_view import PipelineView
from router.ui.recent import Recent

log = logging.getLogger(__name__)

_OPEN_PATHS: Final = frozenset({"/live", "/health"})
_FOLLOWED_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_DRAIN_POLL_SECONDS: Final = 0.05


class RouterServer:
    """The ASGI application. ``running`` brings it to life; until then it answers that it is not ready."""

    def __init__(self, settings: RouterSettings, fetcher: MediaFetcher | None = None) -> None:
        """``fetcher`` takes the place of the one that the settings ask for."""
        self.settings = settings
        self._fetcher = fetcher or MediaFetcher.of(settings)
        self.fleet = Fleet(
            leave_timeout=settings.request_timeout,
            hedge_quantile=settings.hedge_quantile,
            num_sharers=settings.workers,
            keys=Keys.given(settings.keys, "router"),
        )
        self._discoveries = (
            Discovery("vision", settings.vision, settings.discovery_interval, self.fleet.set_vision),
            Discovery("language", settings.language, settings.discovery_interval, self.fleet.set_language),
        )
        self.models = ModelList(self.fleet, settings.served_model_name)
        self.admission = Admission(_limits(settings), self._places)
        self.named_media = NamedMedia(settings.max_named_media_bytes)
        self.is_draining = False
        self._cut_off = CutOff()
        self._origins = Origins(settings.allowed_origins)
        keys = [key.get_secret_value() for key in settings.api_key]
        self._tenants = Tenants(keys, settings.api_keys_file, settings.workers)
        self._recent = Recent()
        self._playground = Playground() if settings.playground else None
        self._open_paths = _OPEN_PATHS | (self._playground.paths if self._playground is not None else frozenset())
        self._routes = Router(self._make_routes(), redirect_slashes=False)

    @property
    def is_ready(self) -> bool:
        """What ``/health`` says."""
        return self.fleet.is_ready and not self.is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request. Never raises: the seam where every failure becomes an answer."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        # The path that routes is the one that decides on the key.
        scope = {**scope, "path": self._below_root(scope["path"]), "root_path": ""}
        exchange = Exchange(scope, self._origins.wrap(scope, send), self.settings.overload_status)
        try:
            self._check_headers(exchange)
            if self._origins.is_preflight(scope):
                return await self._origins.answer(scope, receive, exchange.send)
            tenant = self._check_key(exchange)
            self._check_drain(exchange)
            self._check_quota(exchange, tenant)
            if self._playground is not None and exchange.path in _FOLLOWED_PATHS:
                self._recent.begin(exchange)
            # With "app" in the scope starlette raises its 404 and 405 instead of answering in plain text.
            await self._routes({**scope, "app": self}, receive, exchange.send)
        except Exception as error:  # noqa: BLE001 - the seam: every failure becomes an answer
            if isinstance(error, RateLimited):
                metrics.QUOTA_REJECTIONS.labels(error.reason).inc()
                log.info("%s has used up its quota: %s", exchange.tenant, error.reason)
            await exchange.fail(error)
        finally:
            exchange.end_grant()
            self._count(exchange)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Know the servers and follow them while inside."""
        self._export_gauges()
        following = asyncio.create_task(self._tenants.follow(), name="follow the keys")
        following.add_done_callback(log_death)
        try:
            for discovery in self._discoveries:
                discovery.start()
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            for discovery in self._discoveries:
                await discovery.close()
            await self.fleet.close()

    async def drain(self) -> None:
        """Refuse new work and return when the admitted work has ended, or the grace has."""
        self.is_draining = True
        metrics.set_state("draining")
        log.info("draining: %d requests are running", self.admission.num_running)
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                while self.admission.num_running > 0:
                    await asyncio.sleep(_DRAIN_POLL_SECONDS)
        except TimeoutError:
            log.warning("the grace is over: %d requests are cut off", self.admission.num_running)
            self._cut_off.set()

    def _places(self) -> Places:
        """What the servers let wait together, as far as they have said: the part of it that is for this process."""
        language = [worker.status for worker in self.fleet.language if worker.is_usable]
        vision = [worker.status for worker in self.fleet.vision if worker.is_usable]
        return Places(
            requests=self._share(sum(status.language.max_num_waiting for status in language if status is not None)),
            tiles=self._share(sum(status.vision.max_queued_tiles for status in vision if status is not None)),
        )

    def _share(self, places: int) -> int:
        return share(places, self.settings.workers)

    def _make_routes(self) -> list[Route]:
        media = (self.named_media, self._cut_off, self._fetcher)
        parts = (self.fleet, self.models, self.admission, self.settings, *media)
        return [
            Route("/v1/chat/completions", ChatEndpoint(*parts), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(*parts), methods=["POST"]),
            Route("/tokenize", TokenizeEndpoint(*parts), methods=["POST"]),
            Route("/detokenize", DetokenizeEndpoint(*parts), methods=["POST"]),
            Route("/v1/models", ListModels(self.models), methods=["GET"]),
            Route("/v1/models/{model_id:path}", GetModel(self.models), methods=["GET"]),
            Route("/live", system.Live(), methods=["GET"]),
            Route("/health", system.Health(lambda: self.is_ready), methods=["GET"]),
            Route("/health/deep", self._make_deep_health(), methods=["GET"]),
            Route("/metrics", system.Metrics(*self._compatible_metrics()), methods=["GET"]),
            Route("/load", system.Load(lambda: self.admission.num_running), methods=["GET"]),
            Route("/version", system.Version(), methods=["GET"]),
            *self._make_docs(),
            *self._make_playground(),
        ]

    def _make_playground(self) -> list[Route]:
        if self._playground is None:
            return []
        view = PipelineView(self.fleet, self.admission, self._recent, self._state)
        return [
            Route("/", self._playground, methods=["GET"]),
            Route("/ui/{name}", self._playground, methods=["GET"]),
            Route("/pipeline", view, methods=["GET"]),
        ]

    def _state(self) -> str:
        return "draining" if self.is_draining else "ready" if self.is_ready else "starting"

    def _make_docs(self) -> list[Route]:
        if self.settings.disable_docs:
            return []
        document = describe(has_keys=bool(self._tenants), has_playground=self._playground is not None)
        return [
            Route("/openapi.json", StaticPage.json(document), methods=["GET"]),
            Route("/docs", StaticPage.html(render(document)), methods=["GET"]),
        ]

    def _below_root(self, path: str) -> str:
        """A proxy may have taken the root path away, or not."""
        root = self.settings.root_path
        return path[len(root) :] if root and path.startswith(f"{root}/") else path

    def _make_deep_health(self) -> DeepHealth:
        def refusal() -> DvdError | None:
            if self.is_draining:
                return draining()
            return None if self.is_ready else not_ready()

        return DeepHealth(self.fleet, self.admission, self.settings, refusal)

    def _compatible_metrics(self) -> list[Collector]:
        if self.settings.metrics_compat is None:
            return []
        return [VllmMetrics(self.admission, self.fleet, lambda: next(iter(self.models.names), ""))]

    def _check_headers(self, exchange: Exchange) -> None:
        raw = exchange.headers.raw
        num_bytes = sum(len(name) + len(value) for name, value in raw)
        if len(raw) > self.settings.max_headers or num_bytes > self.settings.max_header_bytes:
            raise HeadersTooLarge("the headers are too large")

    def _check_key(self, exchange: Exchange) -> Tenant | None:
        """Every route needs a key unless listed open; the path is the one that routes, never rebuilt from ``Host``."""
        if not self._tenants or exchange.path in self._open_paths:
            return None
        scheme, _, token = exchange.headers.get("authorization", "").partition(" ")
        tenant = self._tenants.find(token.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            metrics.AUTH_FAILURES.labels("http").inc()
            raise AuthenticationFailed("a valid API key is required")
        exchange.tenant = tenant.scope
        return tenant

    def _check_quota(self, exchange: Exchange, tenant: Tenant | None) -> None:
        """Whatever makes work counts; looking does not."""
        if tenant is not None and tenant.meter is not None and exchange.method == "POST":
            exchange.meter = tenant.meter
            exchange.grant = tenant.meter.enter(time.monotonic())

    def _check_drain(self, exchange: Exchange) -> None:
        if self.is_draining and exchange.method == "POST":
            metrics.ADMISSION_REJECTIONS.labels("text", "draining").inc()
            raise draining()

    def _count(self, exchange: Exchange) -> None:
        status = exchange.status or 0
        method = exchange.method if exchange.method in _METHODS else "other"
        metrics.HTTP_REQUESTS.labels(self._route_of(exchange.path), method, status).inc()
        for record in (exchange.record, *exchange.other_records):
            record.finish(status, exchange.code)
        self._recent.end(exchange)

    def _route_of(self, path: str) -> str:
        """A label out of a closed set."""
        known = {route.path for route in self._routes.routes if isinstance(route, Route)}
        if path.startswith("/v1/models/"):
            return "/v1/models/{id}"
        return path if path in known else "other"

    def _export_gauges(self) -> None:
        metrics.BUILD_INFO.labels(version("dvd-serve"), str(frame.VERSION)).set(1)
        metrics.set_model(next(iter(self.models.names), ""))
        metrics.set_state("starting")
        metrics.NAMED_MEDIA_BYTES.set_function(lambda: self.named_media.num_bytes)
        metrics.REQUESTS_RUNNING.set_function(lambda: self.admission.num_running)
        metrics.REQUESTS_WAITING.labels("budget").set_function(lambda: self.fleet.turns.num_waiting)
        metrics.REQUESTS_WAITING.labels("language").set_function(
            lambda: self.admission.num_waiting - self.fleet.turns.num_waiting
        )


def _limits(settings: RouterSettings) -> AdmissionLimits:
    return AdmissionLimits(
        max_waiting={
            "text": share(settings.max_num_queued_reqs, settings.workers),
            "image": share(settings.max_num_queued_image_reqs, settings.workers),
        },
        max_held_bytes=share(settings.max_held_body_bytes, settings.workers),
        max_tokens=share(settings.max_num_queued_tokens, settings.workers),
        max_wait=settings.max_queue_time or inf,
    )
