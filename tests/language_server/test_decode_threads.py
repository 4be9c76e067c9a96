"""The number of threads follows the batch, and trying others costs little."""

from collections import Counter

import pytest

from language_server.decode_threads import DecodeThreads, fewest_good


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


def run(threads, num_sequences, seconds, num_steps=200):
    """Steps of a machine that takes ``seconds(num_threads)``; returns what was chosen."""
    chosen = []
    for _ in range(num_steps):
        chosen.append(threads.of_step(num_sequences, is_shared=False))
        threads.observe(num_sequences, chosen[-1], seconds(chosen[-1]))
    return chosen


def test_each_size_of_batch_finds_its_own():
    threads = DecodeThreads([1, 2, 4, 8, 16], alone=1, shared=1, tolerance=1.2)
    small = run(threads, 2, lambda n: 0.005 + 0.001 * n)
    large = run(threads, 40, lambda n: 0.1 / min(n, 8) + 0.0001 * n)
    assert Counter(small[20:]).most_common(1)[0][0] == 1
    assert Counter(large[60:]).most_common(1)[0][0] == 8
    # What was tried on the way is not forgotten, and others are tried seldom.
    assert Counter(run(threads, 2, lambda n: 0.005 + 0.001 * n))[1] > 180
    assert Counter(run(threads, 40, lambda n: 0.1 / min(n, 8) + 0.0001 * n))[8] > 180


def test_it_follows_histories_that_grow():
    threads = DecodeThreads([1, 2], alone=1, shared=1, tolerance=1.2)
    assert Counter(run(threads, 16, lambda n: 0.005))[1] > 190
    later = run(threads, 16, lambda n: 0.02 / n, num_steps=400)
    assert Counter(later[200:])[2] > 180


def test_a_step_that_was_held_up_changes_nothing():
    threads = DecodeThreads([1, 2], alone=2, shared=1, tolerance=1.2)
    run(threads, 4, lambda n: 0.02 / n)
    threads.observe(4, 2, 9.0)
    assert Counter(run(threads, 4, lambda n: 0.02 / n))[2] > 180


def test_beside_a_vision_server_it_stays_what_it_was():
    threads = DecodeThreads([1, 2], alone=2, shared=1, tolerance=1.2)
    run(threads, 4, lambda n: 0.02 / n)
    assert {threads.of_step(4, is_shared=True) for _ in range(100)} == {1}


def test_a_number_from_elsewhere_teaches_nothing():
    threads = DecodeThreads([1, 2], alone=2, shared=1, tolerance=1.2)
    threads.observe(4, 3, 0.001)
    assert threads.of_step(4, is_shared=False) == 2
