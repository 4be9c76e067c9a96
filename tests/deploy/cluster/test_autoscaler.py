"""The sizes of groups follow their load, within bounds, and do not flap."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from deploy.cluster.autoscaler import Autoscaler, Rules, language_demand, vision_demand
from protos.status_pb2 import LanguageLoad, VisionLoad

RULES = Rules(
    min_size=1, max_size=8, hysteresis=0.2, confirmations=3, cooldown_up=5.0, cooldown_down=20.0, max_step_up=4
)
rules = st.builds(
    lambda least, extra, **rest: Rules(min_size=least, max_size=least + extra, **rest),
    least=st.integers(1, 5),
    extra=st.integers(0, 12),
    hysteresis=st.floats(0, 0.9),
    confirmations=st.integers(1, 5),
    cooldown_up=st.floats(0, 30),
    cooldown_down=st.floats(0, 60),
    max_step_up=st.integers(1, 5),
)
demands = st.floats(0, 40)


def sizes(scaler: Autoscaler, demand: float, size: int, until: float, since: float = 0.0) -> list[int]:
    """One observation a second; everything ordered arrives at once."""
    found = []
    for second in range(int(since), int(until)):
        size = scaler.observe(float(second), size, size, demand)
        found.append(size)
    return found


def test_it_grows_after_confirmations_and_cooldown_by_at_most_a_step():
    assert sizes(Autoscaler(RULES, 0.0), 7.5, 1, 16) == [1] * 5 + [5] * 5 + [8] * 6
    assert sizes(Autoscaler(RULES, -100.0), 2.5, 1, 5) == [1, 1, 3, 3, 3]


def test_it_shrinks_one_by_one_and_keeps_spare_capacity():
    found = sizes(Autoscaler(RULES, 0.0), 2.3, 5, 100)
    assert sorted(set(found)) == [3, 4, 5]  # 3 * 0.8 = 2.4 is enough, 2 * 0.8 = 1.6 is not
    assert found.index(4) == 20
    found = sizes(Autoscaler(RULES, 0.0), 0.0, 3, 100)
    assert [found.index(size) for size in (3, 2, 1)] == [0, 20, 40]


def test_a_peak_within_the_cooldown_keeps_the_size():
    scaler = Autoscaler(RULES, -100.0)
    for second in range(100):
        assert scaler.observe(float(second), 3, 3, 3.0 if second % 15 == 0 else 0.0) == 3


def test_what_was_ordered_must_arrive_first():
    scaler = Autoscaler(RULES, -100.0)
    assert [scaler.observe(float(second), 2, 1, 6.0) for second in range(10)] == [2] * 10
    assert scaler.observe(10.0, 2, 2, 6.0) == 6


def test_an_unknown_load_changes_nothing():
    scaler = Autoscaler(RULES, -100.0)
    assert [scaler.observe(float(second), 3, 3, None) for second in range(60)] == [3] * 60
    assert [scaler.observe(60.0 + index, 3, 3, demand) for index, demand in enumerate([9.0, 9.0, None, 9.0, 9.0])] == [
        3
    ] * 5


@given(rules, st.lists(st.tuples(st.floats(0.01, 30), demands | st.none(), st.booleans()), max_size=60), st.data())
def test_never_out_of_bounds_and_cooldowns_hold(given_rules, steps, data):
    size = data.draw(st.integers(given_rules.min_size, given_rules.max_size))
    scaler = Autoscaler(given_rules, 0.0)
    now = changed_at = 0.0
    for seconds, demand, is_arrived in steps:
        now += seconds
        before = size
        size = scaler.observe(now, before, before if is_arrived else before - 1, demand)
        assert given_rules.min_size <= size <= given_rules.max_size
        assert before - 1 <= size <= before + given_rules.max_step_up
        if size != before:
            cooldown = given_rules.cooldown_up if size > before else given_rules.cooldown_down
            assert now - changed_at >= cooldown
            assert size < before or is_arrived
            changed_at = now


@given(rules, demands, st.data())
def test_a_constant_load_finds_one_size_and_keeps_it(given_rules, demand, data):
    """It may grow or shrink to get there, never both."""
    start = data.draw(st.integers(given_rules.min_size, given_rules.max_size))
    found = [start, *sizes(Autoscaler(given_rules, 0.0), demand, start, 1500)]
    directions = {after > before for before, after in itertools.pairwise(found) if after != before}
    assert len(directions) <= 1
    assert len(set(found[-100:])) == 1
    assert found[-1] >= min(demand, given_rules.max_size)


@given(rules, st.integers(-5, 40))
def test_a_size_out_of_bounds_is_brought_back(given_rules, size):
    bounded = min(max(size, given_rules.min_size), given_rules.max_size)
    if bounded != size:
        assert Autoscaler(given_rules, 0.0).observe(0.0, size, size, None) == bounded


def vision(queued: int, running: int, rate: float) -> VisionLoad:
    return VisionLoad(queued_tiles=queued, running_tiles=running, tiles_per_second=rate)


def test_vision_demand_counts_the_busy_and_the_queue():
    assert vision_demand([], 10.0) is None
    assert vision_demand([vision(0, 0, 0.0)], 10.0) == 0.0
    assert vision_demand([vision(0, 4, 20.0), vision(0, 0, 20.0)], 10.0) == 1.0
    assert vision_demand([vision(300, 4, 10.0), vision(100, 4, 30.0)], 10.0) == 2 + 400 / 200
    assert vision_demand([vision(300, 4, 0.0)], 10.0) == 1.0  # nothing was encoded yet: no rate to go by


def language(free: int, total: int, waiting: int) -> LanguageLoad:
    return LanguageLoad(free_kv_blocks=free, total_kv_blocks=total, num_waiting=waiting)


def test_language_demand_counts_kv_and_those_who_wait():
    assert language_demand([], 0.5, 4.0) is None
    assert language_demand([language(0, 0, 0)], 0.5, 4.0) == 0.0
    assert language_demand([language(50, 100, 0), language(0, 100, 6)], 0.5, 4.0) == 1.5 / 0.5 + 6 / 4
