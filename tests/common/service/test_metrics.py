"""Metrics: one declaration each, a tier exports its own families only, every sample says which model it speaks of."""

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.service import metrics


def families(text: str) -> dict:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize(
    ("tier", "has", "lacks"),
    [
        ("router", "dvd_requests_running", "dvd_vision_items_running"),
        ("vision", "dvd_vision_items_running", "dvd_language_requests_running"),
        ("language", "dvd_language_requests_running", "dvd_requests_running"),
    ],
)
def test_a_tier_exports_its_own_families(tier, has, lacks):
    found = families(metrics.exposition(tier).decode())
    assert has in found
    assert lacks not in found
    assert "process_resident_memory_bytes" in found


def test_every_sample_names_the_model():
    metrics.set_model("nano")
    metrics.VISION_TILES.labels("256").inc(0)
    for family in families(metrics.exposition("vision").decode()).values():
        assert all(sample.labels["model"] == "nano" for sample in family.samples)


def test_names_follow_the_rules():
    for tier in ("router", "vision", "language"):
        for name, family in families(metrics.exposition(tier).decode()).items():
            assert name.startswith(("dvd_", "process_", "python_"))
            if family.type == "histogram" and "seconds" not in name:
                assert name.endswith(("_tokens", "_images", "_tiles", "_items", "_requests", "_n"))


def test_the_endpoint_of_a_worker_serves_them():
    address = metrics.start_server("127.0.0.1:0", "language")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        assert "dvd_language_requests_running" in families(answer.read().decode())
