"""What people read: every figure in its place, nothing that nobody measured, and the notes that matter."""

import pytest

from benchmarks.arrivals import ClosedLoop
from benchmarks.measures import PERCENTILES, summarize
from benchmarks.plan import Phase, Plan, Source
from benchmarks.samples import Failure, PhaseResult
from benchmarks.tables import Table, number, tables
from tests.benchmarks.conftest import TEXT, phase_result, sample

PLAN = Plan(())


def found_in(*results: PhaseResult, plan: Plan = PLAN, **options) -> dict[str, Table]:
    summaries = [summary for result in results for summary in summarize(result, **options)]
    tables_of = {table.title: table for table in tables(plan, summaries, PERCENTILES)}
    for table in tables_of.values():
        assert {len(row) for row in table.rows} == {len(table.columns)}
    return tables_of


def rows_of(table: Table) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.rows}


def test_throughput_and_latency():
    found = found_in(phase_result(sample(1.0), sample(2.0)))
    assert list(found) == ["Throughput", "Latency"]
    throughput = rows_of(found["Throughput"])
    assert throughput["requests/s"] == ["0.2"]
    assert throughput["good answers"] == ["2"]
    assert not {"goodput, requests/s", "images/s", "tiles/s"} & set(throughput)
    assert rows_of(found["Latency"])["first token (TTFT)"] == ["100"] * 5
    assert "client: held back by the cap" not in rows_of(found["Latency"])


def test_what_is_shown_only_where_it_is_measured():
    told = {"dvd": {"images": 1, "tiles": 1, "prefill_ms": 90.0}}
    one = sample(1.0, num_images=1, metrics=told, queue=0.5, scheduled_at=0.5)
    found = found_in(phase_result(one, sample(2.0, failure=Failure("timeout"))), goodput={"ttft": 500})
    throughput = rows_of(found["Throughput"])
    assert (throughput["goodput, requests/s"], throughput["images/s"], throughput["tiles/s"]) == (["0.1"],) * 3
    by_stage = rows_of(found["First token by stage"])
    assert (by_stage["prefill"], by_stage["other"], by_stage["TTFT"]) == (["90"], ["10"], ["100"])
    assert found["Failures"].rows == [["load", "timeout", "1"]]
    assert "client: held back by the cap" in rows_of(found["Latency"])


def test_several_loads_have_a_column_each_and_latencies_are_not_mixed():
    result = phase_result(sample(1.0), sample(2.0, 0.3, source="images"))
    found = found_in(result)
    assert found["Throughput"].columns == ["", "load", "load: text", "load: images"]
    assert rows_of(found["Throughput"])["good answers"] == ["2", "1", "1"]
    assert {row[0] for row in found["Latency"].rows} == {"load: text", "load: images"}


def test_notes():
    held = sample(1.0, scheduled_at=0.0, queue=0.9)
    result = phase_result(held, sample(9.99))
    result.num_unsent["text"] = 7
    assert found_in(result)["Throughput"].notes == [
        "load: 1 good answers ended after the window; latencies count them, rates do not.",
        "load: the cap still held 7 arrivals back when the window closed.",
        "load: the cap binds; TTFT and E2E do not contain the wait for it.",
        "load: the client itself sent late, p99 99 ms after the due time.",
    ]
    assert found_in(phase_result())["Throughput"].notes == ["load: no answer ended inside the window; measure longer."]


def test_text_beside_images():
    names = ("text alone", "images alone", "both")
    text, images = Source("text", ClosedLoop(4), TEXT), Source("images", ClosedLoop(2), TEXT)
    alone = PhaseResult(Phase(names[0], (text,), 10.0), 0.0, 10.0, [sample(1.0), sample(2.0)])
    pictures = PhaseResult(Phase(names[1], (images,), 10.0), 0.0, 10.0, [sample(1.0, source="images")])
    slowed = [sample(1.0, 0.2, (0.03, 0.03)), sample(1.0, source="images")]
    both = PhaseResult(Phase(names[2], (text, images), 10.0), 0.0, 10.0, slowed)
    found = found_in(alone, pictures, both, plan=Plan((), compared=names))
    rows = {(row[0], row[1]): row[2:] for row in found["Text beside images"].rows}
    assert rows["text", "requests/s"] == ["0.2", "0.1", "0.50 x"]
    assert rows["text", "ITL p50, ms"] == ["20", "30", "1.50 x"]
    assert rows["text", "ITL p99, ms"] == ["20", "30", "1.50 x"]
    assert rows["images", "requests/s"] == ["0.1", "0.1", "1.00 x"]
    assert next(iter(found)) == "Text beside images"


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "-"), (0, "0"), (12345.6, "12346"), (99.96, "100"), (12.345, "12.3"), (0.01234, "0.0123"), (1e-5, "1e-05")],
)
def test_three_digits_are_enough(value, words):
    assert number(value) == words
