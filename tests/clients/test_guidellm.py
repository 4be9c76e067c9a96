"""GuideLLM benchmarks with images: every request succeeds, its report has the figures."""

import json

from tests.clients.conftest import run_shown


def test_all_requests_succeed(nano, tmp_path):
    run_shown("guidellm", nano.address, tmp_path, HF_HUB_OFFLINE="1")
    (benchmark,) = json.loads((tmp_path / "guidellm.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
    assert metrics["prompt_token_count"]["successful"]["min"] > 256
    assert metrics["output_token_count"]["successful"]["max"] == 8
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["mean"] > 0
    timings = [request["info"]["timings"] for request in benchmark["requests"]["successful"]]
    assert [timing["token_iterations"] for timing in timings] == [8] * 6  # one token an event
