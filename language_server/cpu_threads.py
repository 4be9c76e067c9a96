"""How many CPU threads a step should use when all it does is generate.

A small batch is soon computed, and threads that wait for one another cost more than they bring; beside a vision server
they also keep it off its cores. So the fewest threads that are nearly as fast as the best number are taken, measured
once at the start. Steps with prompts in them always use all threads.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

import torch

from language_server.engine import LanguageEngine
from language_server.sequence import SamplingParams, Sequence

SHARED_CORES_TOLERANCE: Final = 1.5
"""Slower by this factor with half the threads is a good bargain where somebody else has use for the cores."""
_NUM_SEQUENCES: Final = 4
_NUM_STEPS: Final = 6
_MAX_SECONDS: Final = 0.5
"""For one number of threads; a large model gets fewer steps."""


def tune_decode_threads(
    engine: LanguageEngine,
    tolerance: float = SHARED_CORES_TOLERANCE,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure the engine, which must be idle, and tell it what is best. Does nothing on a GPU or a single thread.

    ``tolerance``: how many times the best time a smaller number of threads may take; 1 where spare cores would idle.
    """
    if engine.device.type != "cpu" or torch.get_num_threads() == 1:
        return
    seq_ids = _start_sequences(engine)
    try:
        engine.decode_threads = fewest_good({n: _step_seconds(engine, n, clock) for n in _candidates()}, tolerance)
    finally:
        for seq_id in seq_ids:
            engine.abort(seq_id)


def fewest_good(seconds: dict[int, float], tolerance: float) -> int:
    """The smallest number of threads whose time is within a tolerance of the best."""
    best = min(seconds.values())
    return min(num_threads for num_threads, time in seconds.items() if time <= tolerance * best)


def _start_sequences(engine: LanguageEngine) -> list[int]:
    """Sequences that generate for as long as we measure."""
    sampling = SamplingParams(max_tokens=engine.max_model_len, temperature=0.0, ignore_eos=True)
    seq_ids = [-1 - index for index in range(min(_NUM_SEQUENCES, engine.config.max_num_seqs))]
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
    """Of the quickest step: what else the machine does can only make one slower."""
    engine.decode_threads = num_threads
    engine.step()
    seconds: list[float] = []
    started = clock()
    while len(seconds) < _NUM_STEPS and clock() - started < _MAX_SECONDS:
        before = clock()
        engine.step()
        seconds.append(clock() - before)
    return min(seconds)
