"""The next token: exact where it is greedy, distributed as it should be where it is not, and nobody else's business."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from common.service.errors import InternalError, InvalidRequest
from language_server import sampler as sampler_module
from language_server.bad_words import BadWords
from language_server.sampler import Sampler, uniform
from language_server.sequence import SamplingParams, Sequence
from tests.language_server.constraints import Steps

VOCAB = 16
EOS = 3


def make_sequence(prompt=(1, 2), outputs=(), **sampling):
    return Sequence(0, b"r", list(prompt), SamplingParams(max_tokens=100, **sampling), output_token_ids=list(outputs))


def greedy(**kwargs):
    return make_sequence(temperature=0.0, **kwargs)


def constrained(*allowed, **kwargs):
    sequence = make_sequence(**kwargs)
    sequence.constraint = Steps(allowed, vocab_size=VOCAB)
    return sequence


def sample(logits, *sequences):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    if logits.ndim == 1:
        logits = logits.expand(len(sequences), -1)
    return Sampler([EOS]).choose(logits.clone(), sequences).fetch()


def token_ids(logits, *sequences):
    return [result.token_id for result in sample(logits, *sequences)]


def draw(logits, num_draws, **sampling):
    """How often each token comes, over as many positions of one seed."""
    sequences = [make_sequence(outputs=[0] * position, seed=5, **sampling) for position in range(num_draws)]
    return Counter(token_ids(logits, *sequences))


RISING = torch.arange(VOCAB, dtype=torch.float32) / 4


def test_temperature_zero_is_argmax():
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    assert token_ids(logits, *[greedy() for _ in range(5)]) == logits.argmax(dim=-1).tolist()


def test_uniform_is_in_the_unit_interval_and_spread():
    draws = [uniform(seed, position) for seed in (-3, 0, 2**63 - 1) for position in range(2000)]
    assert all(0 <= value < 1 for value in draws)
    assert len(set(draws)) == len(draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02


def test_frequencies_follow_the_distribution():
    counts = draw(RISING, 3000)
    probs = RISING.softmax(dim=-1)
    for token in range(VOCAB):
        deviation = math.sqrt(3000 * probs[token] * (1 - probs[token]))
        assert abs(counts[token] - 3000 * probs[token]) < 5 * deviation + 1


def test_high_temperature_flattens_low_temperature_sharpens():
    assert draw(RISING, 500, temperature=0.05)[VOCAB - 1] > 490
    assert len(draw(RISING, 500, temperature=50.0)) == VOCAB


@pytest.mark.parametrize("tiny", [1e-7, 1e-30, 1.4e-45])
def test_numbers_that_float32_can_hardly_hold_are_no_way_past_a_constraint(tiny):
    """Divided by these, logits would be infinite, and probabilities no numbers."""
    logits = 100 * RISING
    assert token_ids(logits, constrained(3, 4, temperature=tiny)) == [4]
    assert token_ids(logits, make_sequence(temperature=tiny)) == [VOCAB - 1]
    assert token_ids(logits, constrained(1, 2, 3, repetition_penalty=tiny))[0] in (1, 2)
    assert token_ids(logits, make_sequence(prompt=(1,), repetition_penalty=tiny)) == [1]


def test_the_same_seed_and_position_give_the_same_token_in_any_company():
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1))
    ours = make_sequence(outputs=[4, 5, 6], seed=11, top_p=0.9)
    alone = token_ids(logits[3:4], ours)
    others = [make_sequence(seed=row, top_k=2, repetition_penalty=1.5) for row in range(7)]
    assert token_ids(logits, *others[:3], ours, *others[3:])[3] == alone[0]
    assert token_ids(logits[3].expand(2, -1), ours, greedy())[0] == alone[0]


def test_seeds_and_positions_differ():
    by_seed = {token_ids(RISING, make_sequence(seed=seed))[0] for seed in range(50)}
    by_position = {token_ids(RISING, make_sequence(seed=1, outputs=[0] * n))[0] for n in range(50)}
    assert len(by_seed) > 5
    assert len(by_position) > 5


def test_top_k():
    assert set(draw(RISING, 300, top_k=3)) == {13, 14, 15}
    assert set(draw(RISING, 50, top_k=1)) == {15}
    assert len(draw(RISING, 2000, top_k=VOCAB + 9)) == VOCAB


def test_top_p_keeps_the_token_that_crosses_the_limit():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw(logits, 300, top_p=0.5)) == {0}
    assert set(draw(logits, 300, top_p=0.51)) == {0, 1}
    assert set(draw(logits, 300, top_p=0.9)) == {0, 1, 2}
    assert set(draw(logits, 300, top_p=1e-9)) == {0}


def test_top_p_applies_to_what_top_k_leaves():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draw(logits, 300, top_k=2, top_p=0.55)) == {0}
    assert set(draw(logits, 300, top_p=0.55)) == {0, 1}


@pytest.mark.parametrize("num_candidates", [1, 4, 1024])
def test_the_number_of_candidates_looked_at_first_changes_nothing(monkeypatch, num_candidates):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 200, generator=generator)
    sequences = [
        make_sequence(seed=0, top_p=0.95),
        make_sequence(seed=1, top_k=7),
        make_sequence(seed=2, top_k=50, top_p=0.3),
        make_sequence(seed=3),
        make_sequence(seed=4, min_p=0.2),
        make_sequence(seed=5, top_p=0.01),
    ]
    expected = token_ids(logits, *sequences)
    monkeypatch.setattr(sampler_module, "_NUM_CANDIDATES", num_candidates)
    assert token_ids(logits, *sequences) == expected
    kept = sampler_module._keep_top(logits[:4], [0, 7, 50, 0], [0.95, 1.0, 0.3, 1.0]).isfinite().sum(dim=-1)
    assert kept[1] == 7
    assert kept[3] == 200
    assert 1 <= kept[2] < 50 < kept[0] < 200


def test_a_row_without_filters_is_untouched_beside_one_with():
    sequences = [make_sequence(seed=1, outputs=[0] * n) for n in range(40)]
    alone = token_ids(RISING, *sequences)
    assert token_ids(RISING, *sequences, make_sequence(seed=0, top_k=1))[:-1] == alone


def test_min_p_is_relative_to_the_likeliest():
    logits = torch.tensor([0.6, 0.3, 0.07, 0.03]).log()
    assert set(draw(logits, 400, min_p=0.4)) == {0, 1}
    assert set(draw(logits, 400, min_p=0.1)) == {0, 1, 2}


def test_repetition_penalty_counts_prompt_and_output():
    logits = torch.zeros(VOCAB)
    logits[[1, 5, 9]] = torch.tensor([4.0, 3.9, 3.0])
    assert token_ids(logits, greedy(repetition_penalty=2.0)) == [5]
    assert token_ids(logits, greedy(repetition_penalty=2.0, outputs=[5])) == [9]
    assert token_ids(-1 - logits, greedy(prompt=range(15), repetition_penalty=1.5)) == [15]


def test_presence_and_frequency_penalties_count_outputs_only():
    logits = torch.zeros(VOCAB)
    logits[[1, 5]] = torch.tensor([2.0, 1.5])
    assert token_ids(logits, greedy(presence_penalty=1.0)) == [1]
    assert token_ids(logits, greedy(presence_penalty=1.0, outputs=[1])) == [5]
    assert token_ids(logits, greedy(frequency_penalty=0.3, outputs=[1])) == [1]
    assert token_ids(logits, greedy(frequency_penalty=0.3, outputs=[1, 1])) == [5]


def test_logit_bias_forces_and_forbids():
    assert token_ids(RISING, greedy(logit_bias={2: 100.0})) == [2]
    assert token_ids(RISING, greedy(logit_bias={15: -100.0})) == [14]


def test_stops_are_forbidden_until_min_tokens():
    logits = torch.zeros(VOCAB)
    logits[[EOS, 7, 8]] = torch.tensor([9.0, 8.0, 7.0])
    stops = frozenset({7})
    assert token_ids(logits, greedy(min_tokens=2, outputs=[1], stop_token_ids=stops)) == [8]
    assert token_ids(logits, greedy(min_tokens=2, outputs=[1, 1], stop_token_ids=stops)) == [EOS]


def test_logprobs_are_the_models_whatever_is_done_to_the_logits():
    expected = RISING.log_softmax(dim=-1)
    plain, biased, without = sample(
        RISING, greedy(logprobs=2), greedy(logprobs=0, logit_bias={2: 100.0}), greedy(logit_bias={2: 100.0})
    )
    assert plain.logprob == pytest.approx(float(expected[15]))
    assert [token for token, _ in plain.top_logprobs] == [15, 14]
    assert plain.top_logprobs[1][1] == pytest.approx(float(expected[14]))
    assert (biased.token_id, biased.top_logprobs) == (2, ())
    assert biased.logprob == pytest.approx(float(expected[2]))
    assert without.logprob is None


def test_rows_that_are_not_numbers_fail_alone():
    logits = torch.stack([RISING, torch.full((VOCAB,), math.nan), RISING, RISING.clone().fill_(-math.inf)])
    results = sample(logits, greedy(), greedy(), make_sequence(seed=1, top_p=0.5), make_sequence(seed=1))
    assert [isinstance(result, InternalError) for result in results] == [False, True, False, True]
    assert results[0].token_id == 15


def test_only_what_a_constraint_allows_is_chosen_and_only_in_its_row():
    sequences = [greedy(), constrained(1, 4, temperature=0.0), greedy(), constrained(0, temperature=0.0)]
    assert token_ids(RISING, *sequences) == [15, 4, 15, 0]


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.9}, {"temperature": 0.01}])
def test_filters_choose_among_what_a_constraint_allows(filters):
    sequences = [constrained(2, 5, outputs=[0] * position, seed=3, **filters) for position in range(64)]
    assert set(token_ids(RISING, *sequences)) <= {2, 5}


def test_a_constraint_beats_bias_and_penalties():
    wishes = {"logit_bias": {7: 100.0, 4: -100.0}, "presence_penalty": 2.0, "repetition_penalty": 9.0}
    assert token_ids(RISING, constrained(4, outputs=[4, 4], temperature=0.0, **wishes)) == [4]


def test_bias_counts_among_what_a_constraint_allows():
    assert token_ids(RISING, constrained(1, 2, 4, temperature=0.0, logit_bias={2: 50.0})) == [2]


def test_forbidden_stops_give_way_only_where_nothing_else_is_allowed():
    """``min_tokens`` forbids every stop, ``ignore_eos`` those of the model."""
    early: dict[str, Any] = {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": frozenset({4})}
    endless: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    falling = -RISING
    cases: list[tuple[tuple[int, ...], dict[str, Any], int]] = [
        ((EOS, 4, 9), early, 9),
        ((EOS, 4), early, EOS),
        ((EOS, 9), endless, 9),
        ((EOS,), endless, EOS),
        ((EOS, 9), {"temperature": 0.0}, EOS),
    ]
    for allowed, sampling, expected in cases:
        assert token_ids(falling, constrained(*allowed, **sampling)) == [expected], (allowed, sampling)


def test_logprobs_are_those_of_the_model_without_the_constraint():
    (result,) = sample(RISING, constrained(2, temperature=0.0, logprobs=1))
    assert result.logprob == pytest.approx(float(RISING.log_softmax(dim=-1)[2]))
    assert result.top_logprobs[0][0] == 15


def test_a_constraint_that_cannot_go_on_fails_alone():
    lost = constrained(3)
    lost.constraint.error = InvalidRequest("too complex")
    first, second, third = sample(RISING, greedy(), lost, greedy())
    assert (first.token_id, third.token_id) == (15, 15)
    assert second is lost.constraint.error


def test_a_mask_may_be_longer_than_the_vocabulary():
    sequence = greedy()
    sequence.constraint = Steps({5, 200}, vocab_size=224)
    assert token_ids(RISING, sequence) == [5]


def test_a_bad_word_is_never_completed():
    words = BadWords([[4, 15], [14], [0, 1, 2]])
    assert token_ids(RISING, greedy(bad_words=words)) == [15]
    assert token_ids(RISING, greedy(bad_words=words, outputs=[4])) == [13]
    drawn = draw(torch.zeros(VOCAB), 300, bad_words=BadWords([[0, 15], [14]]))
    assert 14 not in drawn and drawn[15] <= 1, "only the first one has no 0 before it"
    assert draw(RISING, 200, top_k=1, bad_words=words).keys() == {15}
    assert draw(RISING, 200, min_p=0.9, bad_words=BadWords([[15], [14]])).keys() == {13}


def test_a_constraint_that_leaves_nothing_but_a_bad_word_gets_it():
    words = BadWords([[14], [15]])
    assert token_ids(RISING, constrained(14, temperature=0.0, bad_words=words)) == [14]
    assert token_ids(RISING, constrained(14, bad_words=words)) == [14]
    assert token_ids(RISING, constrained(3, 14, bad_words=words)) == [3]
