"""The engine's benchmark measures both sides with the same weights, and counts the tokens that were generated."""

import json

import pytest
import torch
from transformers.generation.continuous_batching import utils

from benchmarks import engine
from benchmarks.engine import compared, measure
from benchmarks.engine_subjects import make_pair, random_prompts
from benchmarks.page import page
from benchmarks.shares import Load, make_random_model, prefill_operations, weights_read
from common.service.errors import ConfigError


@pytest.fixture(scope="module")
def pair():
    return make_pair(engine.TEXT_SHAPES["tiny"], torch.float32, torch.device("cpu"))


def test_both_sides_say_the_same(pair):
    ours, theirs = pair
    prompt = random_prompts(1, 16, 2048)
    expected = theirs._model.generate(torch.tensor(prompt), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    ours._add(1, 16, 8)
    said = [output.token_id for _ in range(8) for output in ours._engine.step()]
    assert said == expected[0, 16:].tolist()


@pytest.fixture
def small_machine(monkeypatch):
    """``generate_batch`` takes nearly all memory that it sees for its cache, and fills it."""
    monkeypatch.setattr(utils, "_get_numa_nodes_memory", lambda nodes: 2**29)


@pytest.mark.usefixtures("small_machine")
def test_every_case_is_measured_on_both_sides(pair):
    cases = measure(pair, num_rounds=1, num_tokens=4, prefill_tokens=32)
    assert [case["case"] for case in cases] == [
        "decode, batch 1",
        "decode, batch 8",
        "decode, batch 32",
        "prefill, 32 tokens",
        "whole batch of 32",
    ]
    assert all(case[name] > 0 and len(case["rounds"][name]) == 1 for case in cases for name in ("DvD", "transformers"))


def test_rates_are_compared_by_median():
    class Fixed:
        def __init__(self, name, seconds):
            self.name, self._seconds = name, iter(seconds)

        def decode(self, batch, num_tokens):
            return next(self._seconds)

        def prefill(self, num_tokens):
            return 1.0

        def whole_batch(self, batch, num_tokens):
            return 1.0

    warm_up_is_slow = [100.0, 1.0, 1.0, 4.0]
    ours, theirs = Fixed("ours", warm_up_is_slow * 3), Fixed("theirs", [2.0] * 12)
    table = compared(measure([ours, theirs], 3, num_tokens=10, prefill_tokens=5), ["ours", "theirs"])
    assert table.rows[0] == ["decode, batch 1", "10", "5", "2.00 x"]
    assert table.rows[2] == ["decode, batch 32", "320", "160", "2.00 x"]


def test_the_shares_of_a_card_are_measured(tmp_path, capsys):
    """On a CPU, where nothing is compiled or replayed: what the script does on a card it does here."""
    load = Load(batches=(1, 4), context=20, num_tokens=6, prefill=40)
    engine.measure_shares(
        ["--x"], "tiny", torch.float32, torch.device("cpu"), ["fused", "graphs", "eager"], tmp_path, load
    )
    (file,) = tmp_path.glob("*-engine-tiny-cpu.json")
    cases = json.loads(file.read_text())["figures"]
    assert [(case["mode"], case["case"]) for case in cases] == [
        (mode, case)
        for mode in ("eager", "graphs", "fused")
        for case in ("decode, batch 1", "decode, batch 4", "prefill")
    ]
    assert all(case["share"] > 0 and case["copy_bytes_per_s"] > 1e8 for case in cases)
    assert "prefill" in page(tmp_path)
    assert "70%" in capsys.readouterr().out


def test_what_a_step_must_read_and_a_prompt_must_compute():
    """Against the parameters of the model itself, and the definition of attention."""
    shape = engine.TEXT_SHAPES["small"]
    model = make_random_model(shape, torch.float32, torch.device("meta"))
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert weights_read(shape) == matrices - shape.vocab * shape.hidden  # a step reads single rows of the embeddings
    pairs = sum(range(1, 1001))  # of a query and a key that it sees
    expected = 2 * 1000 * (weights_read(shape) - shape.vocab * shape.hidden) + 2 * shape.vocab * shape.hidden
    expected += shape.layers * shape.heads * pairs * 4 * shape.head_dim
    assert prefill_operations(shape, 1000) == pytest.approx(expected, rel=1e-3)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match=r"fast.*unknown"):
        engine.measure_shares([], "tiny", torch.float32, torch.device("cpu"), ["fast"], None)
