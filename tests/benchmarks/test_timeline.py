"""A timeline loses nothing: its areas are the totals of the samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.samples import Failure
from benchmarks.timeline import timeline
from tests.benchmarks.conftest import phase_result, sample

requests = st.lists(st.tuples(st.floats(-5, 10), st.floats(0.01, 30), st.booleans()), min_size=1, max_size=20)


@settings(deadline=None)
@given(requests)
def test_areas_are_totals(found):
    samples = [sample(at, ttft, failure=Failure("timeout") if bad else None) for at, ttft, bad in found]
    result = phase_result(*samples)
    line = timeline(result, samples)
    assert sum(line.in_flight) * line.width == pytest.approx(sum(s.e2e for s in samples), rel=0.01, abs=0.1)
    assert sum(line.completed_per_s) * line.width == pytest.approx(sum(s.is_ok for s in samples), abs=0.1)
    assert sum(line.failed_per_s) * line.width == pytest.approx(sum(not s.is_ok for s in samples), abs=0.1)
    assert sum(line.output_tokens_per_s) * line.width == pytest.approx(3 * len(samples), abs=0.1)
    assert line.edges[0] <= min(s.sent_at for s in samples)
    assert line.edges[-1] >= max(10.0, *(s.ended_at for s in samples)) - 1e-6
    assert len(line.edges) <= 250


def test_in_flight_along_the_way():
    line = timeline(phase_result(closed_at=4.0), [sample(0.0, 2.0, ()), sample(1.0, 2.0, ())])
    at_half_seconds = np.interp([0.5, 1.5, 2.5, 3.5], line.edges[:-1], line.in_flight)
    assert at_half_seconds.tolist() == [1, 2, 1, 0]


def test_of_no_request():
    assert sum(timeline(phase_result(), []).in_flight) == 0
