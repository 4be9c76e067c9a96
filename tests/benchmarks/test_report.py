"""Two files for one run: JSON from which every figure can be computed again, and a page that needs nothing else."""

import json
import re
from collections import Counter

import pytest

from benchmarks.arrivals import ClosedLoop
from benchmarks.measures import PERCENTILES, summarize
from benchmarks.plan import Phase, Plan, Source
from benchmarks.report import COLUMNS, write_report
from benchmarks.samples import Failure, PhaseResult, Result
from benchmarks.tables import tables
from tests.benchmarks.conftest import TEXT, sample

TOLD = {"dvd": {"images": 1, "tiles": 5, "encode_ms": 40.0, "feature_wait_ms": 60.0, "prefill_ms": 80.0}}


def result_of(*samples, model: str = "nano") -> Result:
    names = dict.fromkeys(each.source for each in samples)
    phase = Phase("load", tuple(Source(name, ClosedLoop(2), TEXT) for name in names), 10.0)
    unsent: Counter[str] = Counter()
    found = PhaseResult(phase, 100.0, 110.0, list(samples), unsent)
    return Result(Plan((phase,)), "http://127.0.0.1:1", model, "2026-11-23T00:00:00+00:00", 0.25, [found])


def write(folder, result: Result):
    summaries = [summary for phase in result.phases for summary in summarize(phase)]
    found = tables(result.plan, summaries, PERCENTILES)
    return write_report(folder, "dvd bench serve --seed 1", "seed: 1\n", result, summaries, found)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    result = result_of(
        sample(101.0, num_images=1, metrics=TOLD, source="images"),
        sample(102.0, 0.3, (0.01, 0.0)),
        sample(103.0, failure=Failure("http_status", "503 overloaded", "<script>alert(1)</script>")),
    )
    raw, page = write(tmp_path_factory.mktemp("results") / "new", result)
    return json.loads(raw.read_bytes()), page.read_text("utf-8"), raw, page


def test_the_raw_figures(written):
    record, _, raw, page = written
    assert raw.stem == page.stem
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}-bench-serve", raw.stem)
    assert record["command"] == "dvd bench serve --seed 1"
    assert {"time", "commit", "versions", "hardware", "options", "load", "summaries", "timelines"} <= set(record)
    assert record["request_columns"] == list(COLUMNS)
    first, second, third = (dict(zip(COLUMNS, row, strict=True)) for row in record["requests"]["load"])
    assert (first["source"], first["sent_ms"], first["ttft_ms"], first["e2e_ms"]) == ("images", 1000, 100, 140)
    assert first["stages"] == {"encode_ms": 40, "feature_wait_ms": 60, "prefill_ms": 80, "tiles": 5}
    assert second["itl_ms"] == [10, 0]
    assert third["failure"].startswith("http_status 503 overloaded: <script>")


def test_a_request_is_one_line_of_the_file(written):
    _, _, raw, _ = written
    assert sum(line.startswith('   ["') for line in raw.read_text().splitlines()) == 3


def test_the_page_stands_alone(written):
    _, page, _, _ = written
    assert not re.search(r"""(?:src|href|url|action|data)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<(?:script|link|iframe|img|object|embed|base|form)\b|@import|@font-face", page)
    references = re.findall(r'xlink:href="([^"]*)"', page)
    assert references and all(each.startswith("#") for each in references)


def test_the_page_shows_every_picture_and_table(written):
    _, page, _, _ = written
    assert page.count("<svg") == 3
    for words in ("Latency by percentile", "First token by stage", "Timeline", "Throughput", "Failures", "dvd bench"):
        assert words in page
    assert "milliseconds" in page and "seconds since the window opened" in page
    assert "1 of 2 requests failed" in page


def test_words_of_strangers_are_only_words(tmp_path):
    _, page = write(tmp_path, result_of(sample(101.0), model="<img src=x>"))
    text = page.read_text("utf-8")
    assert "&lt;img src=x&gt;" in text
    assert "<img" not in text


def test_colours_belong_to_the_page(written):
    """So that one page is readable on light and on dark."""
    _, page, _, _ = written
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", pictures) == []
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", page))
    assert used <= set(re.findall(r"(--[a-z0-9]+):", page))


def test_a_run_in_which_nothing_came_through(tmp_path):
    lost = sample(101.0, failure=Failure("timeout"))
    lost.first_at = None
    raw, page = write(tmp_path, result_of(lost))
    assert json.loads(raw.read_bytes())["summaries"][0]["num_failed"] == 1
    assert "timeout" in page.read_text("utf-8")


def test_a_thousand_requests_are_light(tmp_path):
    samples = [sample(100 + index / 101, 0.1 + index / 1e4, (0.02,) * 63, metrics=TOLD) for index in range(1000)]
    raw, page = write(tmp_path, result_of(*samples))
    assert page.stat().st_size < 2**20
    assert raw.stat().st_size < 2**20
