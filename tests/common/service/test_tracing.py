"""Spans leave the process, or are dropped and counted; a collector that is down costs nobody anything."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.service import metrics, tracing
from common.service.errors import ConfigError
from common.service.program import ServerSettings

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


class Collector(TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
        self.received.extend(request.resource_spans)
        return ExportTraceServiceResponse()

    @contextmanager
    def listening(self) -> Iterator[str]:
        server = grpc.server(ThreadPoolExecutor(1))
        add_TraceServiceServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"http://127.0.0.1:{port}"
        server.stop(None).wait()


def num_dropped() -> float:
    (family,) = metrics.SPANS_DROPPED.collect()
    return family.samples[0].value


def test_without_an_endpoint_nothing_is_imported_or_made():
    code = (
        "import sys, router.__main__\n"
        "from common.service import tracing\n"
        "with tracing.exported(None, 'router'):\n"
        "    tracing.begin_request('router.request', {}, 0.0)\n"
        "    assert not tracing.outgoing() and tracing.parent_of([]) is None\n"
        "    tracing.span('decode', 0.0, 1.0)\n"
        "    tracing.end_request(None)\n"
        "sys.exit('opentelemetry' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_collector_gets_them():
    collector = Collector()
    with collector.listening() as endpoint, tracing.exported(endpoint, "router"):
        tracing.span("prefill", 0.0, 1.0, tracing.parent_of([("traceparent", PARENT)]))
    (group,) = collector.received
    assert [attribute.value.string_value for attribute in group.resource.attributes] == ["dvd-router"]
    ((span,),) = [scope.spans for scope in group.scope_spans]
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("prefill", "a" * 32, "b" * 16)


def test_the_extra_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"dvd-serve\[tracing\]"), tracing.exported("http://127.0.0.1:1", "router"):
        raise AssertionError


def test_an_endpoint_is_a_url():
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        ServerSettings.load(["--otlp-traces-endpoint", "collector:4317"])


def test_times_and_parents_are_those_given():
    memory = InMemorySpanExporter()
    with tracing.processed(SimpleSpanProcessor(memory), "vision server"):
        parent = tracing.parent_of([("user-agent", "x"), ("traceparent", PARENT)])
        now, epoch = time.monotonic(), time.time_ns()
        tracing.span("media.decode", now - 3, now - 1, parent, dvd__item=2)
        tracing.span("vision.queue", now, None, parent)
        tracing.span("vision.encode", None, now, parent)
    made: Any
    (made,) = memory.get_finished_spans()
    assert (made.name, dict(made.attributes)) == ("media.decode", {"dvd.item": 2})
    assert made.resource.attributes["service.name"] == "dvd-vision-server"
    assert (f"{made.context.trace_id:032x}", f"{made.parent.span_id:016x}") == ("a" * 32, "b" * 16)
    assert abs(made.end_time - made.start_time - 2 * 10**9) < 1000
    assert abs(made.end_time - (epoch - 10**9)) < 10**9


def test_a_malformed_parent_begins_a_trace():
    memory = InMemorySpanExporter()
    with tracing.processed(SimpleSpanProcessor(memory), "router"):
        for header in ("", "00-1-2-3", PARENT.replace("a", "z"), f"00-{'0' * 32}-{'b' * 16}-01"):
            tracing.span("prefill", 0.0, 1.0, tracing.parent_of([("traceparent", header)]))
    made: Any = memory.get_finished_spans()
    assert [span.parent for span in made] == [None] * 4
    assert len({span.context.trace_id for span in made}) == 4


def test_what_a_caller_does_not_sample_is_not_made():
    memory = InMemorySpanExporter()
    with tracing.processed(SimpleSpanProcessor(memory), "router"):
        tracing.begin_request("router.request", {"traceparent": PARENT[:-1] + "0"}, time.monotonic())
        ((_, carried),) = tracing.outgoing()
        tracing.end_request(None)
    assert carried.endswith("-00")
    assert memory.get_finished_spans() == ()


def test_a_collector_that_is_down_costs_nothing():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    before, started = num_dropped(), time.monotonic()
    with tracing.exported(f"http://127.0.0.1:{port}", "router"):
        parent = tracing.parent_of([("traceparent", PARENT)])
        for _ in range(10):
            tracing.span("prefill", 0.0, 1.0, parent)
        assert time.monotonic() - started < 5  # none of them waited for it
    assert num_dropped() == before + 10
    assert time.monotonic() - started < 20
