"""The rate is that of the last seconds, whoever asks and how often."""

import pytest

from language_server.token_rate import WINDOW_SECONDS, TokenRate


def test_it_follows_what_is_generated_and_falls_to_zero():
    rate = TokenRate()
    assert rate.observe(0.0, 0) == 0.0
    for second in range(1, 11):
        found = rate.observe(float(second), 20 * second)
    assert found == pytest.approx(20.0)
    for second in range(11, 18):
        found = rate.observe(float(second), 200)
    assert found == 0.0


def test_many_readers_do_not_shorten_the_window():
    rate = TokenRate()
    for step in range(1000):
        found = rate.observe(step * 0.01, step)
    assert found == pytest.approx(100.0)
    assert len(rate._seen) <= WINDOW_SECONDS / 0.5 + 2
