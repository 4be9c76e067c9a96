"""Spans of an image, beneath those of the request that wants it: one for each stage that ran."""

from typing import Any

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.service import tracing
from tests.vision_server.neighbours import encoded, picture

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
HASH = bytes(range(32))


async def test_stages_are_spans(neighbourhood):
    near = await neighbourhood()
    memory = InMemorySpanExporter()
    with tracing.processed(SimpleSpanProcessor(memory), "vision server"):
        request = near.request(encoded(picture(900, 900)), image_index=3, image_hash=HASH)
        reply = await near.stub.Encode(request, timeout=30, metadata=(("traceparent", PARENT),))
        spans: Any = memory.get_finished_spans()
        assert [span.name for span in spans] == ["media.decode", "vision.queue", "vision.encode", "feature.transfer"]
        for span in spans:
            assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == ("a" * 32, "b" * 16)
            assert (span.attributes["dvd.item"], span.attributes["dvd.attempt"]) == (3, 0)
            assert (span.attributes["dvd.tiles"], span.attributes["dvd.cache_hit"]) == (reply.num_tiles, False)
        seconds = [(span.end_time - span.start_time) / 1e6 for span in spans]
        told = (reply.timings.decode_ms, reply.timings.queue_ms, reply.timings.encode_ms, reply.timings.transfer_ms)
        assert all(abs(a - b) < 0.1 for a, b in zip(seconds, told, strict=True))
        assert spans[-1].attributes["dvd.bytes"] == reply.feature_bytes
        memory.clear()
        again = near.request(encoded(picture(900, 900)), image_index=4, image_hash=HASH)
        assert (await near.stub.Encode(again, timeout=30, metadata=(("traceparent", PARENT),))).cache_hit
        assert [span.name for span in memory.get_finished_spans()] == ["feature.transfer"]
