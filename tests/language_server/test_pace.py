"""Prompts beside sequences that generate: as many tokens as the allowed delay buys, learnt from the steps."""

from hypothesis import given
from hypothesis import strategies as st

from language_server.pace import MIN_IMAGE_PREFILL_TOKENS, NO_LIMITS, PrefillPace


def run(pace, *, decode_seconds, token_seconds, num_steps=40):
    """Steps of a machine with these costs, every other one with as many prompt tokens as the pace allows."""
    for step in range(num_steps):
        num_tokens = (pace.limits.image_tokens or 512) if step % 2 else 0
        pace.observe(4, num_tokens, decode_seconds + num_tokens * token_seconds)


def test_nothing_is_known_before_both_kinds_of_step_were_seen():
    pace = PrefillPace(2.0)
    assert pace.limits == NO_LIMITS
    pace.observe(1, 0, 0.01)
    assert pace.limits == NO_LIMITS
    pace.observe(0, 512, 0.5)
    assert pace.limits.image_tokens is not None
    assert pace.limits.text_tokens is not None


@given(decode=st.floats(0.001, 1.0), token=st.floats(1e-6, 1e-2), stretch=st.floats(1.2, 4.0))
def test_a_step_takes_no_longer_than_the_stretch_allows(decode, token, stretch):
    pace = PrefillPace(stretch)
    run(pace, decode_seconds=decode, token_seconds=token)
    num_tokens = pace.limits.image_tokens or 0
    assert num_tokens == MIN_IMAGE_PREFILL_TOKENS or decode + num_tokens * token <= 1.001 * stretch * decode
    # ... and wastes little of what it allows.
    assert num_tokens + 17 >= (stretch - 1) * decode / token or num_tokens == MIN_IMAGE_PREFILL_TOKENS


def test_a_gpu_reads_thousands_of_tokens_beside_decodes_and_a_small_cpu_a_hundred():
    gpu, cpu = PrefillPace(2.0), PrefillPace(2.0)
    run(gpu, decode_seconds=0.02, token_seconds=8e-6)
    run(cpu, decode_seconds=0.03, token_seconds=2.5e-4)
    assert gpu.limits.image_tokens is not None and gpu.limits.image_tokens > 2000
    assert cpu.limits.image_tokens == 112


def test_prompts_without_images_have_a_stretch_of_their_own():
    pace = PrefillPace(2.0, 3.0)
    run(pace, decode_seconds=0.02, token_seconds=1e-4)
    assert pace.limits.image_tokens in (192, 200)
    assert pace.limits.text_tokens in (384, 400)


def test_a_step_that_was_held_up_teaches_nothing():
    pace = PrefillPace(2.0)
    run(pace, decode_seconds=0.03, token_seconds=2e-4)
    before = pace.limits.image_tokens
    pace.observe(4, 0, 9.0)
    pace.observe(4, 64, 9.0)
    assert pace.limits.image_tokens == before


def test_it_follows_a_machine_that_changes():
    pace = PrefillPace(2.0)
    run(pace, decode_seconds=0.03, token_seconds=1e-4)
    before = pace.limits.image_tokens or 0
    run(pace, decode_seconds=0.03, token_seconds=2e-4)
    assert pace.limits.image_tokens == before // 32 * 16  # half, in whole granules


def test_where_all_steps_have_prompts_some_go_without_to_show_what_they_cost():
    """Sixteen sequences where one was known: their steps take three times as long, and allow three times as much."""
    pace = PrefillPace(2.0)
    run(pace, decode_seconds=0.01, token_seconds=2e-5)
    before = pace.limits.image_tokens
    allowed = []
    for _ in range(200):
        num_tokens = pace.limits.image_tokens or 0
        allowed.append(num_tokens)
        pace.observe(16, num_tokens, 0.03 + num_tokens * 2e-5)
    assert (before, allowed[-1]) == (496, 1488)
    assert 5 <= allowed.count(0) <= 200 / 16


def test_prompts_alone_are_no_reason_to_go_without():
    pace = PrefillPace(2.0)
    run(pace, decode_seconds=0.03, token_seconds=1e-4)
    for _ in range(100):
        pace.observe(0, 512, 0.05)
        assert pace.limits.image_tokens


def test_a_handful_of_prompt_tokens_says_nothing_of_their_cost():
    pace = PrefillPace(2.0)
    run(pace, decode_seconds=0.03, token_seconds=1e-4)
    before = pace.limits.image_tokens
    for _ in range(40):
        pace.observe(4, 3, 0.06)
        pace.observe(4, 0, 0.03)
    assert pace.limits.image_tokens == before
