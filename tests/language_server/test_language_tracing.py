"""Spans of a call, beneath those of the request it is for: admission, features, and the stages of every choice."""

from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.service import tracing
from tests.language_server.conftest import make_request
from tests.language_server.messages import message

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
MILLISECOND = 10**6


async def test_stages_are_spans(system, images):
    request = make_request([message("user", 0, "describe")], images[:1], n=2)
    memory = InMemorySpanExporter()
    with tracing.processed(SimpleSpanProcessor(memory), "language server"):
        reply = await system.generate(request, images[:1], metadata=(("traceparent", PARENT),))
        await system.at_rest()
    spans: Any = memory.get_finished_spans()
    stages = ["language.queue", "prefill", "decode"]
    assert [span.name for span in spans] == ["language.admit", "feature.transfer", *stages, *stages]
    for span in spans:
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == ("a" * 32, "b" * 16)
    assert spans[0].attributes["dvd.images"] == 1
    for index in range(2):
        queue, prefill, decode = spans[2 + 3 * index : 5 + 3 * index]
        finished = reply.finished[index]
        assert queue.attributes["dvd.choice"] == prefill.attributes["dvd.choice"] == index
        assert decode.attributes["dvd.tokens"] == finished.usage.completion_tokens
        for span, told in ((prefill, finished.timings.prefill_ms), (decode, finished.timings.decode_ms)):
            assert (span.end_time - span.start_time) / MILLISECOND == pytest.approx(told, abs=0.1)
