"""Threads of a step that only generates: the fewest that are nearly as quick as the best number."""

import pytest
import torch

from language_server import cpu_threads
from language_server.cpu_threads import fewest_good, tune_decode_threads
from tests.language_server.test_engine import make_engine, make_sequence


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 0.010}, 1),
        ({1: 0.030, 2: 0.026}, 1),
        ({1: 0.030, 2: 0.015}, 2),
        ({1: 0.9, 2: 0.5, 4: 0.3, 8: 0.29, 16: 0.6}, 4),
    ],
)
def test_the_fewest_within_a_tolerance_are_taken(seconds, expected):
    assert fewest_good(seconds, 1.2) == expected


def test_without_tolerance_the_quickest_is_taken():
    assert fewest_good({1: 0.030, 2: 0.029, 4: 0.031}, 1.0) == 2


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("slow", [1, 2])
def test_the_engine_is_measured_and_left_idle(two_threads, monkeypatch, slow):
    """On a clock by which steps with ``slow`` threads take ten times as long."""
    engine = make_engine()
    now = [0.0]
    step = engine.step

    def timed_step():
        now[0] += 0.1 if engine.decode_threads == slow else 0.01
        return step()

    monkeypatch.setattr(engine, "step", timed_step)
    tune_decode_threads(engine, clock=lambda: now[0])
    assert engine.decode_threads == 3 - slow
    assert not engine.has_work()
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


def test_the_number_holds_for_decode_steps_only_and_is_put_back(two_threads, monkeypatch):
    engine = make_engine()
    engine.decode_threads = 1
    seen = []
    forward = engine._runner._backbone.forward

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        return forward(*arguments)

    monkeypatch.setattr(engine._runner._backbone, "forward", watched)
    cpu_threads._start_sequences(engine)
    engine.step()
    engine.add(make_sequence(1, [20, 21, 22]))
    engine.step()
    assert seen == [1, 1, 2]
    assert torch.get_num_threads() == 2
