"""The nano-flash checkpoint: its files, what it reads with 256 and with 64 tokens, and the training that made it."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from common.model.checkpoint import Checkpoint
from common.model.config import load_config
from common.model.geometry import Tiling
from deploy.nano import data, train_flash
from deploy.nano.batches import Speech
from deploy.nano.evaluate import MARKS, ROWS
from deploy.nano.evaluate_flash import OVERALL, batches, measure, overall, route, ways
from deploy.nano.flash import COMPRESSED, FULL, NANO, NANO_FLASH, FlashNano, load_flash
from deploy.nano.questions import answer, cut_squares, make_chunk, read_chunk
from deploy.nano.tokenizer import train_tokenizer
from deploy.settings import model_directory
from vision_server.projector import pixel_shuffle

PICTURES = [("number", 271), ("number", 3), ("number", 5), ("shape", 303), ("shape", 1), ("count", 1), ("pair", 3)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def flash() -> FlashNano:
    return load_flash(NANO_FLASH)


@pytest.fixture(scope="module")
def speech() -> Speech:
    return Speech(train_tokenizer())


def test_the_config_is_that_of_a_published_flash_checkpoint():
    config = load_config(model_directory("nano-flash"))
    assert (config.layout, config.template, config.ps_version, config.select_layer) == (
        "github",
        "internvl2_5",
        "v2",
        -1,
    )
    assert config.tiling == Tiling(1, 12, use_thumbnail=True)
    assert config.flash is not None
    assert 0 <= config.flash.relative_threshold < 0.25 and 0 < config.flash.absolute_threshold < 1
    assert sum(path.stat().st_size for path in NANO_FLASH.iterdir()) < 8e6


def test_its_prompts_are_those_of_nano():
    nano, flash = load_config(NANO), load_config(NANO_FLASH)
    assert (flash.template, flash.system_message, flash.generation) == (
        nano.template,
        nano.system_message,
        nano.generation,
    )
    assert (NANO_FLASH / "tokenizer.json").read_bytes() == (NANO / "tokenizer.json").read_bytes()


def test_tower_and_first_projector_are_those_of_nano(flash):
    nano = dict(load_flash(NANO).named_parameters())
    shared = {name: p for name, p in flash.named_parameters() if name.startswith(("vision_model.", "mlp1."))}
    assert len(shared) == 66
    assert all(torch.equal(parameter, nano[name]) for name, parameter in shared.items())


def test_the_file_holds_what_published_ones_hold_and_never_use():
    with safe_open(NANO_FLASH / "model.safetensors", "pt") as file:
        names = set(file.keys())
    pooling = "pooling_before_gating."
    parts = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    assert {name for name in names if name.startswith(pooling)} == {
        f"{pooling}query_token",
        *(f"{pooling}attn{i}.{part}" for i in range(1, 5) for part in parts),
        *(f"{pooling}norm{i}.{part}" for i in range(1, 5) for part in ("weight", "bias")),
    }
    assert {name for name in names if name.startswith("mlp2.")} == {
        f"mlp2.{i}.{part}" for i in (0, 1, 4, 7) for part in ("weight", "bias")
    }
    assert all(Checkpoint.open(NANO_FLASH).entries[name].dtype == "BF16" for name in names)


def test_squares_are_tokens_of_the_projectors(flash):
    """The training's own way through the tower gives what pixel shuffle and projector make of it, in their order."""
    model = load_flash(NANO_FLASH, torch.float32)
    planes = data.draw("number", np.random.default_rng(0)).scenes[0].planes()
    squares = torch.arange(64)[None]
    with torch.inference_mode():
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.config.image_mean, model.config.image_std))
        patches = model.vision_model(((torch.from_numpy(planes).float() / 255 - mean) / std)[None])[:, 1:]
        seen = model.see(torch.from_numpy(cut_squares(planes, np.arange(64)))[None], squares)
        full, compressed = (model.tokens(seen, squares, count) for count in (FULL, COMPRESSED))
        torch.testing.assert_close(full.values, model.mlp1(pixel_shuffle(patches, 2, "v2")), rtol=0, atol=1e-4)
        torch.testing.assert_close(compressed.values, model.mlp2(pixel_shuffle(patches, 4, "v2")), rtol=0, atol=1e-4)
        torch.testing.assert_close(model.scores(seen), model.scores(patches), rtol=0, atol=1e-4)
    assert full.places.tolist() == [list(range(256))] and compressed.places.tolist() == [list(range(64))]


@pytest.mark.parametrize("way", ["256", "64", "absolute"])
def test_it_reads_pictures(flash, speech, way):
    samples = [data.sample(task, np.random.default_rng(seed)) for task, seed in PICTURES]
    right, tokens = [], 0
    with torch.inference_mode():
        for questions in batches(flash, samples, speech):
            counts = next(counts for name, _, counts in ways(flash, flash, questions) if name == way)
            for question, its in zip(questions, counts, strict=True):
                right += answer(flash, [question], its, speech).are_right()
                tokens += sum(its)
    assert right == [True] * len(samples)
    assert tokens <= 8 * FULL * {"256": 1, "64": 0.25, "absolute": 0.5}[way]


def test_a_single_tile_stays_as_it_is_under_the_relative_threshold(flash):
    thresholds = replace(flash.config.flash, relative_threshold=0.0, absolute_threshold=0.5)
    sure, unsure = torch.tensor([0.9]), torch.tensor([0.9, 0.4, 0.8])
    assert route(sure, "request", thresholds) == (FULL,)
    assert route(sure, "absolute", thresholds) == (COMPRESSED,)
    assert route(unsure, "request", thresholds) == (COMPRESSED, FULL, COMPRESSED)


def test_the_card_has_the_table_that_was_measured():
    """Every row is there, the last is the four tasks' own, and they keep what the card promises."""
    table = (NANO_FLASH / "README.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip().splitlines()[2:]
    rows = {
        name.strip(): [float(cell.strip(" %")) for cell in cells]
        for name, *cells in (line.strip("|").split("|") for line in table)
    }
    assert list(rows) == [*ROWS.values(), "**the four tasks**"]
    tasks, (nano, full, compressed, routed, saved, *_) = (
        [rows[ROWS[task]] for task in OVERALL],
        rows["**the four tasks**"],
    )
    means = [sum(row[column] for row in tasks) / len(tasks) for column in range(4)]
    assert (nano, full, compressed, routed) == pytest.approx(means, abs=0.11)
    images = {"pair": 2}
    weights = [images.get(task, 1) for task in OVERALL]
    assert saved == pytest.approx(np.average([row[4] for row in tasks], weights=weights), abs=0.11)
    assert saved >= 50 and routed >= nano - 1


def test_measuring_counts_answers_and_tokens(flash, speech):
    rows = measure(flash, flash, speech, 2, ("number", "shape", "count", "pair", "text"))
    assert {way: len(right) for way, right in overall(rows).right.items()} == dict.fromkeys(rows["text"].right, 8)
    assert overall(rows).tokens["nano"] == 10 * FULL
    assert overall(rows).saved("64") == 0.75 and overall(rows).saved("256") == 0
    assert rows["text"].saved("64") == 0 and rows["text"].accuracy("64") == 1


@pytest.fixture(scope="module")
def chunk(tmp_path_factory, speech) -> Path:
    """A folder with one chunk of a few questions."""
    folder = tmp_path_factory.mktemp("chunks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.nano.questions.CHUNK", 12)
        make_chunk(folder, 0, load_flash(NANO), speech)
    return folder


def test_a_chunk_is_read_as_it_was_drawn(chunk, speech):
    questions = read_chunk(chunk, 0)
    nano = load_flash(NANO)
    for question in questions:
        with torch.inference_mode():
            said = answer(nano, [question], [FULL] * len(question.patches), speech)
        assert said.are_right() == [True]
        torch.testing.assert_close(said.log_probabilities, question.reference)


def test_the_projector_learns_to_say_what_the_reference_says(chunk, monkeypatch):
    monkeypatch.setattr(train_flash, "CHUNKS", range(1))
    monkeypatch.setattr(train_flash, "CHUNK", 12)
    model = load_flash(NANO)
    before = {name: p.clone() for name, p in model.named_parameters()}
    stage = replace(train_flash.CONSISTENCY[0], steps=12, batch=16, squares=(), warmup=1)
    with ThreadPoolExecutor(1) as worker:
        losses = train_flash.learn_consistency(model, stage, chunk, [worker])
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("mlp2.")}


def test_ratios_below_the_percentile_of_past_ones_are_worth_compressing(monkeypatch):
    monkeypatch.setattr(train_flash, "PERCENTILE", 75)
    window: deque[float] = deque(maxlen=4)
    assert train_flash.labels_of([5.0, 1.0, 2.0, 3.0], window) == [0, 0, 0, 0]  # nothing is past yet
    assert train_flash.labels_of([3.4, 3.6], window) == [0, 1]  # of 1, 2, 3, 5: 3.5
    assert list(window) == [2.0, 3.0, 3.4, 3.6]


def test_the_router_learns_which_pictures_lose_nothing(chunk, speech, monkeypatch):
    """Half of the pictures are said to lose: after a few steps over them their scores are the lower ones."""
    questions = [question for question in read_chunk(chunk, 0) if len(question.patches) == 1][:8]
    loses = {question.key: question.label.startswith("number") for question in questions}
    assert 0 < sum(loses.values()) < len(loses)
    ratios = {key: 9.0 + index / 100 if lost else 1.0 for index, (key, lost) in enumerate(loses.items())}
    share = 100 * (1 - sum(loses.values()) / len(loses))
    for name, value in {"WINDOW": 16, "PERCENTILE": share}.items():
        monkeypatch.setattr(train_flash, name, value)
    monkeypatch.setattr(train_flash, "loss_ratios", lambda model, asked, speech: {q.key: ratios[q.key] for q in asked})
    monkeypatch.setattr(train_flash, "drawn_for", lambda *_: questions)
    model = load_flash(NANO)
    losses = train_flash.learn_router(model, replace(train_flash.ROUTER[0], steps=20, batch=8, warmup=1), chunk, speech)
    assert losses[-1] < 0.5 * losses[0]
    with torch.inference_mode():
        scores = {question.key: model.scores(question.patches).item() for question in questions}
    assert max(scores[key] for key in loses if loses[key]) < min(scores[key] for key in loses if not loses[key])


def test_loss_ratios_are_above_one_where_64_tokens_read_worse(chunk, speech):
    """Nano with a second projector that has learnt nothing: 64 tokens lose everywhere."""
    ratios = train_flash.loss_ratios(load_flash(NANO), read_chunk(chunk, 0), speech)
    assert len(ratios) == 12 and min(ratios.values()) > 1
