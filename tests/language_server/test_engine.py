"""The engine as a whole on a CPU: the tokens of transformers' ``generate``, under every kind of pressure."""

import random
from collections import defaultdict
from functools import lru_cache

import pytest
import torch

from common.service.errors import ConfigError, InternalError, InvalidRequest, Overloaded, Unavailable
from language_server.engine import EngineConfig, LanguageEngine
from language_server.image_spans import ImageSpan, ImageSpans
from language_server.sequence import SamplingParams, Sequence
from tests.language_server.constraints import Steps
from tests.language_server.models import FAMILIES, tiny_model

HIDDEN = 56  # of the tiny Qwen3
PLACEHOLDER = 10
EOS = 2
MAX_TOKENS = 16


class Features:
    """Rows by (request, image), and how many of them have arrived."""

    def __init__(self):
        self.images = {}
        self.ready = defaultdict(int)
        self.error = None

    def put(self, request_id, image_index, rows, *, ready=None):
        self.images[request_id, image_index] = rows
        self.ready[request_id, image_index] = len(rows) if ready is None else ready

    def num_ready_tokens(self, request_id, image_index):
        return self.ready[request_id, image_index]

    def rows(self, request_id, image_index, start, stop):
        if self.error is not None:
            raise self.error
        return self.images[request_id, image_index][start:stop]


def make_engine(family="qwen3", features=None, **config):
    _, backbone = tiny_model(family)
    sizes = {"max_model_len": 256, "num_kv_blocks": 256, "block_size": 8} | config
    return LanguageEngine(EngineConfig(**sizes), backbone, eos_token_ids=[EOS], embeds=features or Features())


def make_sequence(seq_id, prompt, *, spans=(), outputs=(), **sampling):
    params = SamplingParams(**({"max_tokens": MAX_TOKENS, "temperature": 0.0} | sampling))
    return Sequence(
        seq_id, str(seq_id).encode(), list(prompt), params, ImageSpans(spans), output_token_ids=list(outputs)
    )


def run(engine, on_step=lambda: None, max_steps=2000):
    """Step until nothing is left; returns outputs by seq_id."""
    outputs = defaultdict(list)
    for _ in range(max_steps):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs[output.seq_id].append(output)
        on_step()
    raise AssertionError("the engine does not come to an end")


def generate(engine, *sequences):
    """Token ids of each sequence."""
    for sequence in sequences:
        engine.add(sequence)
    outputs = run(engine)
    assert all(output.error is None for sequence in sequences for output in outputs[sequence.seq_id])
    return [[output.token_id for output in outputs[sequence.seq_id]] for sequence in sequences]


@lru_cache(maxsize=8)
def prompts_and_replies(family, num_prompts=12):
    """Random prompts, and what transformers' greedy ``generate`` answers to each of them alone."""
    model, _ = tiny_model(family)
    rng = random.Random(f"prompts of {family}")
    prompts = [[rng.randrange(20, 480) for _ in range(rng.randrange(1, 70))] for _ in range(num_prompts)]
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        replies.append(out[0, len(prompt) :].tolist())
    return prompts, replies


PRESSURES = {
    "roomy": {},
    "small-chunks": {"max_num_batched_tokens": 9, "max_num_seqs": 5},
    "tiny-kv": {"num_kv_blocks": 16, "max_num_batched_tokens": 40, "max_num_seqs": 8},
    "tiny-kv-no-prefix-caching": {"num_kv_blocks": 16, "max_num_seqs": 8, "enable_prefix_caching": False},
    "one-at-a-time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("pressure", PRESSURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, pressure):
    prompts, replies = prompts_and_replies(family)
    engine = make_engine(family, **PRESSURES[pressure])
    assert generate(engine, *[make_sequence(index, prompt) for index, prompt in enumerate(prompts)]) == replies
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_total_blocks
    assert (stats.num_preemptions > 0) == pressure.startswith("tiny-kv")


def test_replies_vary_so_that_equality_means_something():
    _, replies = prompts_and_replies("qwen3")
    assert len({tuple(reply) for reply in replies}) == len(replies)
    assert sum(len(set(reply)) for reply in replies) > 4 * len(replies)


def test_sequences_that_arrive_while_others_run_change_nothing():
    prompts, replies = prompts_and_replies("qwen3")
    engine = make_engine(max_num_batched_tokens=32, max_num_seqs=4)
    late = [make_sequence(index, prompt) for index, prompt in enumerate(prompts)]
    outputs = run_with_arrivals(engine, late)
    assert [[output.token_id for output in outputs[index]] for index in range(len(prompts))] == replies


def run_with_arrivals(engine, late):
    engine.add(late.pop(0))
    queue = iter(list(late))

    def arrive():
        for sequence in queue:
            engine.add(sequence)
            return

    return run(engine, arrive)


# --- images


def image_request(seq_id, seed=0):
    """A prompt with two images and its rows."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(length, HIDDEN, generator=generator) for length in (24, 13)]
    prompt = [*range(100, 109), *[PLACEHOLDER] * 24, 120, 121, *[PLACEHOLDER] * 13, 130, 131, 132]
    spans = [ImageSpan(0, 9, 24, bytes([seed]) * 32), ImageSpan(1, 35, 13, bytes([seed + 100]) * 32)]
    return make_sequence(seq_id, prompt, spans=spans), images


def expected_reply(sequence, images):
    """Greedy reply of the undivided language model, embeddings put together by hand."""
    model, _ = tiny_model("qwen3")
    embeds = model.get_input_embeddings()(torch.tensor([sequence.prompt_token_ids])).detach().clone()
    for span, rows in zip(sequence.image_spans, images, strict=True):
        embeds[0, span.start : span.end] = rows
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize("rows_per_step", [1, 7, 40])
def test_rows_that_arrive_late_and_in_pieces_give_the_same_tokens(rows_per_step):
    features = Features()
    engine = make_engine(features=features, max_num_batched_tokens=64)
    requests = [image_request(seq_id, seed=seq_id) for seq_id in range(3)]
    for sequence, images in requests:
        for index, rows in enumerate(images):
            features.put(sequence.request_id, index, rows, ready=0)
        engine.add(sequence)
    engine.add(make_sequence(50, range(60, 70)))

    def arrive():
        for (request_id, index), rows in features.images.items():
            ready = features.ready[request_id, index]
            features.ready[request_id, index] = min(len(rows), ready + rows_per_step)

    outputs = run(engine, arrive)
    for sequence, images in requests:
        assert [output.token_id for output in outputs[sequence.seq_id]] == expected_reply(sequence, images)
    assert len(outputs[50]) > 0


@pytest.mark.parametrize("config", [{}, {"num_kv_blocks": 9, "max_num_seqs": 4}], ids=["roomy", "tiny-kv"])
def test_a_video_whose_rows_arrive_across_its_frames(config):
    features = Features()
    engine = make_engine(features=features, **config)
    rows = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(8))
    prompt, spans = [90, 91], []
    for frame in range(4):
        spans.append(ImageSpan(0, len(prompt), 5, b"v" * 32, first_row=5 * frame))
        prompt += [*[PLACEHOLDER] * 5, 100 + frame, 110]
    videos = [make_sequence(seq_id, prompt, spans=spans) for seq_id in (0, 1)]
    pieces = [rows[span.first_row : span.end_row] for span in spans]
    for video in videos:
        features.put(video.request_id, 0, rows, ready=0)
        engine.add(video)

    def arrive():
        for key in features.images:
            features.ready[key] = min(20, features.ready[key] + 3)

    outputs = run(engine, arrive)
    for video in videos:
        assert [output.token_id for output in outputs[video.seq_id]] == expected_reply(video, pieces)


def test_images_survive_preemption():
    features = Features()
    engine = make_engine(features=features, num_kv_blocks=14, max_num_seqs=4)
    requests = [image_request(seq_id, seed=seq_id) for seq_id in range(3)]
    for sequence, images in requests:
        for index, rows in enumerate(images):
            features.put(sequence.request_id, index, rows)
    replies = generate(engine, *[sequence for sequence, _ in requests])
    assert replies == [expected_reply(sequence, images) for sequence, images in requests]
    assert engine.stats().num_preemptions > 0


def test_a_known_image_is_taken_from_the_prefix_cache_without_its_rows():
    features = Features()
    engine = make_engine(features=features)
    first, images = image_request(0)
    for index, rows in enumerate(images):
        features.put(first.request_id, index, rows)
    expected = generate(engine, first)
    again, _ = image_request(1)
    assert generate(engine, again) == expected
    assert again.num_cached_tokens == 48
    assert engine.stats().num_prefix_hits == 48


def test_equal_text_over_different_images_is_not_confused():
    features = Features()
    engine = make_engine(features=features)
    for seq_id in (0, 1):
        sequence, images = image_request(seq_id, seed=seq_id)
        for index, rows in enumerate(images):
            features.put(sequence.request_id, index, rows)
        assert generate(engine, sequence) == [expected_reply(sequence, images)]
        assert sequence.num_cached_tokens == 8 * seq_id


# --- sampling


def sampled(seq_id, prompt, *, outputs=(), seed=77, **sampling):
    return make_sequence(seq_id, prompt, outputs=outputs, temperature=1.2, top_p=0.95, seed=seed, **sampling)


def test_seeded_sampling_does_not_depend_on_the_batch():
    prompts, _ = prompts_and_replies("qwen3")
    alone = generate(make_engine(), sampled(0, prompts[0]))[0]
    others = [sampled(index, prompt, seed=index) for index, prompt in enumerate(prompts[1:], start=1)]
    crowd = make_engine(max_num_batched_tokens=16, max_num_seqs=6, num_kv_blocks=16)
    assert generate(crowd, *others, sampled(0, prompts[0]))[-1] == alone
    assert generate(make_engine(), sampled(0, prompts[0], seed=78))[0] != alone


def test_a_resumed_sequence_goes_on_as_it_would_have():
    prompts, _ = prompts_and_replies("qwen3")
    options = {"ignore_eos": True, "presence_penalty": 0.5}
    whole = generate(make_engine(), sampled(0, prompts[0], **options))[0]
    for num_sent in (1, 5, MAX_TOKENS - 1):
        resumed = sampled(0, prompts[0], outputs=whole[:num_sent], **options)
        assert generate(make_engine(), resumed)[0] == whole[num_sent:]


def test_without_a_seed_replies_differ():
    engine = make_engine()
    replies = generate(engine, *[sampled(index, range(30, 40), seed=None, ignore_eos=True) for index in range(3)])
    assert len({tuple(reply) for reply in replies}) == 3


# --- ends


def test_reasons_to_end():
    prompt = prompts_and_replies("qwen3")[0][0]
    reply = generate(make_engine(), make_sequence(0, prompt, ignore_eos=True))[0]
    stop_at = next(index for index, token in enumerate(reply) if index >= 3 and token not in reply[:index])
    cases = {
        "stop id": (
            make_sequence(0, prompt, ignore_eos=True, stop_token_ids=frozenset({reply[stop_at]})),
            stop_at + 1,
            "stop",
        ),
        "max_tokens": (make_sequence(0, prompt, ignore_eos=True, max_tokens=3), 3, "length"),
        "eos": (make_sequence(0, prompt, logit_bias={EOS: 1000.0}), 1, "stop"),
        "min_tokens": (make_sequence(0, prompt, logit_bias={EOS: 1000.0}, min_tokens=4), 5, "stop"),
        "ignored eos": (make_sequence(0, prompt, logit_bias={EOS: 1000.0}, ignore_eos=True), MAX_TOKENS, "length"),
    }
    for name, (sequence, num_tokens, reason) in cases.items():
        engine = make_engine()
        engine.add(sequence)
        outputs = run(engine)[0]
        assert (len(outputs), outputs[-1].finish_reason) == (num_tokens, reason), name
        assert all(output.finish_reason is None for output in outputs[:-1]), name


def test_the_context_ends_a_reply():
    engine = make_engine(max_model_len=40)
    replies = generate(engine, make_sequence(0, range(20, 55), ignore_eos=True, max_tokens=100))
    assert len(replies[0]) == 5


def test_kv_memory_bounds_the_context():
    engine = make_engine(max_model_len=256, num_kv_blocks=4)
    assert engine.max_model_len == 32
    assert len(generate(engine, make_sequence(0, range(20, 50), ignore_eos=True, max_tokens=100))[0]) == 2


def test_a_sequence_that_had_ended_before_it_was_resumed_ends_at_once():
    engine = make_engine()
    engine.add(make_sequence(0, [20, 21], outputs=[50, EOS]))
    engine.add(make_sequence(1, [20, 21], outputs=[50, 51], max_tokens=2))
    outputs = run(engine, max_steps=2)
    assert [(out.token_id, out.finish_reason) for index in (0, 1) for out in outputs[index]] == [
        (None, "stop"),
        (None, "length"),
    ]


# --- constraints

EVEN = set(range(20, 480, 2))


def constrained(seq_id, prompt, constraint, **kwargs):
    sequence = make_sequence(seq_id, prompt, **kwargs)
    sequence.constraint = constraint
    return sequence


def ends(outputs):
    return [(output.token_id, output.finish_reason) for output in outputs]


@pytest.mark.parametrize("pressure", PRESSURES)
def test_a_constraint_sees_each_token_once_and_changes_nobody_else(pressure):
    """Preempted sequences are computed again; their tokens are not chosen again."""
    prompts, replies = prompts_and_replies("qwen3")
    engine = make_engine(**PRESSURES[pressure])
    rules = {index: Steps(EVEN, endless=True) for index in range(0, len(prompts), 2)}
    sequences = [constrained(index, prompt, rules.get(index)) for index, prompt in enumerate(prompts)]
    made = generate(engine, *sequences)
    assert (engine.stats().num_preemptions > 0) == pressure.startswith("tiny-kv")
    for index, tokens in enumerate(made):
        if index in rules:
            assert rules[index].consumed == tokens
            assert set(tokens) <= EVEN
        else:
            assert tokens == replies[index]


def test_a_complete_constraint_ends_the_reply_behind_its_last_token():
    engine = make_engine()
    engine.add(constrained(0, [20, 21], Steps({50}, {51, 52})))
    first, second, end = ends(run(engine)[0])
    assert first == (50, None)
    assert second in [(51, None), (52, None)]  # text, unlike a token that stops
    assert end == (None, "stop")


def test_completeness_goes_before_length():
    engine = make_engine()
    engine.add(constrained(0, [20, 21], Steps({50}, {51}), max_tokens=2))
    engine.add(constrained(1, [20, 21], Steps({50}, {51}, {52}), max_tokens=2))
    outputs = run(engine)
    assert ends(outputs[0]) == [(50, None), (51, None), (None, "stop")]
    assert ends(outputs[1]) == [(50, None), (51, "length")]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_turn_ends_a_constrained_reply(ignore_eos):
    engine = make_engine()
    engine.add(constrained(0, [20, 21], Steps({50}, {EOS}), ignore_eos=ignore_eos))
    assert ends(run(engine)[0]) == [(50, None), (EOS, "stop")]


def test_a_resumed_reply_that_is_complete_ends_at_once():
    rule = Steps({50}, {51})
    rule.consumed = [50, 51]
    engine = make_engine()
    engine.add(constrained(0, [20, 21], rule, outputs=[50, 51]))
    assert ends(run(engine, max_steps=2)[0]) == [(None, "stop")]


def test_a_constraint_that_fails_ends_its_own_sequence_only():
    prompts, replies = prompts_and_replies("qwen3")
    broken, late, contrary = Steps({50}, endless=True), Steps({50}, endless=True), Steps(set(), endless=True)
    broken.error = InvalidRequest("too complex", param="response_format")
    late.late_error = InvalidRequest("too complex by now", param="response_format")
    engine = make_engine()
    engine.add(constrained(0, prompts[0], broken))
    engine.add(make_sequence(1, prompts[1]))
    engine.add(constrained(2, prompts[2], contrary))
    engine.add(constrained(3, prompts[3], late))
    outputs = run(engine)
    assert [output.error for output in outputs[0]] == [broken.error]
    assert [type(output.error) for output in outputs[2]] == [InternalError]  # it allows nothing: that is a bug
    assert [output.error for output in outputs[3]] == [late.late_error]
    assert [output.token_id for output in outputs[1]] == replies[1]
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


def test_logprobs_come_with_every_token():
    engine = make_engine()
    engine.add(make_sequence(0, range(20, 30), logprobs=3))
    for output in run(engine)[0]:
        assert output.top_logprobs[0] == (output.token_id, pytest.approx(output.logprob))
        assert len(output.top_logprobs) == 3


def test_abort_frees_blocks_in_every_state():
    features = Features()
    engine = make_engine(features=features, max_num_seqs=2, max_num_batched_tokens=16)
    waiting_for_features, images = image_request(9)
    for index, rows in enumerate(images):
        features.put(waiting_for_features.request_id, index, rows, ready=5)
    sequences = [make_sequence(index, range(20, 60)) for index in range(3)]
    for sequence in (waiting_for_features, *sequences):
        engine.add(sequence)
    for _ in range(3):
        engine.step()
    assert engine.stats().num_free_blocks < 256
    for seq_id in (0, 1, 2, 9, 9, 1234):
        engine.abort(seq_id)
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.num_running, stats.num_waiting) == (256, 0, 0)
    assert not engine.has_work()
    assert engine.step() == []


def test_warm_up_leaves_nothing_behind():
    engine = make_engine()
    engine.warm_up()
    assert not engine.has_work()
    assert engine.stats().num_free_blocks == 256


# --- bad input


def test_rows_that_do_not_fit_end_their_own_sequence_only():
    prompts, replies = prompts_and_replies("qwen3")
    features = Features()
    engine = make_engine(features=features)
    broken, images = image_request(99)
    features.put(broken.request_id, 0, images[0][:, :-1])
    features.put(broken.request_id, 1, images[1])
    good = [make_sequence(index, prompt) for index, prompt in enumerate(prompts)]
    for sequence in (*good[:6], broken, *good[6:]):
        engine.add(sequence)
    outputs = run(engine)
    assert [[output.token_id for output in outputs[index]] for index in range(len(prompts))] == replies
    assert [type(output.error) for output in outputs[99]] == [InternalError]
    assert engine.stats().num_free_blocks == 256


def test_an_error_of_the_feature_store_reaches_the_sequence():
    features = Features()
    engine = make_engine(features=features)
    sequence, images = image_request(0)
    for index, rows in enumerate(images):
        features.put(sequence.request_id, index, rows)
    features.error = Unavailable("gone")
    engine.add(sequence)
    assert [output.error for output in run(engine)[0]] == [features.error]


def test_rows_that_are_not_numbers_fail_alone_and_are_not_cached():
    prompts, replies = prompts_and_replies("qwen3")
    features = Features()
    engine = make_engine(features=features)
    poisoned, images = image_request(99)
    features.put(poisoned.request_id, 0, images[0] * float("nan"))
    features.put(poisoned.request_id, 1, images[1])
    good = make_sequence(0, prompts[0])
    engine.add(poisoned)
    engine.add(good)
    outputs = run(engine)
    assert [output.token_id for output in outputs[0]] == replies[0]
    assert [type(output.error) for output in outputs[99]] == [InternalError]
    healthy, images = image_request(1)
    for index, rows in enumerate(images):
        features.put(healthy.request_id, index, rows)
    assert generate(engine, healthy) == [expected_reply(healthy, images)]


@pytest.mark.parametrize(
    ("sequence", "code"),
    [
        (make_sequence(0, range(20, 276)), "context_length_exceeded"),
        (make_sequence(0, []), "invalid_value"),
        (make_sequence(0, [20, 512]), "invalid_value"),
        (make_sequence(0, [20, -1]), "invalid_value"),
        (make_sequence(0, [20], logit_bias={512: 1.0}), "invalid_value"),
        (make_sequence(0, [20], stop_token_ids=frozenset({-2})), "invalid_value"),
        (make_sequence(0, [20], max_tokens=0), "invalid_value"),
        (make_sequence(0, [20] * 9, spans=[ImageSpan(0, 5, 5, b"a")]), "invalid_value"),
        (make_sequence(0, [20] * 9, spans=[ImageSpan(0, 1, 4, b"a"), ImageSpan(1, 4, 2, b"b")]), "invalid_value"),
        (make_sequence(0, [20] * 9, spans=[ImageSpan(0, 1, 4, b"a"), ImageSpan(0, 5, 2, b"a", 3)]), "invalid_value"),
    ],
)
def test_what_cannot_run_is_refused_at_once(sequence, code):
    engine = make_engine()
    with pytest.raises(InvalidRequest) as raised:
        engine.add(sequence)
    assert raised.value.code == code
    assert not engine.has_work()


def test_too_many_waiting_sequences_are_refused():
    engine = make_engine(max_num_waiting=2)
    for index in range(2):
        engine.add(make_sequence(index, [20, 21]))
    with pytest.raises(Overloaded):
        engine.add(make_sequence(2, [20, 21]))
    engine.step()
    engine.add(make_sequence(2, [20, 21]))


@pytest.mark.parametrize(
    "config", [{"max_model_len": 0}, {"max_num_seqs": 0}, {"max_num_seqs": 9, "max_num_batched_tokens": 8}]
)
def test_sizes_that_make_no_sense_are_refused(config):
    with pytest.raises(ConfigError):
        EngineConfig(**({"max_model_len": 64} | config))


def test_kv_memory_comes_from_a_budget_in_bytes():
    _, backbone = tiny_model("qwen3")
    bytes_per_block = backbone.kv_shape.bytes_per_block(8)
    assert bytes_per_block == 2 * 2 * 8 * 2 * 16 * 4
    assert make_engine(num_kv_blocks=None, kv_cache_bytes=10 * bytes_per_block + 1).stats().num_total_blocks == 10
    assert make_engine(num_kv_blocks=None, max_num_seqs=3).stats().num_total_blocks == 3 * 256 / 8
    with pytest.raises(ConfigError, match="hold no block"):
        make_engine(num_kv_blocks=None, kv_cache_bytes=100)
