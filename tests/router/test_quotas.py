"""What a tenant may take: a minute's worth at once, then as it comes; estimates are corrected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.service.errors import RateLimited
from router.quotas import Bucket, Meter, Quota

NOW = 1000.0


def refused(call, *arguments) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        call(*arguments)
    return caught.value


def test_a_minutes_worth_at_once_then_as_it_comes():
    meter = Meter(Quota(requests_per_minute=3), NOW)
    for _ in range(3):
        meter.enter(NOW).end(0, NOW)
    error = refused(meter.enter, NOW)
    assert (error.reason, error.http_status, error.type, error.code) == (
        *("requests", 429, "rate_limit_error"),
        "rate_limit_exceeded",
    )
    assert error.retry_after == pytest.approx(20)
    assert refused(meter.enter, NOW + 19.9).retry_after == pytest.approx(0.1)
    meter.enter(NOW + 20)
    refused(meter.enter, NOW + 20)


def test_who_has_ended_makes_room_once():
    meter = Meter(Quota(max_concurrent_requests=2), NOW)
    first, _ = meter.enter(NOW), meter.enter(NOW)
    assert refused(meter.enter, NOW).reason == "concurrency"
    first.end(0, NOW)
    first.end(0, NOW)
    meter.enter(NOW)
    assert refused(meter.enter, NOW).reason == "concurrency"


def test_a_refusal_takes_nothing():
    meter = Meter(Quota(1, 10, 100, 100), NOW)
    grant = meter.enter(NOW)
    refused(meter.enter, NOW)
    assert meter.headers(NOW)["x-ratelimit-remaining-requests"] == "9"
    grant.charge(40, 90, NOW)
    assert refused(grant.charge, 10, 20, NOW).reason == "tiles"
    assert meter.headers(NOW)["x-ratelimit-remaining-tokens"] == "60"
    assert meter.num_running == 1


def test_estimates_are_corrected_at_the_end():
    meter = Meter(Quota(tokens_per_minute=100, tiles_per_minute=10), NOW)
    grant = meter.enter(NOW)
    grant.charge(80, 10, NOW)
    grant.end(30, NOW)
    assert meter.headers(NOW)["x-ratelimit-remaining-tokens"] == "70"
    assert refused(meter.enter(NOW).charge, 1, 1, NOW).reason == "tiles"


def test_what_no_server_took_costs_nothing():
    meter = Meter(Quota(tokens_per_minute=100, tiles_per_minute=10), NOW)
    grant = meter.enter(NOW)
    grant.charge(80, 10, NOW)
    grant.end(0, NOW, is_taken=False)
    meter.enter(NOW).charge(100, 10, NOW)


def test_a_reply_that_was_longer_than_said_is_paid_for_at_the_door():
    """The next request is refused before its body is read."""
    meter = Meter(Quota(tokens_per_minute=100), NOW)
    grant = meter.enter(NOW)
    grant.charge(10, 0, NOW)
    grant.end(160, NOW)
    error = refused(meter.enter, NOW)
    assert error.reason == "tokens"
    assert error.retry_after == pytest.approx(0.61 * 60)
    meter.enter(NOW + 37)


def test_more_than_a_minutes_worth_needs_a_full_bucket():
    meter = Meter(Quota(tokens_per_minute=100), NOW)
    meter.enter(NOW).charge(250, 0, NOW)
    assert refused(meter.enter, NOW + 60).reason == "tokens"
    meter.enter(NOW + 151).charge(50, 0, NOW + 151)
    assert refused(meter.enter(NOW + 160).charge, 250, 0, NOW + 160).reason == "tokens"


def test_another_quota_keeps_what_was_taken():
    meter = Meter(Quota(requests_per_minute=10), NOW)
    for _ in range(4):
        meter.enter(NOW)
    meter.set_quota(Quota(requests_per_minute=5), NOW)
    meter.enter(NOW)
    refused(meter.enter, NOW)
    meter.set_quota(Quota(), NOW)
    meter.enter(NOW)
    assert meter.headers(NOW) == {}


def test_headers_are_written_as_clients_know_them():
    meter = Meter(Quota(requests_per_minute=600, tokens_per_minute=1000), NOW)
    meter.enter(NOW).charge(1000, 0, NOW)
    assert meter.headers(NOW) == {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "599",
        "x-ratelimit-reset-requests": "100ms",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    assert meter.headers(NOW + 58.5)["x-ratelimit-reset-tokens"] == "1.5s"


def test_several_processes_grant_no_less_together():
    quota = Quota(3, 10, 1000, None)
    assert quota.divided_among(1) == quota
    assert quota.divided_among(4) == Quota(1, 3, 250, None)


@given(st.integers(1, 50), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=60))
def test_never_more_than_a_minutes_worth_and_what_came_since(per_minute, asked):
    bucket, now, taken = Bucket(per_minute, NOW), NOW, 0
    for seconds, amount in asked:
        now += seconds
        if amount <= per_minute and bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
        assert taken <= per_minute * (1 + (now - NOW) / 60) + 1e-6
