"""Nano-flash beside nano on the same held-out questions: accuracy and image tokens, greedy, BF16.

An answer counts only if its whole sentence is right. The table goes into the model card.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.model.config import FlashConfig
from deploy.nano import data
from deploy.nano.batches import Speech
from deploy.nano.evaluate import MARKS, ROWS, held_out
from deploy.nano.flash import COMPRESSED, FULL, FlashNano
from deploy.nano.questions import SIDE, Question, answer, cut_squares, stackable
from vision_server.vir import VirChoice

BATCH: Final = 16  # questions answered at once
OVERALL: Final = ("number", "shape", "count", "pair")
"""The tasks that the last row is the mean of."""
Scope = Literal["absolute", "request"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
HEAD: Final = """\
| task | nano | all 256 | all 64 | routed | tokens saved | routed, `request` | tokens saved |
|---|---:|---:|---:|---:|---:|---:|---:|"""


@dataclass
class Row:
    """Which answers were right and how many image tokens they took, by way of answering."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def accuracy(self, way: str) -> float:
        return sum(self.right[way]) / len(self.right[way])

    def saved(self, way: str) -> float:
        """Share of nano's image tokens that ``way`` does without."""
        return 1 - self.tokens[way] / self.tokens["nano"] if self.tokens["nano"] else 0.0


@torch.inference_mode()
def measure(
    nano: FlashNano, flash: FlashNano, speech: Speech, count: int, tasks: Sequence[str] = tuple(ROWS)
) -> dict[str, Row]:
    """A row for each task over ``count`` held-out samples, printed as it is measured."""
    rows: dict[str, Row] = {}
    for task in tasks:
        rows[task] = Row()
        for questions in batches(flash, held_out(task, count), speech):
            for way, model, counts in ways(nano, flash, questions):
                take(rows[task], way, model, questions, counts, speech)
        tqdm.write(line(ROWS[task], rows[task]))
    return rows


def overall(rows: Mapping[str, Row]) -> Row:
    """All samples of the four tasks with pictures."""
    together = Row()
    for task in OVERALL:
        for way, right in rows[task].right.items():
            together.right[way] += right
            together.tokens[way] += rows[task].tokens[way]
    return together


def line(name: str, row: Row) -> str:
    """A line of the card's table."""
    shares = [f"{100 * row.accuracy(way):.1f} %" for way in ("nano", "256", "64")]
    for scope in SCOPES:
        shares += [f"{100 * row.accuracy(scope):.1f} %", f"{100 * row.saved(scope):.1f} %"]
    return f"| {name} | " + " | ".join(shares) + " |"


def write_card(card: Path, rows: Mapping[str, Row]) -> None:
    """Put the table between the marks of the model card."""
    lines = [HEAD, *(line(ROWS[task], row) for task, row in rows.items()), line("**the four tasks**", overall(rows))]
    before, rest = card.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    card.write_text(before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after)


def batches(flash: FlashNano, samples: Sequence[data.Sample], speech: Speech) -> Iterator[list[Question]]:
    """The samples seen by the tower, which nano and nano-flash share."""
    squares = np.arange(SIDE**2)
    for start in range(0, len(samples), BATCH):
        questions = []
        for place, sample in enumerate(samples[start : start + BATCH], start):
            planes = [np.asarray(image).transpose(2, 0, 1) for image in sample.images]
            tiles = [torch.from_numpy(cut_squares(tile, squares))[None] for tile in planes]
            kept = torch.from_numpy(squares).expand(len(tiles), -1)
            patches = torch.cat([flash.see(tile, kept[:1]) for tile in tiles]) if tiles else torch.empty(0, 0, 128)
            tail = speech.tail(sample.question, sample.answer, len(tiles))
            questions.append(Question((0, place), patches, kept, tail, ""))
        yield from stackable(questions)


def ways(
    nano: FlashNano, flash: FlashNano, questions: Sequence[Question]
) -> Iterator[tuple[str, FlashNano, list[tuple[int, ...]]]]:
    """Who answers, and with how many tokens for every image of every question."""
    num_images, thresholds = len(questions[0].patches), flash.config.flash
    assert thresholds is not None
    scores = [flash.scores(question.patches) if num_images else torch.empty(0) for question in questions]
    for way, model, tokens in (("nano", nano, FULL), ("256", flash, FULL), ("64", flash, COMPRESSED)):
        yield way, model, [(tokens,) * num_images] * len(questions)
    for scope in SCOPES:
        yield scope, flash, [route(those, scope, thresholds) for those in scores]


def route(scores: Tensor, scope: Scope, thresholds: FlashConfig) -> tuple[int, ...]:
    """Tokens of each tile with these ``scores``, all of one request."""
    choice = VirChoice("auto", scope, thresholds.relative_threshold, thresholds.absolute_threshold, scores.tolist())
    return tuple(COMPRESSED if compressed else FULL for compressed in choice.compressed(scores)) if len(scores) else ()


def take(
    row: Row,
    way: str,
    model: FlashNano,
    questions: Sequence[Question],
    counts: Sequence[tuple[int, ...]],
    speech: Speech,
) -> None:
    """Ask the questions in groups of equal counts and write down what came of it."""
    groups: dict[tuple[int, ...], list[Question]] = defaultdict(list)
    for question, its in zip(questions, counts, strict=True):
        groups[its].append(question)
    for its, group in groups.items():
        row.right[way] += answer(model, group, its, speech).are_right()
        row.tokens[way] += sum(its) * len(group)
