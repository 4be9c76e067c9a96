"""A step launched before the tokens of the one before are known changes nothing but the time."""

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.model.graphs import Repeat
from common.service.errors import InternalError, Unavailable
from language_server.block_manager import BlockManager
from language_server.engine import EngineConfig, LanguageEngine
from language_server.engine_thread import EngineThread
from language_server.image_spans import ImageSpan, ImageSpans
from language_server.in_flight import InFlight, UnknownTokens
from language_server.model_runner import PreparedChunk
from language_server.scheduler import ScheduledChunk
from language_server.sequence import UNKNOWN_TOKEN, SamplingParams, Sequence
from tests.language_server.conftest import eventually
from tests.language_server.constraints import Steps
from tests.language_server.models import tiny_model
from tests.language_server.test_engine import EOS, HIDDEN, PLACEHOLDER, Features, make_sequence
from tests.language_server.test_engine_thread import Sink

BLOCK, MAX_LEN = 4, 64
GONE = Unavailable("gone")
STOPS = frozenset(range(100, 170))


def make_engine(features=None, *, is_async=True, capture=None, **config):
    _, backbone = tiny_model("qwen3")
    sizes = {"max_model_len": MAX_LEN, "num_kv_blocks": 64, "block_size": BLOCK} | config
    features = features or Features()
    return LanguageEngine(EngineConfig(**sizes, async_scheduling=is_async), backbone, [EOS], features, capture)


class LateDevice:
    """Does what it is asked in order, as late as it can: when the tokens of a step are fetched, no step behind it has
    begun. What the host changes meanwhile it does not see."""

    def __init__(self, engine):
        self.runner, self.sampler, self.asked = engine._runner, engine._sampler, []
        engine._runner, engine._sampler = self, self

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def run(self, batch, unknown=None):
        job = Job(self, [as_it_is(prepared) for prepared in batch], unknown)
        self.asked.append(job)
        return job

    def choose(self, job, sequences):
        job.sequences = sequences
        job.sampled = [copy_of(sequence) for sequence in sequences]
        return job


class Job:
    """A step, and the choice of its tokens."""

    def __init__(self, device, batch, unknown):
        self.device, self.batch, self.unknown, self.sampled, self.done = device, batch, unknown, [], None

    @property
    def token_ids(self):
        return self

    def fetch(self):
        while self.done is None:
            self.device.asked.pop(0).do()
        return self.done.fetch()

    def do(self):
        unknown = self.unknown
        if unknown is not None:
            mine = {prepared.chunk.sequence.seq_id: prepared.chunk.sequence for prepared in self.batch}
            owners = [mine.get(sequence.seq_id, sequence) for sequence in unknown.sequences]
            unknown = UnknownTokens(unknown.token_ids.done.token_ids, owners)
        logits = self.device.runner.run(self.batch, unknown)
        if self.sampled:
            self.done = self.device.sampler.choose(logits, self.sampled)


def as_it_is(prepared):
    chunk = prepared.chunk
    return PreparedChunk(ScheduledChunk(copy_of(chunk.sequence), chunk.start, chunk.end), prepared.image_rows)


def copy_of(sequence):
    twin = copy.copy(sequence)
    for name in ("block_table", "token_ids", "output_token_ids"):
        setattr(twin, name, list(getattr(sequence, name)))
    return twin


class Graphs:
    """Runs steps in which sequences only generate as a GPU would replay them."""

    def __init__(self):
        self.num_replays = 0

    def __call__(self, compute):
        def replay():
            self.num_replays += 1
            compute()

        return Repeat(replay)


# --- any requests at any time

SHARED = [*range(300, 300 + 2 * BLOCK)]
"""The beginning of some prompts."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0},
    "stops": {"temperature": 1.0, "stop_token_ids": STOPS},
    "eos": {"temperature": 1.0, "logit_bias": {EOS: 6.0}},
    "min tokens": {"temperature": 1.0, "stop_token_ids": STOPS, "min_tokens": 3},
    "top k and p": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    # These the device cannot choose by itself.
    "top p": {"temperature": 1.3, "top_p": 0.8},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "stop_token_ids": STOPS},
    "logprobs": {"temperature": 1.0, "logprobs": 2},
}
NEEDS_HOST = {"top p", "penalties", "logprobs", "grammar"}
prompts = st.builds(
    lambda is_shared, first, length: (SHARED if is_shared else []) + [first + i % 7 for i in range(length)],
    st.booleans(),
    st.sampled_from([20, 40, 60]),
    st.integers(1, 20),
)
images = st.one_of(st.none(), st.sampled_from(["good", "good", "misshapen"]))
requests = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": prompts,
            "way": st.sampled_from([*WAYS, "grammar", "greedy", "seeded", "stops", "eos"]),
            "max_tokens": st.integers(1, 12),
            "num_choices": st.sampled_from([1, 1, 2]),
            "image": images,
            "seed": st.integers(0, 1000),
            "arrives": st.integers(0, 12),  # behind so many steps
            "aborted": st.one_of(st.none(), st.none(), st.integers(1, 20)),
        }
    ),
    min_size=1,
    max_size=6,
)
sizes = st.fixed_dictionaries(
    {
        "num_kv_blocks": st.sampled_from([17, 20, 64]),
        "max_num_seqs": st.sampled_from([2, 5]),
        "max_num_batched_tokens": st.sampled_from([7, 64]),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
    }
)


def make_choices(index, request, features):
    """Sequences of one request, whose rows are still on their way."""
    prompt, spans = list(request["prompt"]), []
    request_id = str(index).encode()
    if request["image"] is not None:
        spans = [ImageSpan(0, len(prompt), 6, str((request["image"], request["seed"])).encode())]
        prompt += [PLACEHOLDER] * 6 + [31]
        rows = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(request["seed"]))
        features.put(request_id, 0, rows if request["image"] == "good" else rows[:, 1:], ready=0)
    sampling = {"max_tokens": request["max_tokens"], "temperature": 0.0} | WAYS.get(request["way"], {})
    choices = []
    for choice in range(request["num_choices"]):
        params = SamplingParams(**sampling, seed=request["seed"] + choice)
        sequence = Sequence(10 * index + choice, request_id, list(prompt), params, ImageSpans(spans))
        if request["way"] == "grammar":
            sequence.constraint = Steps({50, 51}, set(range(60, 200)), {EOS, 70}, endless=True)
        choices.append(sequence)
    return choices


def replies(engine, features, asked, *, with_aborts):
    """What each choice was told: tokens, and its end or the kind of its error."""
    told, live = defaultdict(list), []
    for num_steps in range(600):
        for index, request in enumerate(asked):
            if request["arrives"] == num_steps:
                live += make_choices(index, request, features)
        for sequence in live:
            request = asked[sequence.seq_id // 10]
            if request["arrives"] == num_steps:
                engine.add(sequence)
            if with_aborts and request["aborted"] == num_steps:
                engine.abort(sequence.seq_id)
        for output in engine.step():
            told[output.seq_id].append((output.token_id, output.finish_reason, type(output.error)))
        for image in features.images:
            features.ready[image] = min(6, features.ready[image] + 2)
        for sequence in live:
            assert UNKNOWN_TOKEN not in sequence.token_ids
        if num_steps > 12 and not engine.has_work():
            break
    assert not engine.has_work()
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks
    assert engine._in_flight is None
    return told


@pytest.mark.parametrize("device", ["late", "graphs", "eager"])
@settings(max_examples=50, deadline=None)
@given(asked=requests, sizes=sizes)
def test_replies_are_those_of_the_synchronous_engine(device, asked, sizes):
    """Tokens and ends of every choice; those of an aborted one as far as they came. Then all ask again, and find what
    the first round left in the prefix cache."""
    features = Features()
    expected = replies(make_engine(features, is_async=False, **sizes), features, asked, with_aborts=False)
    engine = make_engine(features := Features(), capture=Graphs() if device == "graphs" else None, **sizes)
    engine.warm_up()
    if device == "late":
        LateDevice(engine)
    for with_aborts in (True, False):
        features.ready.clear()
        told = replies(engine, features, asked, with_aborts=with_aborts)
        for seq_id, reply in expected.items():
            may_be_cut = with_aborts and asked[seq_id // 10]["aborted"] is not None
            num_told = len(told[seq_id]) if may_be_cut else len(reply)
            assert told[seq_id] == reply[:num_told], seq_id


# --- when steps are launched


class Log:
    """In which order steps were launched and their tokens fetched."""

    def __init__(self, engine, monkeypatch):
        self.engine, self.events, self.num_tokens, self.last_ends = engine, [], 0, defaultdict(int)
        self.run = engine._runner.run
        fetch = InFlight.fetch
        monkeypatch.setattr(engine._runner, "run", self.launch)

        def fetched(step):
            self.events.append("fetch")
            return fetch(step)

        monkeypatch.setattr(InFlight, "fetch", fetched)

    def launch(self, batch, unknown=None):
        self.events.append("launch")
        for prepared in batch:
            chunk = prepared.chunk
            self.num_tokens += chunk.num_tokens
            self.last_ends[chunk.sequence.seq_id] = max(self.last_ends[chunk.sequence.seq_id], chunk.end)
        return self.run(batch, unknown)


def answer(engine, *sequences):
    for sequence in sequences:
        engine.add(sequence)
    told = defaultdict(list)
    while engine.has_work():
        for output in engine.step():
            told[output.seq_id].append((output.token_id, output.finish_reason))
    return told


def test_a_step_is_launched_before_the_one_before_is_fetched(monkeypatch):
    engine = make_engine()
    log = Log(engine, monkeypatch)
    assert len(answer(engine, make_sequence(0, [20, 21], ignore_eos=True, max_tokens=4))[0]) == 4
    assert log.events == ["launch", "launch", "fetch", "launch", "fetch", "launch", "fetch", "fetch"]


@pytest.mark.parametrize("way", sorted(NEEDS_HOST))
def test_what_the_device_cannot_choose_alone_makes_the_host_wait(monkeypatch, way):
    engine = make_engine()
    options: dict[str, Any] = WAYS.get(way, {}) | {"ignore_eos": True, "max_tokens": 3, "stop_token_ids": frozenset()}
    sequence = make_sequence(0, [20, 21], **options)
    if way == "grammar":
        sequence.constraint = Steps({50}, {51}, {52}, endless=True)
    log = Log(engine, monkeypatch)
    assert len(answer(engine, sequence)[0]) == 3
    assert log.events == ["launch", "fetch"] * 3


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 100])
def test_nothing_is_computed_beyond_a_known_length(monkeypatch, max_tokens):
    engine = make_engine(max_model_len=24)
    log = Log(engine, monkeypatch)
    num_prompt_tokens = 10
    told = answer(engine, make_sequence(0, [20] * num_prompt_tokens, ignore_eos=True, max_tokens=max_tokens))
    num_generated = min(max_tokens, 24 - num_prompt_tokens)
    assert [reason for _, reason in told[0]] == [None] * (num_generated - 1) + ["length"]
    # The last token never runs.
    assert log.num_tokens == log.last_ends[0] == num_prompt_tokens + num_generated - 1


def test_who_stops_is_computed_once_too_often_and_leaves_its_blocks_at_once(monkeypatch):
    engine = make_engine(num_kv_blocks=17)
    LateDevice(engine)
    log = Log(engine, monkeypatch)
    engine.add(make_sequence(0, range(20, 20 + 3 * BLOCK), logit_bias={EOS: 1000.0}))
    assert [(output.token_id, output.finish_reason) for output in engine.step()] == [(EOS, "stop")]
    assert log.last_ends[0] == 3 * BLOCK + 1
    assert engine.stats().num_free_blocks == 17
    assert engine.step() == []


def stopping_sequences():
    return [
        make_sequence(index, [40 + index] * 9, temperature=1.0, seed=index, stop_token_ids=STOPS, max_tokens=30)
        for index in range(12)
    ]


def test_blocks_are_taken_while_their_last_owner_is_still_writing():
    """Sequences stop all the time, on a device that is late; memory is so short that each new one gets their blocks."""
    expected = answer(make_engine(is_async=False), *stopping_sequences())
    sequences = stopping_sequences()
    engine = make_engine(num_kv_blocks=16, max_num_seqs=3)
    LateDevice(engine)
    taken = defaultdict(set)
    for sequence in sequences:
        engine.add(sequence)
    told = defaultdict(list)
    while engine.has_work():
        for output in engine.step():
            told[output.seq_id].append((output.token_id, output.finish_reason))
        for sequence in sequences:
            for block in sequence.block_table:
                taken[block].add(sequence.seq_id)
    assert told == expected
    assert sum(reply[-1][1] == "stop" for reply in expected.values()) > 6
    assert all(len(owners) > 1 for owners in taken.values())


# --- what comes in between


def test_what_is_aborted_while_it_runs_is_not_heard_of_again():
    engine = make_engine()
    LateDevice(engine)
    expected = answer(make_engine(is_async=False), make_sequence(1, [30, 31]))[1]
    engine.add(make_sequence(0, [20, 21]))
    engine.add(make_sequence(1, [30, 31]))
    told = [output for _ in range(3) for output in engine.step()]
    engine.abort(0)
    while engine.has_work():
        told += engine.step()
    assert [output.seq_id for output in told].count(0) == 3
    assert [(output.token_id, output.finish_reason) for output in told if output.seq_id == 1] == expected
    assert engine.stats().num_free_blocks == 64


def test_a_number_may_be_given_to_another_sequence_while_its_last_one_runs():
    engine = make_engine()
    LateDevice(engine)
    expected = answer(make_engine(is_async=False), make_sequence(0, [30, 31]))[0]
    engine.add(make_sequence(0, [20, 21]))
    engine.step()
    engine.abort(0)
    assert answer(engine, make_sequence(0, [30, 31]))[0] == expected


def test_rows_that_do_not_fit_are_told_behind_the_last_token():
    """A preempted sequence reads its rows again, and they are gone."""
    told = {}
    for is_async in (False, True):
        features = Features()
        features.put(b"1", 0, torch.zeros(6, HIDDEN))
        engine = make_engine(features, is_async=is_async, num_kv_blocks=17, enable_prefix_caching=False)
        engine.add(make_sequence(0, range(20, 29), ignore_eos=True, max_tokens=40))
        engine.step()
        prompt = [*range(40, 48), *[PLACEHOLDER] * 6, 48]
        engine.add(make_sequence(1, prompt, spans=[ImageSpan(0, 8, 6, b"a")], ignore_eos=True, max_tokens=40))
        told[is_async] = defaultdict(list)
        while engine.has_work():
            for output in engine.step():
                told[is_async][output.seq_id].append((output.token_id, output.error))
            features.error = GONE if told[is_async][1] else None
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_free_blocks == 17
    assert told[True] == told[False]
    assert len(told[True][0]) == 39
    assert 1 < len(told[True][1]) < 40
    assert told[True][1][-1] == (None, GONE)


def test_what_is_not_a_number_ends_its_own_sequence_and_is_not_shared():
    def asked(features, image, seq_id):
        features.put(str(seq_id).encode(), 0, image)
        prompt = [*range(40, 48), *[PLACEHOLDER] * 6, 48]
        return make_sequence(seq_id, prompt, spans=[ImageSpan(0, 8, 6, b"a")])

    image = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(5))
    features = Features()
    healthy, other = asked(features, image, 0), make_sequence(1, [20, 21])
    expected = answer(make_engine(features, is_async=False), healthy, other)
    features = Features()
    engine = make_engine(features)
    LateDevice(engine)
    engine.add(asked(features, image * float("nan"), 2))
    engine.add(make_sequence(1, [20, 21]))
    told, errors = defaultdict(list), defaultdict(list)
    while engine.has_work():
        for output in engine.step():
            told[output.seq_id].append((output.token_id, output.finish_reason))
            errors[output.seq_id].append(type(output.error))
    assert (told[2], errors[2]) == ([(None, None)], [InternalError])
    assert told[1] == expected[1]
    assert engine.stats().num_free_blocks == 64
    again = asked(features, image, 0)
    assert answer(engine, again)[0] == expected[0]
    assert again.num_cached_tokens == 0


def test_a_late_look_at_what_is_not_a_number_takes_back_what_was_offered():
    """Somebody is preempted while the step runs that turns out to have computed nonsense."""
    blocks = BlockManager(8, BLOCK)
    sequence = make_sequence(0, range(20, 20 + 2 * BLOCK))
    twin = make_sequence(1, range(20, 20 + 2 * BLOCK + 1))
    blocks.allocate(sequence, 2 * BLOCK)
    blocks.commit(sequence, 2 * BLOCK)
    blocks.free(sequence)
    assert len(blocks.find_prefix(twin)) == 2
    blocks.discard(sequence)
    assert blocks.find_prefix(twin) == []
    assert blocks.num_free_blocks == 8


def test_choices_share_a_prompt_that_is_still_being_computed():
    engine = make_engine(max_num_batched_tokens=64)
    choices = [make_sequence(index, range(20, 20 + 5 * BLOCK), seed=index, temperature=1.0) for index in range(3)]
    for choice in choices:
        choice.request_id = b"one"
    answer(engine, *choices)
    assert [choice.num_cached_tokens for choice in choices] == [0, 4 * BLOCK, 4 * BLOCK]


def test_steps_are_counted_when_they_are_finished():
    engine = make_engine(max_num_batched_tokens=64)
    engine.add(make_sequence(0, range(20, 30), ignore_eos=True, max_tokens=3))
    sizes = []
    for _ in range(4):
        engine.step()
        stats = engine.stats()
        sizes.append((stats.num_step_tokens, stats.num_step_sequences, stats.num_step_decodes))
    assert sizes == [(10, 1, 0), (1, 1, 1), (1, 1, 1), (0, 0, 0)]


def test_without_graphs_on_a_gpu_nothing_is_launched_ahead():
    assert not make_engine(is_async=None, capture=Graphs()).launches_ahead
    assert make_engine(is_async=True).launches_ahead


def test_unknown_tokens_of_replayed_steps_are_read_from_the_device():
    graphs = Graphs()
    engine = make_engine(capture=graphs, max_num_seqs=2)
    engine.warm_up()
    num_replays = graphs.num_replays
    mine, expected = (make_sequence(0, [20, 21], ignore_eos=True, max_tokens=9) for _ in range(2))
    assert answer(engine, mine) == answer(make_engine(is_async=False), expected)
    assert graphs.num_replays - num_replays == 8


async def test_the_thread_does_not_rest_while_a_step_is_in_flight():
    """Sequences end, wait for rows and are aborted; whoever is left gets on, and in the end the engine is empty."""
    features = Features()
    features.put(b"2", 0, torch.zeros(6, HIDDEN), ready=2)
    engine = make_engine(features)
    LateDevice(engine)
    thread = EngineThread(max_num_live=4)
    thread.start(engine)
    try:
        long, short, late = Sink(), Sink(), Sink()
        thread.add([make_sequence(0, [20, 21], ignore_eos=True, max_tokens=60)], long)
        thread.add([make_sequence(1, range(30, 45), ignore_eos=True, max_tokens=3)], short)
        spans = [ImageSpan(0, 1, 6, b"a")]
        thread.add([make_sequence(2, [20, *[PLACEHOLDER] * 6, 21], spans=spans, ignore_eos=True, max_tokens=5)], late)
        await eventually(lambda: len(short.outputs) == 3 and long.outputs)
        thread.abort([0])
        features.ready[b"2", 0] = 6
        thread.wake()
        await eventually(lambda: len(late.outputs) == 5)
        assert [output.finish_reason for output in (short.outputs[-1], late.outputs[-1])] == ["length"] * 2
        await eventually(lambda: not engine.has_work())
        assert engine.stats().num_free_blocks == 64
    finally:
        await thread.stop(30)
