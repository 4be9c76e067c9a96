"""Questions of the second training, about pictures that the frozen tower has seen, and what a model says to them.

A training sample keeps squares of a picture: 4 x 4 patches, one compressed or four full image tokens. Fresh questions
keep a few squares; those of a chunk keep all, are drawn once and lie on disk with what the reference says. Every draw
is a function of seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from deploy.nano import data
from deploy.nano.batches import Group, Speech, kind_of, roughen
from deploy.nano.flash import FULL, FlashNano
from deploy.nano.train import IGNORE, stack_tails

SEED: Final = 20261
CHUNK: Final = 128
"""Questions, some 150 pictures, 40 MB."""
SIDE: Final = 8
"""Squares a side of a tile."""
TASKS: Final = {"number": 0.34, "shape": 0.3, "count": 0.18, "pair": 0.18}
LIMITS: Final = data.Limits(digit_weights=(1, 1.5, 2.5, 3))


@dataclass(frozen=True)
class Question:
    """A question and what its pictures look like to the tower.

    ``patches`` bfloat16 ``[images, K * 16, 128]`` of ``squares`` int ``[images, K]``; ``reference`` float32 ``[answer
    tokens, vocabulary]``, the reference's log-probabilities, where they are known.
    """

    key: tuple[int, int]  # chunk and place in it
    patches: Tensor
    squares: Tensor
    tail: tuple[list[int], int]  # token ids after the last image token, answer start
    label: str
    reference: Tensor | None = None


@dataclass(frozen=True)
class Answers:
    """What a model says at every position of the right answers: float32 ``[all tokens, vocabulary]``.

    ``labels`` are the right tokens and ``rows`` the questions they belong to, both int ``[all tokens]``.
    """

    log_probabilities: Tensor
    labels: Tensor
    rows: Tensor

    def losses(self) -> Tensor:
        """Mean cross-entropy of each question's answer ``[questions]``, never quite zero."""
        losses = F.nll_loss(self.log_probabilities, self.labels, reduction="none")
        sums = torch.zeros(int(self.rows[-1]) + 1).index_add_(0, self.rows, losses)
        return (sums / self.rows.bincount()).clamp_min(1e-6)

    def are_right(self) -> list[bool]:
        """Whether greedy decoding says each question's answer token by token."""
        num_questions = int(self.rows[-1]) + 1
        wrong = self.rows[self.log_probabilities.argmax(1) != self.labels].bincount(minlength=num_questions)
        return (wrong == 0).tolist()


def answer(model: FlashNano, questions: Sequence[Question], counts: Sequence[int], speech: Speech) -> Answers:
    """What ``model`` says to ``questions`` that can be stacked; ``counts``: tokens of their first image, the second."""
    tail, labels = stack_tails(Group(tails=[question.tail for question in questions]))
    images = [
        model.tokens(
            torch.stack([question.patches[image] for question in questions]),
            torch.stack([question.squares[image] for question in questions]),
            count,
        )
        for image, count in enumerate(counts)
    ]
    wanted = labels != IGNORE
    logits = model.logits(images, tail, speech)[wanted].float()
    return Answers(logits.log_softmax(-1), labels[wanted], wanted.nonzero()[:, 0])


def stackable(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions by number of images and of squares."""
    groups: dict[torch.Size, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.squares.shape].append(question)
    return list(groups.values())


@torch.inference_mode()
def draw_questions(
    model: FlashNano,
    speech: Speech,
    rng: np.random.Generator,
    count: int,
    num_squares: int,
    chunk: int = 0,
    shares: Mapping[str, float] = TASKS,
) -> list[Question]:
    """``count`` fresh questions, of every task its share, about pictures of which ``num_squares`` squares are kept."""
    tasks = [str(task) for task in rng.choice(list(shares), count, p=list(shares.values()))]
    drawn = [_draw(task, rng, num_squares) for task in tasks]
    pixels = [
        torch.from_numpy(roughen(cut_squares(scene.planes(), kept), rng))
        for one, squares in drawn
        for scene, kept in zip(one.scenes, squares, strict=True)
    ]
    places = torch.from_numpy(np.concatenate([squares for _, squares in drawn]))
    at_once = SIDE**2 // num_squares  # of larger batches a core's caches see nothing
    seen = torch.cat(
        [
            model.see(torch.stack(pixels[start : start + at_once]), places[start : start + at_once])
            for start in range(0, len(pixels), at_once)
        ]
    )
    questions, image = [], 0
    for place, (task, (one, squares)) in enumerate(zip(tasks, drawn, strict=True)):
        images = slice(image, image + len(squares))
        tail = speech.tail(one.question, one.answer, len(squares))
        questions.append(Question((chunk, place), seen[images], places[images], tail, kind_of(task, one.answer)))
        image += len(squares)
    return questions


def _draw(task: str, rng: np.random.Generator, num_squares: int) -> tuple[data.Drawn, np.ndarray]:
    """A question of ``task`` whose pictures fit into ``num_squares`` squares, and these: int [images, K]."""
    while True:
        drawn = data.draw(task, rng, LIMITS)
        kept = [keep_squares(scene, num_squares, rng) for scene in drawn.scenes]
        if all(squares is not None for squares in kept):
            return drawn, np.stack([squares for squares in kept if squares is not None])


def keep_squares(scene: data.Scene, num_squares: int, rng: np.random.Generator) -> np.ndarray | None:
    """The touched squares and random empty ones, sorted: int [num_squares]; None if they do not fit."""
    touched = scene.cells().reshape(SIDE, 2, SIDE, 2).any((1, 3)).ravel()
    order = rng.random(touched.size)
    order[touched] -= 1
    if touched.sum() > num_squares:
        return None
    return np.sort(np.argpartition(order, num_squares - 1)[:num_squares])


def cut_squares(planes: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Patches of ``squares`` of a tile [3, 448, 448], row by row inside a square: uint8 [K * 16, 588 = 3*14*14]."""
    grid = planes.reshape(3, SIDE, 4, 14, SIDE, 4, 14).transpose(1, 4, 2, 5, 0, 3, 6)
    return grid[squares // SIDE, squares % SIDE].reshape(len(squares) * 16, 588)


def make_chunk(folder: Path, number: int, reference: FlashNano, speech: Speech) -> None:
    """Write a chunk's questions with what the reference says, if they are not there; never half of them."""
    path = _path(folder, number)
    if path.exists():
        return
    questions = draw_questions(reference, speech, np.random.default_rng((SEED, number)), CHUNK, SIDE**2)
    with torch.inference_mode():
        said = [
            answer(reference, [question], [FULL] * len(question.patches), speech).log_probabilities
            for question in questions
        ]
    texts = [(len(question.patches), *question.tail, question.label) for question in questions]
    aside = path.with_suffix(".new")
    tensors = {"patches": torch.cat([question.patches for question in questions]), "reference": torch.cat(said)}
    save_file(tensors, aside, {"questions": json.dumps(texts)})
    aside.rename(path)


def reference_says(reference: FlashNano, question: Question, speech: Speech) -> Tensor:
    """Log-probabilities ``[answer tokens, vocabulary]``, with all tokens of every tile."""
    return answer(reference, [question], [FULL] * len(question.patches), speech).log_probabilities


def read_chunk(folder: Path, number: int) -> list[Question]:
    """The questions of a chunk; their patches stay in the file until they are used."""
    with safe_open(_path(folder, number), "pt") as file:
        patches, reference = file.get_tensor("patches"), file.get_tensor("reference")
        texts = json.loads(file.metadata()["questions"])
    questions, image, token = [], 0, 0
    for place, (num_images, ids, start, label) in enumerate(texts):
        images, tokens = slice(image, image + num_images), slice(token, token + len(ids) - start)
        squares = torch.arange(SIDE**2).expand(num_images, -1)
        questions.append(Question((number, place), patches[images], squares, (ids, start), label, reference[tokens]))
        image, token = images.stop, tokens.stop
    return questions


def read_texts(reference: FlashNano, speech: Speech) -> list[Question]:
    """The questions without a picture, each once, with what the reference says."""
    nothing = torch.empty(0, 0, 128), torch.empty(0, 0, dtype=torch.int64)
    questions = [
        Question((-1, place), *nothing, speech.tail(text, data.ABOUT, 0), "text")
        for place, text in enumerate(data.QUESTIONS["text"])
    ]
    with torch.inference_mode():
        return [replace(question, reference=reference_says(reference, question, speech)) for question in questions]


def _path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:04d}.safetensors"
