"""Threads of a step that only generates: the fewest that are nearly as quick as the best number."""

import pytest
import torch

from language_server import cpu_threads
from language_server.cpu_threads import tune_decode_threads
from tests.language_server.test_engine import make_engine, make_sequence


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
    threads = tune_decode_threads(engine, clock=lambda: now[0])
    assert engine.decode_threads == 3 - slow
    assert threads is not None
    assert (threads.alone, threads.shared) == (3 - slow, 3 - slow)
    assert not engine.has_work()
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


def test_an_engine_with_one_place_is_measured_too(two_threads):
    engine = make_engine(max_num_seqs=1, max_num_waiting=1)
    threads = tune_decode_threads(engine)
    assert threads is not None and threads.shared_prompts is None
    assert not engine.has_work()


@pytest.mark.parametrize(("one_thread", "prompts"), [(1.25, 1), (1.4, 2)])
def test_beside_a_vision_server_fewer_threads_are_a_bargain(two_threads, monkeypatch, one_thread, prompts):
    """For decode more often than for prompts. ``one_thread``: how many times as long steps take with one."""
    engine = make_engine()
    now = [0.0]
    step = engine.step

    def timed_step():
        now[0] += 0.01 * (one_thread if 1 in (engine.decode_threads, engine.prompt_threads) else 1)
        return step()

    monkeypatch.setattr(engine, "step", timed_step)
    threads = tune_decode_threads(engine, clock=lambda: now[0])
    assert threads is not None
    assert (threads.alone, threads.shared, engine.prompt_threads) == (2, 1, None)
    assert [threads.of_prompts(is_shared) for is_shared in (False, True)] == [None, prompts]
    assert not engine.has_work()


def test_kv_memory_without_room_for_prompts_is_no_reason_to_fail(two_threads):
    engine = make_engine(max_num_seqs=2, max_num_waiting=1, num_kv_blocks=1, block_size=256)
    assert tune_decode_threads(engine) is not None
    assert not engine.has_work()


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
