"""Definitions: which requests count for what, and what each figure is (API.md section 10)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measures import distribution, meets, summarize
from benchmarks.samples import Failure, PhaseResult
from tests.benchmarks.conftest import phase_result, sample

LOST = Failure("connect", "ServerDisconnectedError")
values = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def only(result: PhaseResult, **options):
    (summary,) = summarize(result, **options)
    return summary


@settings(deadline=None)
@given(values, st.floats(0, 100))
def test_percentiles_interpolate_between_the_two_nearest(found, percentile):
    """Of n sorted values, the p-th percentile lies at rank (n - 1) p / 100."""
    spread = distribution(found, [percentile])
    assert spread is not None
    rank = (len(found) - 1) * percentile / 100
    ordered = sorted(found)
    below, above = ordered[int(rank)], ordered[min(int(rank) + 1, len(found) - 1)]
    assert spread[percentile] == pytest.approx(below + (above - below) * (rank - int(rank)), abs=1e-6, rel=1e-9)


def test_of_nothing_there_is_no_distribution():
    assert distribution([]) is None


@settings(deadline=None)
@given(st.floats(0.01, 10), st.lists(st.floats(0, 5), min_size=1, max_size=20))
def test_tpot_is_what_remains_after_the_first_token_over_the_other_tokens(ttft, gaps):
    one = sample(0.0, ttft, tuple(gaps))
    assert one.tpot == pytest.approx((one.e2e - ttft) / len(gaps), abs=1e-9)
    assert sample(0.0, ttft, ()).tpot is None


def test_latencies():
    result = phase_result(sample(1.0, 0.1, (0.02, 0.04)), sample(2.0, 0.3, ()))
    summary = only(result)
    assert summary.ttft.mean == pytest.approx(200)
    assert summary.ttft[99] == pytest.approx(298)
    assert (summary.itl.count, summary.itl.mean) == (2, pytest.approx(30))
    assert (summary.tpot.count, summary.tpot.mean) == (1, pytest.approx(30))
    assert summary.e2el.mean == pytest.approx((160 + 300) / 2)


def test_rates_count_what_ended_inside_and_latencies_what_was_sent_inside():
    before = sample(-1.0, 0.5, (0.4, 0.4))  # sent in the warm-up, ended inside
    inside = sample(2.0, 0.1)
    late = sample(9.5, 1.0)  # sent inside, ended after
    warm_up = sample(-3.0, 0.1)
    summary = only(phase_result(warm_up, before, inside, late))
    assert (summary.num_sent, summary.num_completed, summary.num_late) == (2, 2, 1)
    assert summary.requests_per_s == pytest.approx(0.2)
    assert summary.output_tokens_per_s == pytest.approx(0.6)
    assert summary.total_tokens_per_s == pytest.approx(2.6)
    assert summary.ttft.count == 2
    assert summary.ttft[50] == pytest.approx(550)


def test_failures_count_for_nothing_but_failures():
    result = phase_result(
        sample(1.0), sample(2.0, failure=LOST), sample(3.0, failure=Failure("http_status", "503 overloaded")),
        sample(4.0, failure=LOST), sample(-1.0, failure=LOST),
    )  # fmt: skip
    summary = only(result, goodput={"ttft": 1e6})
    assert (summary.num_sent, summary.num_failed, summary.num_completed) == (4, 3, 1)
    assert summary.failures == {"connect ServerDisconnectedError": 2, "http_status 503 overloaded": 1}
    assert summary.ttft.count == summary.itl.count / 2 == 1
    assert summary.goodput_per_s == summary.requests_per_s == pytest.approx(0.1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 2)), max_size=20), st.floats(0, 3000), st.floats(0, 3000))
def test_goodput_grows_with_its_limits_up_to_the_rate(requests, limit, other):
    result = phase_result(*(sample(at, ttft) for at, ttft in requests))
    tight, loose = sorted((limit, other))
    goodputs = [only(result, goodput={"ttft": each, "e2el": each}).goodput_per_s for each in (tight, loose, 1e9)]
    assert goodputs == sorted(goodputs)
    assert goodputs[-1] == only(result).requests_per_s


def test_all_limits_must_be_met():
    one = sample(0.0, 0.1, (0.02, 0.04))  # 100 ms, 30 ms a token, 160 ms
    assert meets(one, {"ttft": 100.1, "tpot": 30.1, "e2el": 160.1})
    assert not meets(one, {"ttft": 99})
    assert not meets(one, {"ttft": 1000, "tpot": 29})
    assert not meets(one, {"e2el": 159})
    assert meets(sample(0.0, 0.1, ()), {"tpot": 0.001})  # one token has no time per further token
    assert only(phase_result(one)).goodput_per_s is None


def test_in_flight():
    result = phase_result(sample(0.0, 4.0, ()), sample(2.0, 4.0, ()), sample(6.0, 8.0, ()))
    summary = only(result)
    assert summary.peak_in_flight == 2  # as one ends the next begins
    assert summary.mean_in_flight == pytest.approx((4 + 4 + 4) / 10)  # clipped to the window


def test_the_best_second():
    result = phase_result(sample(1.0, 0.1, (0.1,) * 5), sample(1.2, 0.1, (0.1,) * 5), sample(5.0))
    assert only(result).peak_output_tokens_per_s == 12


def test_the_client_accounts_for_itself():
    held = sample(3.0, scheduled_at=1.0, queue=1.5)
    assert held.lag == pytest.approx(0.5)
    summary = only(phase_result(held))
    assert summary.client_queue.mean == pytest.approx(1500)
    assert summary.client_lag.mean == pytest.approx(500)


def test_images_and_stages():
    told = {"dvd": {"images": 2, "tiles": 10, "encode_ms": 7.0, "prefill_ms": 3.0, "decode_ms": None}}
    result = phase_result(sample(1.0, num_images=2, image_tokens=2560, metrics=told))
    summary = only(result)
    assert (summary.images_per_s, summary.tiles_per_s, summary.image_tokens_per_s) == (0.2, 1.0, 256.0)
    assert set(summary.stages) == {"encode_ms", "prefill_ms"}
    peer = only(phase_result(sample(1.0, num_images=2)))
    assert (peer.images_per_s, peer.tiles_per_s, peer.image_tokens_per_s, peer.stages) == (0.2, None, None, {})


def test_several_sources_have_a_sum_first():
    result = phase_result(sample(1.0), sample(2.0), sample(3.0, source="images"))
    result.num_unsent.update({"text": 2, "images": 1})
    whole, text, images = summarize(result)
    assert [each.label for each in (whole, text, images)] == ["load", "load: text", "load: images"]
    assert [each.num_completed for each in (whole, text, images)] == [3, 2, 1]
    assert [each.num_unsent for each in (whole, text, images)] == [3, 2, 1]


def test_nothing_at_all():
    summary = only(phase_result())
    assert (summary.num_sent, summary.requests_per_s, summary.ttft, summary.mean_prompt_tokens) == (0, 0.0, None, None)


def test_asked_percentiles_and_the_two_always_needed():
    spread = only(phase_result(sample(1.0)), percentiles=[75, 99.9]).ttft
    assert list(spread.percentiles) == ["p50", "p75", "p99", "p99.9"]
    assert np.isfinite(list(spread.percentiles.values())).all()
