"""GuideLLM benchmarks with images: every request succeeds, its report has the figures; or it says what failed."""

import json
from pathlib import Path
from typing import Any

from tests.clients.conftest import run_shown


def report(out: Path) -> dict[str, Any]:
    """Its only benchmark."""
    (benchmark,) = json.loads((out / "guidellm.json").read_text())["benchmarks"]
    return benchmark


def totals(benchmark: dict[str, Any]) -> dict[str, int]:
    """What became of the requests. Its metrics may leave out the last one, heard of as the measurement ended."""
    state = benchmark["scheduler_state"]
    return {name: state[f"{name}_requests"] for name in ("successful", "errored", "cancelled")}


def test_all_requests_succeed(nano, tmp_path):
    run_shown("guidellm", nano.address, tmp_path, HF_HUB_OFFLINE="1")
    benchmark = report(tmp_path)
    assert totals(benchmark) == {"successful": 6, "errored": 0, "cancelled": 0}
    metrics = benchmark["metrics"]
    assert metrics["request_totals"]["errored"] == metrics["request_totals"]["incomplete"] == 0
    assert metrics["prompt_token_count"]["successful"]["min"] > 256
    assert metrics["output_token_count"]["successful"]["min"] == 8
    assert metrics["output_token_count"]["successful"]["max"] == 8
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["mean"] > 0
    timings = [request["info"]["timings"] for request in benchmark["requests"]["successful"]]
    assert {timing["token_iterations"] for timing in timings} == {8}  # one token an event
