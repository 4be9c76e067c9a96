"""Retries are a share of the requests, and never feed an overload."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.retry_budget import FLOOR, HEDGE_SHARE, RETRY_SHARE, WINDOW_SECONDS, RetryBudget


def spend(budget: RetryBudget, now: float, times: int = 10_000) -> int:
    return sum(budget.try_retry(now) for _ in range(times))


def test_a_small_system_may_always_retry_a_little():
    budget = RetryBudget()
    assert spend(budget, 0.0) == FLOOR
    assert spend(budget, WINDOW_SECONDS - 1) == 0
    assert spend(budget, WINDOW_SECONDS) == FLOOR


@pytest.mark.parametrize(("share", "method"), [(HEDGE_SHARE, "try_hedge"), (RETRY_SHARE, "try_retry")])
def test_a_large_one_a_share(share, method):
    budget = RetryBudget()
    for index in range(2000):
        budget.note_request(index / 1000)
    assert sum(getattr(budget, method)(2.0) for _ in range(2000)) == share * 2000


def test_hedges_leave_room_for_retries():
    budget = RetryBudget()
    for _ in range(1000):
        budget.note_request(0.0)
    assert sum(budget.try_hedge(0.0) for _ in range(1000)) == 100
    assert spend(budget, 0.0) == 100
    assert not budget.try_hedge(0.0)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.booleans()), max_size=300))
def test_the_share_holds_at_every_moment(events):
    """In any stretch of the window's length, as whole seconds are counted."""
    budget, now, requests, retries = RetryBudget(), 0.0, [], []
    for pause, is_retry in events:
        now += pause
        if is_retry:
            if budget.try_retry(now):
                retries.append(now)
        else:
            budget.note_request(now)
            requests.append(now)
        recent_retries = sum(at > now - WINDOW_SECONDS + 1 for at in retries)
        recent_requests = sum(at > now - WINDOW_SECONDS - 1 for at in requests)
        assert recent_retries <= max(FLOOR, 1 + RETRY_SHARE * recent_requests) + FLOOR
