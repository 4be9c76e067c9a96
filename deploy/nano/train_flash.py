"""Train nano-flash from nano by the two stages of InternVL3.5's ViCO, then measure it.

    python -m deploy.nano.train_flash --out DIR [--scale 1.0] [--eval-only]

Consistency: nano with all its tokens is the frozen reference; the policy, with 256 or 64 tokens per tile, learns to
say the same. Router: only pooling and gating learn, which tiles lose nothing by having 64 tokens. Tower and `mlp1`
stay as they are. A run that was stopped continues behind the last stage that ended, from the files in --work.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from deploy.nano.batches import Speech
from deploy.nano.evaluate_flash import measure, write_card
from deploy.nano.flash import COMPRESSED, FULL, NANO, NANO_FLASH, FlashNano, export, load_flash, load_parts, save_parts
from deploy.nano.questions import (
    CHUNK,
    SEED,
    SIDE,
    TASKS,
    Question,
    answer,
    draw_questions,
    make_chunk,
    read_chunk,
    read_texts,
    stackable,
)
from deploy.nano.tokenizer import train_tokenizer

LEARNING_RATE: Final = 2e-3
WORKERS: Final = 2  # processes of one thread
VALIDATION: Final = range(8)
"""Chunks that no step sees: the absolute threshold is chosen on them."""
CHUNKS: Final = range(8, 88)
PERCENTILE: Final = 75
"""Of past loss ratios: what is below is worth compressing."""
FLOOR: Final = 0.01
"""Nats per token, added to both losses: the ratio of two that are next to nothing says nothing."""
WINDOW: Final = 2048
"""Past loss ratios that the percentile is taken of."""
COMPRESSED_SHARE: Final = 0.68
"""Of the validation pictures; sets the absolute threshold."""


@dataclass(frozen=True)
class Stage:
    """``steps`` batches of ``batch`` questions; ``parts`` of the model learn, each with its factor of the rate.

    Fresh pictures keep one of ``squares`` squares; without any, whole tiles are taken from the chunks.
    """

    name: str
    steps: int
    batch: int
    parts: dict[str, float]
    lr: tuple[float, float]  # from first step to last
    squares: tuple[int, ...] = ()
    counts: tuple[int, ...] = (COMPRESSED, FULL)  # tokens of a tile, one of them drawn for each question
    tasks: dict[str, float] = field(default_factory=lambda: TASKS)  # share of each among fresh questions
    start: dict[str, float] = field(default_factory=dict)  # the mean of what these ended with, else the stage before
    warmup: int = 50  # steps


BOTH: Final = {"mlp2.": 1.0, "language_model.": 0.5}
GATE: Final = {"pooling_before_gating.": 1.0, "gating.": 1.0}
MEAN: Final = {"tiles-2": 0.15, "tiles-3": 0.15, "tiles-4": 0.2, "tiles-5": 0.25, "tiles-6": 0.25}
"""The mean of several ends reads better than each of them."""
WHOLE: Final = (SIDE**2,)
"""Squares of whole tiles."""
OFTEN_COMPRESSED: Final = (COMPRESSED, COMPRESSED, FULL)
HARD: Final = {"number": 0.27, "shape": 0.33, "count": 0.12, "pair": 0.28}
"""More of what 64 tokens lose most."""
CONSISTENCY: Final = (
    # While the language model is the reference's, 256 tokens have nothing to learn.
    Stage("projector", 1000, 64, {"mlp2.": 1.0}, (1.0, 1.0), (12, 16), (COMPRESSED,)),
    Stage("squares-1", 400, 64, BOTH, (1.0, 0.9), (12, 16, 24)),
    Stage("tiles-1", 300, 32, BOTH, (0.6, 0.0)),
    Stage("squares-2", 200, 64, BOTH, (0.8, 0.7), (16, 24, 32)),
    Stage("tiles-2", 300, 32, BOTH, (0.5, 0.0)),
    Stage("tiles-3", 450, 32, BOTH, (0.7, 0.0)),
    Stage("squares-4", 100, 64, BOTH, (0.8, 0.8), (16, 24, 32), start={"tiles-1": 0.2, "tiles-2": 0.4, "tiles-3": 0.4}),
    Stage("tiles-4", 150, 32, BOTH, (0.5, 0.0)),
    Stage(
        "squares-5", 100, 64, BOTH, (0.8, 0.8), (16, 24, 32),
        start={"tiles-1": 0.1, "tiles-2": 0.2, "tiles-3": 0.2, "tiles-4": 0.5},
    ),
    Stage("tiles-5", 120, 32, BOTH, (0.5, 0.0)),
    Stage(
        "squares-6", 100, 64, BOTH, (0.8, 0.8), (16, 24, 32),
        start={"tiles-2": 0.2, "tiles-3": 0.2, "tiles-4": 0.3, "tiles-5": 0.3},
    ),
    Stage("tiles-6", 120, 32, BOTH, (0.5, 0.0)),
    Stage("fresh-1", 100, 48, BOTH, (0.8, 0.74), WHOLE, OFTEN_COMPRESSED, HARD, start=MEAN),
    Stage("fresh-2", 84, 48, BOTH, (0.7, 0.0), WHOLE, OFTEN_COMPRESSED, HARD, warmup=10),
    Stage(
        "fresh-3", 90, 48, BOTH, (0.4, 0.0), WHOLE, OFTEN_COMPRESSED, HARD, warmup=10,
        start={"tiles-2": 0.1, "tiles-3": 0.1, "tiles-4": 0.1, "tiles-5": 0.15, "tiles-6": 0.15, "fresh-2": 0.4},
    ),
)  # fmt: skip
POLICY: Final = {
    "tiles-2": 0.105, "tiles-3": 0.105, "tiles-4": 0.14, "tiles-5": 0.175, "tiles-6": 0.175,
    "fresh-2": 0.1, "fresh-3": 0.2,
}  # fmt: skip
"""The policy that is published."""
ROUTER: Final = (
    Stage("router-1", 200, 64, GATE, (0.5, 0.0), start=MEAN),
    Stage("router-2", 350, 64, GATE, (0.6, 0.0)),
    Stage("router-3", 200, 64, GATE, (0.6, 0.0)),
    Stage("router-4", 110, 64, GATE, (0.4, 0.0), warmup=10, start=POLICY),
)


class Learner:
    """The weights of a stage that learn: float32 masters beside those that compute, and their optimizers.

    Muon moves the matrices, AdamW embeddings, norms and biases.
    """

    def __init__(self, model: FlashNano, stage: Stage) -> None:
        self._weights: list[nn.Parameter] = []
        self._masters: list[nn.Parameter] = []
        self._optimizers: list[tuple[float, torch.optim.Optimizer]] = []
        for part, rate in stage.parts.items():
            self._add(learning(model, [part]), rate)

    def _add(self, weights: dict[str, nn.Parameter], rate: float) -> None:
        matrices, others = [], []
        for name, weight in weights.items():
            master = nn.Parameter(weight.detach().float().clone())
            is_matrix = weight.dim() == 2 and "embed_tokens" not in name and "query_token" not in name
            (matrices if is_matrix else others).append(master)
            self._masters.append(master)
            self._weights.append(weight)
        muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
        self._optimizers += [(rate, muon), (rate, adamw)]

    def flat(self) -> np.ndarray:
        """All masters in one: float32."""
        return parameters_to_vector(self._masters).detach().numpy()

    def step(self, gradient: Tensor, factor: float) -> None:
        """Move the masters by a flat ``gradient`` and round them into the weights."""
        parts = gradient.split([master.numel() for master in self._masters])
        for master, part in zip(self._masters, parts, strict=True):
            master.grad = part.view_as(master)
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        for rate, optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate * factor
            optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.copy_(master)


def learning(model: FlashNano, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of ``parts``, part by part; a tied head is its embedding."""
    named = list(model.named_parameters())
    return {name: weight for part in parts for name, weight in named if name.startswith(part)}


def steps_of(stage: Stage) -> Iterator[tuple[int, float]]:
    """Every step with its learning-rate factor: a short rise, then half a cosine."""
    first, last = stage.lr
    for step in tqdm(range(stage.steps), stage.name, mininterval=30):
        factor = last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        yield step, factor * min(1.0, (step + 1) / stage.warmup)


def learn_consistency(model: FlashNano, stage: Stage, folder: Path, workers: Sequence[Executor]) -> list[float]:
    """Move ``stage.parts`` towards the reference; returns KL(reference || policy) per answer token of every step."""
    learner = Learner(model, stage)
    losses: list[float] = []
    frozen = {name: p.detach() for name, p in model.named_parameters() if name.startswith(("mlp2.", "language_model."))}
    for worker in workers:
        worker.submit(start_from, frozen).result()
    for step, factor in steps_of(stage):
        flat = learner.flat()
        jobs = [worker.submit(gradients, flat, stage, folder, step, i) for i, worker in enumerate(workers)]
        parts = [job.result() for job in jobs]
        learner.step(torch.from_numpy(sum(gradient for _, gradient in parts) / len(parts)), factor)
        losses.append(sum(loss for loss, _ in parts) / len(parts))
        if step % 100 == 99:
            tqdm.write(f"step {step + 1} [{stage.name}] KL {np.mean(losses[-100:]):.4f}")
    return losses


@cache
def computing() -> tuple[FlashNano, FlashNano, Speech, list[Question]]:
    """A worker's policy and reference, and the questions without pictures."""
    speech, reference = Speech(train_tokenizer()), load_flash(NANO)
    return load_flash(NANO), reference, speech, read_texts(reference, speech)


def draw_chunk(folder: Path, number: int) -> None:
    _, reference, speech, _ = computing()
    make_chunk(folder, number, reference, speech)


def start_from(weights: dict[str, Tensor]) -> None:
    """Give a worker's policy the weights that the stages before have learnt."""
    policy = dict(computing()[0].named_parameters())
    for name, weight in weights.items():
        policy[name].data.copy_(weight)


def gradients(flat: np.ndarray, stage: Stage, folder: Path, step: int, which: int) -> tuple[float, np.ndarray]:
    """A worker's share of a step under flat float32 weights: loss per answer token, flat float32 gradient."""
    policy, reference, speech, texts = computing()
    weights = list(learning(policy, list(stage.parts)).values())
    with torch.no_grad():
        vector_to_parameters(torch.from_numpy(flat).to(policy.dtype), weights)
    for weight in weights:
        weight.requires_grad_()
        weight.grad = None
    rng = np.random.default_rng((SEED, *stage.name.encode(), step, which))
    questions = drawn_for(stage, folder, reference, speech, rng, stage.batch // WORKERS)
    loss = loss_of(policy, questions + (texts if step % 8 == 0 else []), stage.counts, speech, rng)
    loss.backward()
    for weight in weights:
        weight.requires_grad_(False)
    gradient = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    return loss.item(), parameters_to_vector(gradient).float().numpy()


def drawn_for(
    stage: Stage, folder: Path, reference: FlashNano, speech: Speech, rng: np.random.Generator, count: int
) -> list[Question]:
    """``count`` questions, fresh or out of the chunks."""
    if stage.squares:
        return draw_questions(reference, speech, rng, count, int(rng.choice(stage.squares)), shares=stage.tasks)
    numbers = rng.choice(CHUNKS, count)
    return [known_chunk(folder, int(number))[int(rng.integers(CHUNK))] for number in numbers]


@cache
def known_chunk(folder: Path, number: int) -> list[Question]:
    return read_chunk(folder, number)


def loss_of(
    policy: FlashNano,
    questions: Sequence[Question],
    counts: Sequence[int],
    speech: Speech,
    rng: np.random.Generator,
) -> Tensor:
    """Loss per answer token; every question draws its tokens per tile from ``counts``.

    KL(reference || policy) where the reference is known, else cross-entropy: of a few squares nano itself reads less.
    """
    total, num_tokens = torch.zeros(()), 0
    for alike in stackable(questions):
        chosen = rng.choice(counts, len(alike))
        for count in set(chosen.tolist()):
            group = [question for question, its in zip(alike, chosen, strict=True) if its == count]
            said = answer(policy, group, [count] * len(group[0].patches), speech)
            known = [question.reference for question in group if question.reference is not None]
            if known:
                loss = F.kl_div(said.log_probabilities, torch.cat(known), reduction="sum", log_target=True)
            else:
                loss = F.nll_loss(said.log_probabilities, said.labels, reduction="sum")
            total = total + loss
            num_tokens += len(said.labels)
    return total / num_tokens


def learn_router(model: FlashNano, stage: Stage, folder: Path, speech: Speech) -> list[float]:
    """Returns the cross-entropy of every step. Pooling and gating learn in float32 and are rounded at the end."""
    model.pooling_before_gating.float()
    model.gating.float()
    learner, weights = Learner(model, stage), list(learning(model, list(stage.parts)).values())
    window: deque[float] = deque(maxlen=WINDOW)
    known: dict[tuple[int, int], float] = {}  # the policy stays as it is, and so do its losses
    losses: list[float] = []
    for step, factor in steps_of(stage):
        rng = np.random.default_rng((SEED, *stage.name.encode(), step))
        questions = drawn_for(stage, folder, model, speech, rng, stage.batch)
        known |= loss_ratios(model, [question for question in questions if question.key not in known], speech)
        keeps = torch.tensor(labels_of([known[question.key] for question in questions], window))
        keeps = keeps.repeat_interleave(torch.tensor([len(question.patches) for question in questions]))
        if len(window) < WINDOW // 2:
            continue  # a percentile of few ratios says little
        for weight in weights:
            weight.requires_grad_()
        scores = model.scores(torch.cat([question.patches for question in questions]).float())
        loss = F.binary_cross_entropy(scores, 1.0 - keeps)
        learner.step(parameters_to_vector(torch.autograd.grad(loss, weights)), factor)
        losses.append(loss.item())
        if step % 100 == 99:
            tqdm.write(f"step {step + 1} [{stage.name}] cross-entropy {np.mean(losses[-100:]):.4f}")
    for part in (model.pooling_before_gating, model.gating):
        part.requires_grad_(False).to(model.dtype)
    return losses


def labels_of(ratios: Sequence[float], window: deque[float]) -> list[int]:
    """0, compress, for every ratio below the percentile of the past ones, else 1; then they are past, too."""
    threshold = np.percentile(window, PERCENTILE) if window else math.inf
    window.extend(ratios)
    return [int(ratio >= threshold) for ratio in ratios]


@torch.inference_mode()
def loss_ratios(model: FlashNano, questions: Sequence[Question], speech: Speech) -> dict[tuple[int, int], float]:
    """By a question's key: the loss of its answer with 64 tokens per tile over that with 256."""
    ratios: dict[tuple[int, int], float] = {}
    for group in stackable(questions):
        num_images = len(group[0].patches)
        compressed, full = (
            answer(model, group, [count] * num_images, speech).losses() + FLOOR for count in (COMPRESSED, FULL)
        )
        ratios |= zip([question.key for question in group], (compressed / full).tolist(), strict=True)
    return ratios


@torch.inference_mode()
def choose_threshold(model: FlashNano, questions: Sequence[Question]) -> float:
    """The score that COMPRESSED_SHARE of the questions' pictures reach."""
    scores = torch.cat([model.scores(question.patches) for question in questions]).float()
    return round(float(torch.quantile(scores, 1 - COMPRESSED_SHARE)), 4)


def average(model: FlashNano, shares: dict[str, float], work: Path) -> None:
    """Give the model the mean of what stages ended with, weighted by ``shares``."""
    if not shares:
        return
    ends = {name: load_file(work / f"{name}.safetensors") for name in shares}
    for name, weight in learning(model, list(BOTH)).items():
        weight.data.copy_(torch.stack([share * ends[stage][name].float() for stage, share in shares.items()]).sum(0))


def train(work: Path, scale: float, workers: Sequence[Executor]) -> tuple[FlashNano, float]:
    """Both stages; returns the model and its absolute threshold."""
    speech, model = Speech(train_tokenizer()), load_flash(NANO)
    work.mkdir(parents=True, exist_ok=True)
    numbers = (*VALIDATION, *CHUNKS)
    jobs = [workers[number % len(workers)].submit(draw_chunk, work, number) for number in numbers]
    for job in tqdm(jobs, "drawing", mininterval=30):
        job.result()
    for stage in CONSISTENCY:
        run(model, stage, work, lambda stage: learn_consistency(model, stage, work, workers), scale)
    for stage in ROUTER:
        run(model, stage, work, lambda stage: learn_router(model, stage, work, speech), scale)
    validation = [question for number in VALIDATION for question in read_chunk(work, number)]
    return model, choose_threshold(model, validation)


def run(model: FlashNano, stage: Stage, work: Path, learn: Callable[[Stage], object], scale: float) -> None:
    """Learn ``stage`` and write down what it ended with, or read that if it is there."""
    path = work / f"{stage.name}.safetensors"
    average(model, stage.start, work)
    if not path.exists():
        learn(replace(stage, steps=max(round(stage.steps * scale), 1)))
        save_parts(model, tuple(stage.parts), path)
    load_parts(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=NANO_FLASH, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("nano_flash_work"), help="for resuming")
    parser.add_argument("--scale", type=float, default=1.0, help="stretch every stage")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--count", type=int, default=1000, help="held-out samples per task")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the workers use the cores
    if not args.eval_only:
        spawn = multiprocessing.get_context("spawn")
        workers = [ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) for _ in range(WORKERS)]
        model, threshold = train(args.work, args.scale, workers)
        export(model, args.out, threshold)
    rows = measure(load_flash(NANO), load_flash(args.out), Speech(train_tokenizer()), args.count)
    if (args.out / "README.md").exists():
        write_card(args.out / "README.md", rows)


if __name__ == "__main__":
    main()
