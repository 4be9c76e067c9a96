"""Arrivals come at the rate, with the burstiness and along the ramp that was asked for; equal seeds, equal times."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import arrivals
from benchmarks.arrivals import OpenLoop, Ramp, Recorded, Replay, expected_requests, send_times

rates = st.floats(0.1, 1000)
ramps = st.builds(
    Ramp,
    st.sampled_from(["linear", "exponential"]),
    rates,
    rates,
    st.floats(0.1, 1000),
    st.sampled_from([0.5, 1.0, 4.0]),
)


def first(number: int, load: arrivals.Open, seed: int = 0, warmup: float = 0.0) -> np.ndarray:
    return np.array(list(itertools.islice(send_times(load, np.random.default_rng(seed), warmup), number)))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness):
    """Gamma of shape b: the coefficient of variation is 1/sqrt(b)."""
    gaps = np.diff(first(20_000, OpenLoop(50.0, burstiness)), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


@settings(deadline=None)
@given(st.integers(0, 2**32), rates, st.sampled_from([0.3, 1.0, 3.0]))
def test_times_rise_and_repeat_with_their_seed(seed, rate, burstiness):
    times = first(50, OpenLoop(rate, burstiness), seed)
    assert (np.diff(times) >= 0).all() and times[0] >= 0
    assert (times == first(50, OpenLoop(rate, burstiness), seed)).all()


def test_an_infinite_rate_is_all_at_once():
    assert first(5, OpenLoop(math.inf)).tolist() == [0.0] * 5


@settings(deadline=None)
@given(ramps, st.floats(0.001, 1.5))
def test_the_time_of_a_request_is_the_inverse_of_the_integral_of_the_rate(ramp, share):
    requests = share * expected_requests(ramp, ramp.seconds)
    assert expected_requests(ramp, arrivals._time_of(ramp, requests)) == pytest.approx(requests, rel=1e-6)


@settings(deadline=None)
@given(ramps)
def test_a_ramp_begins_and_ends_at_its_rates(ramp):
    moment = ramp.seconds / 1e8
    begin = expected_requests(ramp, moment) / moment
    end = (expected_requests(ramp, 2 * ramp.seconds) - expected_requests(ramp, ramp.seconds)) / ramp.seconds
    assert begin == pytest.approx(ramp.start_rate, rel=0.01)
    assert end == pytest.approx(ramp.end_rate, rel=0.01)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_sends_as_many_as_its_integral_says(strategy):
    ramp = Ramp(strategy, 100.0, 2000.0, 30.0)
    times = first(70_000, ramp)
    for seconds in (10.0, 20.0, 30.0, 40.0):
        assert (times < seconds).sum() == pytest.approx(expected_requests(ramp, seconds), rel=0.05)


@settings(deadline=None)
@given(st.sampled_from(["linear", "exponential"]), rates, rates, st.integers(1, 10_000))
def test_a_ramp_for_a_number_of_requests_sends_that_many(strategy, start, end, number):
    ramp = Ramp.for_requests(strategy, start, end, number)
    assert expected_requests(ramp, ramp.seconds) == pytest.approx(number, rel=1e-6)


def test_a_ramp_rises_after_the_warm_up():
    ramp = Ramp("linear", 10.0, 1000.0, 10.0)
    times = first(12_000, ramp, warmup=5.0)
    assert (times < 5.0).sum() == pytest.approx(50, abs=25)
    assert (times < 15.0).sum() == pytest.approx(50 + expected_requests(ramp, 10.0), rel=0.1)


def test_a_trace_is_replayed_faster():
    trace = Replay((Recorded(0.0, 1, 1), Recorded(3.0, 1, 1), Recorded(4.0, 1, 1)), speed=2.0)
    assert first(10, trace).tolist() == [0.0, 1.5, 2.0]
