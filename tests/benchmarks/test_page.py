"""The page says what the records say, and a file that is no record is named."""

import msgspec
import pytest

from benchmarks import page
from benchmarks.record import environment, write_record
from benchmarks.table18 import BASELINE
from common.service.errors import ConfigError


def test_the_page_in_the_repository_is_made_of_its_records():
    assert (page.RESULTS / "README.md").read_text("utf-8") == page.page(page.RESULTS)


def test_a_comparison_shows_its_systems_and_their_commands(tmp_path):
    runs = [
        {"system": "ours", "command": "dvd serve nano", "figures": {"requests/s": 6.0}},
        {"system": "theirs", "command": "vllm serve nano", "figures": {"requests/s": 2.0}},
    ]
    write_record(tmp_path, "compare-nano", ["--seconds", "9"], {"load": ["text: closed loop of 4"], "runs": runs})
    text = page.page(tmp_path)
    assert "`python -m benchmarks compare-nano --seconds 9`" in text
    assert "| requests/s | 6 | 2 | 3.00 x |" in text
    assert "theirs: `vllm serve nano`" in text


def test_table_18_is_compared_with_its_baseline(tmp_path):
    cells = {
        BASELINE: [{"requests_per_s": 2.0}, {"requests_per_s": 1.0}, {"requests_per_s": 0.0}],
        "+ DvD": [{"requests_per_s": 3.0}, {"requests_per_s": 2.0}, {"requests_per_s": 0.5}],
    }
    layout = {"name": "equal devices", "devices": "2 cores", "reason": "", "cells": cells}
    record = {**environment("dvd bench table18 nano"), "layouts": [layout]}
    (tmp_path / "2026-01-01-table18-nano.json").write_bytes(msgspec.json.encode(record))
    text = page.page(tmp_path)
    assert "| + DvD | 3 (1.50x) | 2 (2.00x) | 0.5 |" in text


def test_single_figures_and_lists_of_cases_are_shown(tmp_path):
    write_record(tmp_path, "engine", [], {"num_layers": 12, "step_ms": 9.5, "per_second": [1, 2]})
    write_record(tmp_path, "latency", [], [{"case": "text only", "requests_per_second": 7.5, "samples": []}])
    write_record(tmp_path, "overhead", [], [{"streams": 1, "cpu": 0.01}, {"streams": 500, "cpu": 0.25}])
    text = page.page(tmp_path)
    assert "| num layers | 12 |" in text
    assert "| text only | 7.5 |" in text
    assert "| 1 | 0.01 |" in text
    assert "| 500 | 0.25 |" in text
    assert "| per second |" not in text  # a list is no figure


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "notes.json").write_text('{"command": "x"}')
    with pytest.raises(ConfigError, match=r"notes\.json: no record of ours"):
        page.page(tmp_path)
