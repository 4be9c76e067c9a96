"""The engine runs when there is work, rests when there is none, and never outruns its readers."""

import asyncio
import dataclasses
from typing import cast

import pytest

from common.service.errors import InvalidRequest, Overloaded, Unavailable
from language_server import engine_thread
from language_server.decode_threads import DecodeThreads
from language_server.engine import EngineStats, LanguageEngine, StepOutput
from language_server.engine_thread import EngineThread
from language_server.pace import NO_LIMITS
from language_server.sequence import SamplingParams, Sequence, SequenceStatus
from tests.language_server.conftest import eventually

NO_STATS = EngineStats(**{field.name: 0 for field in dataclasses.fields(EngineStats)})


class FakeEngine:
    """Makes one token per sequence and step, once it is told that there is something to run."""

    def __init__(self):
        self.sequences = {}
        self.num_steps = 0
        self.is_ready = True
        self.failure = None
        self.has_run = False
        self.allowed = []
        self.num_prefill_tokens = 0
        self.decode_threads = None

    def add(self, sequence):
        if self.failure is not None:
            raise self.failure
        self.sequences[sequence.seq_id] = sequence

    def abort(self, seq_id):
        self.sequences.pop(seq_id, None)

    def has_work(self):
        return bool(self.sequences)

    def step(self, limits=NO_LIMITS):
        self.num_steps += 1
        self.allowed.append(limits.image_tokens)
        self.has_run = self.is_ready and self.has_work()
        if not self.has_run:
            return []
        for sequence in self.sequences.values():
            sequence.status = SequenceStatus.RUNNING
        return [StepOutput(seq_id, token_id=self.num_steps) for seq_id in self.sequences]

    def stats(self):
        num_decodes = int(self.has_run)
        return dataclasses.replace(
            NO_STATS, num_step_tokens=num_decodes + self.num_prefill_tokens, num_step_decodes=num_decodes
        )


class Sink:
    def __init__(self):
        self.started, self.outputs, self.failures = [], [], []

    def on_start(self, seq_id, when):
        self.started.append(seq_id)

    def on_output(self, output):
        self.outputs.append(output)

    def on_failure(self, error):
        self.failures.append(error)


@pytest.fixture
async def thread():
    thread = EngineThread(max_num_live=2)
    thread.start(cast(LanguageEngine, FakeEngine()))
    yield thread
    await thread.stop(30)


def sequence(seq_id):
    return Sequence(seq_id, bytes(16), [1, 2], SamplingParams(max_tokens=4))


async def test_tokens_come_until_the_sequence_is_taken_out(thread):
    sink, released = Sink(), asyncio.Event()
    thread.add([sequence(7)], sink)
    await eventually(lambda: len(sink.outputs) > 5)
    assert sink.started == [7]
    thread.abort([7], released.set)
    count = len(sink.outputs)
    await asyncio.wait_for(released.wait(), 20)
    assert not thread._engine.sequences
    assert (len(sink.outputs), thread.num_live) == (count, 0)


async def test_an_engine_that_can_do_nothing_is_left_alone_until_something_arrives(thread, monkeypatch):
    monkeypatch.setattr(engine_thread, "_IDLE_SECONDS", 0.001)
    signs_of_life = []
    thread._on_progress = lambda: signs_of_life.append(1)
    thread._engine.is_ready = False
    sink = Sink()
    thread.add([sequence(1)], sink)
    await eventually(lambda: len(signs_of_life) > 50)
    assert thread._engine.num_steps == 1  # the one that found nothing to run
    thread._engine.is_ready = True
    thread.wake()
    await eventually(lambda: sink.outputs)


async def test_what_steps_took_bounds_the_prompts_beside_decodes(thread):
    sink = Sink()
    thread.add([sequence(1)], sink)
    await eventually(lambda: thread._engine.num_steps > 5)
    assert set(thread._engine.allowed) == {None}  # no prompt has been seen
    thread._engine.num_prefill_tokens = 100_000
    await eventually(lambda: thread._engine.allowed[-1] is not None)
    assert thread._engine.allowed[-1] < 100_000


async def test_decode_leaves_cores_to_a_vision_server_that_works_for_it():
    engine, is_awaiting = FakeEngine(), [True]
    thread = EngineThread(2, is_awaiting_features=lambda: is_awaiting[0])
    thread.start(cast(LanguageEngine, engine), DecodeThreads([1, 2], alone=2, shared=1, tolerance=1.2))
    thread.add([sequence(1)], Sink())
    await eventually(lambda: engine.decode_threads == 1)
    is_awaiting[0] = False
    await eventually(lambda: engine.decode_threads == 2)
    await thread.stop(30)


async def test_the_engine_waits_for_a_slow_event_loop(thread, monkeypatch):
    monkeypatch.setattr(engine_thread, "_MAX_STEPS_AHEAD", 3)
    held = []
    monkeypatch.setattr(thread, "_deliver", lambda *step: held.append(step))
    thread.add([sequence(1)], Sink())
    await eventually(lambda: thread._num_steps_ahead == 3)
    await asyncio.sleep(0.05)
    assert thread._num_steps_ahead == len(held) == 3


async def test_what_the_engine_refuses_fails_alone(thread):
    good, bad = Sink(), Sink()
    thread.add([sequence(1)], good)
    await eventually(lambda: good.outputs)
    thread._engine.failure = InvalidRequest("too long")
    thread.add([sequence(2)], bad)
    await eventually(lambda: bad.failures)
    assert isinstance(bad.failures[0], InvalidRequest)
    assert not good.failures
    assert thread.num_live == 1


async def test_no_more_sequences_than_there_are_places(thread):
    thread._engine.is_ready = False
    thread.add([sequence(1)], Sink())
    with pytest.raises(Overloaded):
        thread.add([sequence(2), sequence(3)], Sink())
    thread.add([sequence(2)], Sink())


async def test_after_the_end_nothing_waits(thread):
    sink, released = Sink(), []
    thread._engine.is_ready = False
    thread.add([sequence(1)], sink)
    await thread.stop(30)
    assert isinstance(sink.failures[0], Unavailable)
    with pytest.raises(Unavailable):
        thread.add([sequence(2)], sink)
    thread.abort([1], lambda: released.append(1))
    assert released == [1]
