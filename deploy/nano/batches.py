"""Training batches: which cells of a picture are kept, their patches, the token ids around them.

Knows nothing of the model. A batch is a function of the seed and the step, so a resumed run draws
what an unbroken one would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from deploy.nano import data
from deploy.nano.tokenizer import prompt

SEED = 20260


@dataclass(frozen=True)
class Stage:
    """`steps` batches whose pictures keep one of `cells` image tokens each."""

    name: str
    steps: int
    cells: tuple[int, ...]
    patches: int  # patches a batch may hold; sets the batch size
    digit_weights: tuple[float, float, float, float]
    max_count: int
    pairs: float  # share of a batch's images that belong to pair questions
    drills: int = 0  # number comparisons without images, see `add_drill`
    lr: tuple[float, float] = (1.0, 1.0)  # learning-rate factor, from first step to last
    singles: tuple[float, float, float] = (0.5, 0.2, 0.3)  # shares of number, shape and count
    is_drill: bool = False  # float32, only the language model's layers move, drills weigh most
    any_pairs: bool = False  # compare numbers of any length, not just of three digits

    @property
    def limits(self) -> data.Limits:
        pairs = self.digit_weights if self.any_pairs else data.FULL.pair_weights
        return data.Limits(self.digit_weights, self.max_count, pairs)


@dataclass
class Group:
    """Questions with the same number of images, ready to be stacked."""

    images: list[np.ndarray] = field(default_factory=list)  # uint8 [cells * 4, 588] each
    cells: list[np.ndarray] = field(default_factory=list)  # int [cells] each
    tails: list[tuple[list[int], int]] = field(default_factory=list)  # token ids, answer start
    labels: list[str] = field(default_factory=list)  # what the running accuracy is kept for

    def half(self, which: int) -> Group:
        """Every second question, from the first (0) or the second (1) on."""
        per_question = len(self.images) // len(self.tails)
        chosen = [
            question * per_question + image
            for question in range(which, len(self.tails), 2)
            for image in range(per_question)
        ]
        images, cells = [self.images[i] for i in chosen], [self.cells[i] for i in chosen]
        return Group(images, cells, self.tails[which::2], self.labels[which::2])


class Speech:
    """Token ids of prompts and answers, cached."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.head = self.ids("<|im_start|>user\n<img>")  # before the first image token
        self.middle = self.ids("</img>\n<img>")  # between the tokens of two images

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def tail(self, question: str, answer: str, num_images: int) -> tuple[list[int], int]:
        """Ids after the last image token, and the index at which the answer starts."""
        ask = self.ids(prompt(question, num_images).split("<IMG_CONTEXT>")[-1])
        return [*ask, *self.ids(answer), *self.ids("<|im_end|>")], len(ask)


def draw_groups(stage: Stage, step: int, speech: Speech) -> list[Group]:
    """The batch of a step: single images, pairs, and every eighth time text alone."""
    rng = np.random.default_rng((SEED, step))
    num_cells = int(rng.choice(stage.cells))
    num_images = max(stage.patches // (num_cells * 4), 4)
    num_pairs = round(num_images * stage.pairs / 2)
    single, pair, text = Group(), Group(), Group()
    for _ in range(num_images - 2 * num_pairs):
        task = str(rng.choice(("number", "shape", "count"), p=stage.singles))
        add(single, task, stage, num_cells, speech, rng)
    for _ in range(num_pairs):
        add(pair, "pair", stage, num_cells, speech, rng)
    for _ in range(8 if step % 8 == 0 else 0):
        add(text, "text", stage, num_cells, speech, rng)
    for _ in range(stage.drills):
        add_drill(text, stage, speech, rng)
    return [group for group in (single, pair, text) if group.tails]


def add(
    group: Group,
    task: str,
    stage: Stage,
    num_cells: int,
    speech: Speech,
    rng: np.random.Generator,
) -> None:
    """Draw questions of `task` until one fits into `num_cells`, and put it into `group`."""
    while True:
        drawn = data.draw(task, rng, stage.limits)
        kept = [keep_cells(scene, num_cells, rng) for scene in drawn.scenes]
        if all(cells is not None for cells in kept):
            break
    for scene, cells in zip(drawn.scenes, kept, strict=True):
        assert cells is not None
        group.images.append(roughen(cut(scene, cells), rng))
        group.cells.append(cells)
    group.tails.append(speech.tail(drawn.question, drawn.answer, len(drawn.scenes)))
    group.labels.append(kind_of(task, drawn.answer))


def add_drill(group: Group, stage: Stage, speech: Speech, rng: np.random.Generator) -> None:
    """A pair question without its images, of which only the verdict is learnt: comparing, not reading."""
    drawn = data.draw("pair", rng, stage.limits)
    ids, start = speech.tail(drawn.question, drawn.answer, 0)
    given = drawn.answer.removesuffix(f" {drawn.short_answer}.")
    group.tails.append((ids, start + len(speech.ids(given))))
    group.labels.append("drill")


def keep_cells(scene: data.Scene, num_cells: int, rng: np.random.Generator) -> np.ndarray | None:
    """The touched cells and random empty ones, sorted: int [num_cells]; None if they do not fit."""
    touched = scene.cells().ravel()
    order = rng.random(touched.size)
    order[touched] -= 1
    if touched.sum() > num_cells:
        return None
    return np.sort(np.argpartition(order, num_cells - 1)[:num_cells])


def cut(scene: data.Scene, cells: np.ndarray) -> np.ndarray:
    """Patches of `cells`, (row, column) inside a cell in order: uint8 [cells * 4, 588 = 3*14*14]."""
    grid = scene.planes().reshape(3, data.GRID, 2, 14, data.GRID, 2, 14)
    grid = grid.transpose(1, 4, 2, 5, 0, 3, 6)
    return grid[cells // data.GRID, cells % data.GRID].reshape(len(cells) * 4, 588)


def roughen(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of all pictures with pixel noise of up to about 8 levels, the others as they are."""
    if rng.random() < 0.5:
        return patches
    start = int(rng.integers(_noise().size - patches.size))
    grain = _noise()[start : start + patches.size].reshape(patches.shape)
    return np.clip(patches + grain * np.float32(rng.uniform(0, 8)), 0, 255).astype(np.uint8)


def kind_of(task: str, answer: str) -> str:
    """`task`; a number question tells how many digits are to be read, as in "number3"."""
    if task != "number":
        return task
    digits = sum(character.isdigit() for character in answer)
    return f"number{digits}" if answer.startswith("The") else "digits"


@cache
def _noise() -> np.ndarray:
    """A fixed store of noise, about -1 to 1: float32 [2 M]."""
    return np.random.default_rng(SEED).standard_normal(1 << 21).astype(np.float32) * 0.5
