"""GuideLLM benchmarks with images: every request succeeds, its report has the figures; or it says what failed."""

import json
from pathlib import Path
from typing import Any

from tests.clients.conftest import run_shown


def report(out: Path) -> dict[str, Any]:
    """Its only benchmark."""
    (benchmark,) = json.loads((out / "guidellm.json").read_text())["benchmarks"]
    return benchmark


def test_all_requests_succeed(nano, tmp_path):
    run_shown("guidellm", nano.address, tmp_path, HF_HUB_OFFLINE="1")
    benchmark = report(tmp_path)
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
    assert metrics["prompt_token_count"]["successful"]["min"] > 256
    assert metrics["output_token_count"]["successful"]["max"] == 8
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["mean"] > 0
    timings = [request["info"]["timings"] for request in benchmark["requests"]["successful"]]
    assert [timing["token_iterations"] for timing in timings] == [8] * 6  # one token an event


def test_a_wrong_name_ends_in_errors_that_say_so(nano, tmp_path):
    run_shown("guidellm", nano.address, tmp_path, replace=("model=nano", "model=gpt-17"), HF_HUB_OFFLINE="1")
    benchmark = report(tmp_path)
    assert benchmark["metrics"]["request_totals"] == {"successful": 0, "errored": 6, "incomplete": 0, "total": 6}
    assert all("404" in request["info"]["error"] for request in benchmark["requests"]["errored"])
