"""The trace of a request: begun by the client or here, carried to both tiers, ended with what became of it."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from common.service import tracing
from common.service.errors import InternalError
from tests.router.conftest import CHAT, png, running_system, user
from tests.router.origins import reply

TRACE, CALLER = "a" * 32, "b" * 16
HEADERS = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    memory = InMemorySpanExporter()
    with tracing.processed(SimpleSpanProcessor(memory), "router"):
        yield memory


def named(spans: InMemorySpanExporter, name: str) -> Any:
    (found,) = [span for span in spans.get_finished_spans() if span.name == name]
    return found


async def test_a_trace_is_carried_to_both_tiers(spans, system):
    answer = await system.http.post(CHAT, json={"messages": [user(png(), "x")]}, headers=HEADERS)
    await system.until_idle()
    usage = answer.json()["usage"]
    request = named(spans, "router.request")
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, CALLER)
    assert dict(request.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "dvd",
        "gen_ai.request.model": "fake",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "server.address": "language-0",
        "dvd.attempt": 0,
    }
    for server in (system.language, system.vision):
        (metadata,) = server.metadata
        assert metadata["traceparent"] == f"00-{TRACE}-{request.context.span_id:016x}-01"
        assert metadata["tracestate"] == "vendor=1"
    fetch = named(spans, "media.fetch")
    assert fetch.parent.span_id == request.context.span_id
    assert dict(fetch.attributes) == {"scheme": "data", "bytes": len(png())}
    assert request.start_time <= fetch.start_time <= fetch.end_time <= request.end_time


async def test_each_url_that_is_fetched_has_a_span(spans, origin):
    origin.answers |= {"/red": reply(png("red")), "/blue": reply(png("blue"))}
    async with running_system(fetcher=origin.fetcher(timeout=20)) as system:
        urls = [{"type": "image_url", "image_url": origin.url(path)} for path in ("/red", "/blue", "/red")]
        assert (await system.chat(messages=[user(*urls)])).status_code == 200
        assert (await system.chat(messages=[user(urls[0], png("green"))])).status_code == 200
    found: list[Any] = [
        dict(span.attributes or {}) for span in spans.get_finished_spans() if span.name == "media.fetch"
    ]
    red, blue, green = (len(png(color)) for color in ("red", "blue", "green"))
    assert sorted(span["bytes"] for span in found if span["scheme"] == "https") == sorted([red, blue, red])
    assert [span["bytes"] for span in found if span["scheme"] == "data"] == [green]
    assert "example.com" not in str(found)


async def test_a_state_too_large_for_the_servers_is_left_out(spans, system):
    state = ",".join(f"vendor{number}={'x' * 250}" for number in range(32))
    answer = await system.http.post(CHAT, json={"messages": [user("x")]}, headers={**HEADERS, "tracestate": state})
    assert answer.status_code == 200
    (metadata,) = system.language.metadata
    assert TRACE in metadata["traceparent"]
    assert "tracestate" not in metadata


async def test_without_one_each_request_begins_its_own(spans, system):
    for _ in range(2):
        await system.chat()
    await system.until_idle()
    requests: Any = spans.get_finished_spans()
    assert [span.name for span in requests] == ["router.request"] * 2
    assert [span.parent for span in requests] == [None, None]
    carried = [metadata["traceparent"].split("-")[1] for metadata in system.language.metadata]
    assert carried == [f"{span.context.trace_id:032x}" for span in requests]
    assert len(set(carried)) == 2


async def test_a_failure_is_told(spans, system):
    system.language.fail_with = InternalError("broken")
    assert (await system.chat()).status_code == 500
    await system.until_idle()
    request = named(spans, "router.request")
    assert request.attributes["error.type"] == "internal_error"
    assert request.status.status_code is StatusCode.ERROR


async def test_other_routes_and_status_streams_make_none(spans, system):
    for path in ("/health", "/metrics", "/v1/models"):
        await system.http.get(path, headers=HEADERS)
    assert spans.get_finished_spans() == ()


async def test_off_nothing_is_carried(system):
    answer = await system.http.post(CHAT, json={"messages": [user(png(), "x")]}, headers=HEADERS)
    assert answer.status_code == 200
    for server in (system.language, system.vision):
        assert not {"traceparent", "tracestate"} & server.metadata[0].keys()
