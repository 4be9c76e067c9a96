"""AIPerf profiles streamed chats about images: no errors, its figures and ours are in its exports."""

import json

from tests.clients.conftest import run_shown


def test_a_profile_without_errors(nano, tmp_path):
    run_shown("aiperf", nano.address, tmp_path)
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert (report["was_cancelled"], report["error_summary"]) == (False, [])
    assert (report["request_count"]["avg"], report["request_error_rate"]["avg"]) == (6, 0)
    assert report["num_images"]["sum"] == 6
    assert report["usage_prompt_tokens"]["min"] > 256
    assert report["output_sequence_length"]["min"] == report["output_sequence_length"]["max"] == 8
    assert 0 < report["time_to_first_token"]["min"] < report["request_latency"]["max"]
    assert report["inter_chunk_latency"]["count"] == 6 * 7  # one token an event

    servers = json.loads((tmp_path / "server_metrics_export.json").read_text())
    assert servers["summary"]["endpoints_successful"] == [f"{nano.address}/metrics"]
    assert "dvd_request_success" in servers["metrics"]
