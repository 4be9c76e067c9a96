"""How many CPU threads a step should use when all it does is generate, to begin with (``decode_threads`` goes on).

A small batch is soon computed, and threads that wait for one another cost more than they bring; beside a vision server
they also keep it off its cores. So the fewest threads that are nearly as fast as the best number are taken, measured
once at the start: one number for while a vision server works for us, one for the rest of the time. Steps with prompts
in them use all threads, or beside a vision server what is measured likewise: for a small model that is one.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch

from language_server.decode_threads import DecodeThreads, fewest_good
from language_server.engine import LanguageEngine
from language_server.pace import MIN_IMAGE_PREFILL_TOKENS
from language_server.sequence import SamplingParams, Sequence

SHARED_CORES_TOLERANCE: Final = 1.5
"""Slower by this factor with half the threads is a good bargain where somebody else has use for the cores."""
SHARED_PROMPTS_TOLERANCE: Final = 1.3
"""Less than that for steps with prompts: they are long, and who generates waits for their end."""
OWN_CORES_TOLERANCE: Final = 1.2
"""A router and clients need some of them, too."""
_NUM_SEQUENCES: Final = 4
_PROMPT_TOKENS: Final = MIN_IMAGE_PREFILL_TOKENS
_NUM_STEPS: Final = 6
_MAX_SECONDS: Final = 0.5
"""For one number of threads; a large model gets fewer steps."""


def tune_decode_threads(
    engine: LanguageEngine,
    alone: float = OWN_CORES_TOLERANCE,
    shared: float = SHARED_CORES_TOLERANCE,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeThreads | None:
    """Measure the engine, which must be idle, and tell it what is best alone. None on a GPU or a single thread.

    ``alone``, ``shared``: how many times the best time a smaller number of threads may take; 1 where spare cores would
    idle.
    """
    if engine.device.type != "cpu" or torch.get_num_threads() == 1:
        return None
    seq_ids = _start_sequences(engine)
    try:
        seconds = {n: _step_seconds(engine, n, clock) for n in _candidates()}
        # A single place is taken by who generates.
        may_mix = engine.config.max_num_seqs > 1
        with_prompts = {n: _prompt_step_seconds(engine, n, min(seq_ids) - 1, clock) for n in _candidates() if may_mix}
    finally:
        engine.prompt_threads = None
        for seq_id in seq_ids:
            engine.abort(seq_id)
    threads = DecodeThreads(
        list(seconds),
        fewest_good(seconds, alone),
        fewest_good(seconds, shared),
        alone,
        fewest_good(with_prompts, min(shared, SHARED_PROMPTS_TOLERANCE)) if may_mix else None,
    )
    engine.decode_threads = threads.alone
    return threads


def _start_sequences(engine: LanguageEngine) -> list[int]:
    """Sequences that generate for as long as we measure; they leave a place for prompts where there are several."""
    sampling = SamplingParams(max_tokens=engine.max_model_len, temperature=0.0, ignore_eos=True)
    seq_ids = [-1 - index for index in range(max(1, min(_NUM_SEQUENCES, engine.config.max_num_seqs - 1)))]
    for seq_id in seq_ids:
        engine.add(Sequence(seq_id=seq_id, request_id=b"", prompt_token_ids=[0], sampling=sampling))
    engine.step()
    return seq_ids


def _candidates() -> Iterator[int]:
    """1, 2, 4, ... and what the process was given."""
    given = torch.get_num_threads()
    num_threads = 1
    while num_threads < given:
        yield num_threads
        num_threads *= 2
    yield given


def _step_seconds(engine: LanguageEngine, num_threads: int, clock: Callable[[], float]) -> float:
    engine.decode_threads = num_threads
    return _quickest(engine.step, clock)


def _prompt_step_seconds(engine: LanguageEngine, num_threads: int, seq_id: int, clock: Callable[[], float]) -> float:
    """With a prompt in each, whose number is ``seq_id``."""
    engine.prompt_threads = num_threads
    prompt = [0] * max(1, min(_PROMPT_TOKENS, engine.max_model_len - 1))
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    scopes = itertools.count()

    def step() -> None:
        # A scope of its own, or the prompt would be found in the prefix cache.
        engine.add(Sequence(seq_id, b"", prompt, sampling, cache_scope=f"tuning {num_threads} {next(scopes)}"))
        engine.step()
        engine.abort(seq_id)  # where KV memory had no room for it

    return _quickest(step, clock)


def _quickest(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Of some steps: what else the machine does can only make one slower."""
    step()
    seconds: list[float] = []
    started = clock()
    while len(seconds) < _NUM_STEPS and clock() - started < _MAX_SECONDS:
        before = clock()
        step()
        seconds.append(clock() - before)
    return min(seconds)
