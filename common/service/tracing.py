"""Spans of requests, sent to a collector over OTLP (API.md section 9). Off, and not even imported, unless asked for.

The span of a request begins when it comes in and is carried to the servers in W3C's ``traceparent``. All others are
made when a piece of work is at its end, of times that are taken in any case: nothing on the way of a token knows of
them. Spans are sent by a thread of their own, and dropped when nobody takes them.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from common.service import metrics
from common.service.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

Attribute: TypeAlias = str | int | float | bool

_EXPORT_SECONDS: Final = 1.0
"""For one batch. Whatever is left when a program ends costs it no more than a few of these."""
_CARRIED: Final = ("traceparent", "tracestate")
_MAX_STATE_CHARS: Final = 512
"""What every vendor must pass on, says W3C. Longer ones are left out: gRPC has limits that a client must not reach."""

_tracer: "Tracer | None" = None
_request: ContextVar["Span | None"] = ContextVar("request span", default=None)


@contextmanager
def exported(endpoint: str | None, service: str) -> Iterator[None]:
    """Send the spans of this process to ``endpoint`` (``http://host:4317``) while inside; None: make none.

    Raises:
        ConfigError: what it takes is not installed.
    """
    if endpoint is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("--otlp-traces-endpoint needs more: pip install 'dvd-serve[tracing]'") from None
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_SECONDS
    )
    with processed(BatchSpanProcessor(_counting(exporter)), service):
        yield


@contextmanager
def processed(processor: "SpanProcessor", service: str) -> Iterator[None]:
    """Hand the spans of this process to ``processor`` while inside."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    global _tracer
    resource = Resource({"service.name": f"dvd-{service.replace(' ', '-')}"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("dvd")
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


# --- the span of a request, in the router


def begin_request(name: str, headers: Mapping[str, str], started: float) -> None:
    """This task, and those it starts, work for a request that came in at ``started``, monotonic seconds."""
    if _tracer is not None:
        said = [(key, headers.get(key, "")) for key in _CARRIED]
        kept = [(key, value) for key, value in said if len(value) <= _MAX_STATE_CHARS]
        _request.set(_tracer.start_span(name, parent_of(kept), start_time=_epoch_ns(started)))


def describe_request(**attributes: Attribute) -> None:
    """What has become known of it. Dots are written as double underscores."""
    span = _request.get()
    if span is not None:
        span.set_attributes(_dotted(attributes))


def end_request(error: str | None, **attributes: Attribute) -> None:
    """It is over, with the code of an error or without."""
    span = _request.get()
    if span is None or not span.is_recording():  # of several prompts, the first one's end is told
        return
    from opentelemetry.trace import StatusCode

    describe_request(**attributes)
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()
    _request.set(None)


def outgoing() -> Sequence[tuple[str, str]]:
    """Metadata that carry the request's trace to another server; none while there is none."""
    span = _request.get()
    if span is None:
        return ()
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return tuple(carrier.items())


# --- the spans of its parts, in all programs


def parent_of(metadata: Iterable[tuple[str, Any]] | None) -> "Context | None":
    """Where spans of a call belong; None while there are none to make. What is malformed begins a trace."""
    if _tracer is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key: value for key, value in metadata or () if key in _CARRIED and isinstance(value, str)}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def span(
    name: str, started: float | None, ended: float | None, parent: "Context | None" = None, **attributes: Attribute
) -> None:
    """Something that took from ``started`` to ``ended``, monotonic seconds; None: it did not happen.

    Args:
        parent: see ``parent_of``; None: the request of this task.
    """
    if _tracer is None or started is None or ended is None:
        return
    if parent is None:
        from opentelemetry.trace import set_span_in_context

        request = _request.get()
        if request is None:
            return
        parent = set_span_in_context(request)
    start = _epoch_ns(started)
    made = _tracer.start_span(name, parent, attributes=_dotted(attributes), start_time=start)
    made.end(start + round((ended - started) * 1e9))


def _dotted(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {name.replace("__", "."): value for name, value in attributes.items()}


def _epoch_ns(monotonic: float) -> int:
    return time.time_ns() + round((monotonic - time.monotonic()) * 1e9)


def _counting(exporter: "SpanExporter") -> "SpanExporter":
    """``exporter``, and a count of what it could not deliver. What is made faster than sent is dropped before it."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Counting(SpanExporter):
        def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
            result = exporter.export(spans)
            if result is not SpanExportResult.SUCCESS:
                metrics.SPANS_DROPPED.inc(len(spans))
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Counting()
