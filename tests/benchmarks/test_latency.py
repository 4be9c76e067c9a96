"""The table of the README: its rows, each warmed up before it is measured, and its figures."""

import pytest

from benchmarks.arrivals import ClosedLoop
from benchmarks.latency import CASES, _row, make_plan, print_table
from benchmarks.plan import Phase, Source
from benchmarks.samples import Failure, PhaseResult
from common.service.errors import Unavailable
from tests.benchmarks.conftest import TEXT, sample


def result_of(*samples) -> PhaseResult:
    phase = Phase("448 px, 2 at a time", (Source("448 px", ClosedLoop(2), TEXT, len(samples)),))
    return PhaseResult(phase, 0.0, 10.0, list(samples))


def test_every_row_is_warmed_up():
    phases = make_plan([1, 8], 24, 16).phases
    assert [phase.name for phase in phases[:4]] == [
        "warm-up of text only, 1 at a time",
        "text only, 1 at a time",
        "warm-up of text only, 8 at a time",
        "text only, 8 at a time",
    ]
    assert len(phases) == 2 * 2 * len(CASES)
    assert [phase.sources[0].num_requests for phase in phases[:4]] == [1, 24, 8, 24]
    sides = [phase.sources[0].workload.image_sizes[0][0].width for phase in phases if phase.sources[0].workload]
    assert sides[4:] == [448] * 4 + [896] * 4
    assert all(phase.sources[0].workload.ignore_eos for phase in phases)


def test_medians(capsys):
    told = {"decode_ms": 1.0, "vision_queue_ms": 2.0, "encode_ms": 30.0, "transfer_ms": None, "prefill_ms": 40.0}
    samples = [sample(1.0, ttft, metrics={"dvd": told}, source="448 px") for ttft in (0.1, 0.2, 0.9)]
    row = _row(result_of(*samples))
    assert row.requests_per_second == pytest.approx(0.3)
    assert row.time_to_first_token == pytest.approx(200)
    assert row.time_per_output_token == pytest.approx(20)
    assert row.stages == {"vision": 33.0, "language": 40.0}
    print_table([row])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].strip("│").split("│")]
    assert cells == ["448 px", "2", "0.30", "200", "20.0", "33.0", "-", "40.0"]


def test_a_failed_request_spoils_the_row():
    with pytest.raises(Unavailable, match="448 px, 2 at a time: a request failed: timeout"):
        _row(result_of(sample(1.0, failure=Failure("timeout"))))
