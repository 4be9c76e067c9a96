"""Accuracy on held-out questions through the undivided model: whole 448 px tiles, greedy, BF16.

An answer counts only if its whole sentence is right. The table goes into the model card.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from deploy.nano import data
from deploy.nano.batches import kind_of
from deploy.nano.model import MEAN, NUM_CELLS, STD
from deploy.nano.tokenizer import prompt

HELD_OUT_SEED = 7_000_000  # training draws from (batches.SEED, step)
BATCH = 8  # questions answered at once
ROWS = {
    "number": "number, 1 to 4 digits",
    "number1": "1 digit",
    "number2": "2 digits",
    "number3": "3 digits",
    "number4": "4 digits",
    "shape": "colour and shape",
    "count": "counting 1 to 6",
    "pair": "same number in two images",
    "text": "text only",
}
MARKS = "<!-- accuracy -->", "<!-- end -->"


def held_out(task: str, count: int) -> list[data.Sample]:
    """Seeded samples that training never draws; "number3" keeps three-digit readings only."""
    kind = task.rstrip("1234")
    rng = np.random.default_rng((HELD_OUT_SEED, list(ROWS).index(task)))
    chosen: list[data.Sample] = []
    while len(chosen) < count:
        sample = data.sample(kind, rng)
        if task in (kind, kind_of(kind, sample.answer)):
            chosen.append(sample)
    return chosen


@torch.inference_mode()
def answer(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[data.Sample],
) -> list[str]:
    """Greedy answers to samples that share one question text."""
    text = prompt(samples[0].question, len(samples[0].images))
    text = text.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * NUM_CELLS)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids.expand(len(samples), -1)
    images = [image for sample in samples for image in sample.images]
    seen = {"pixel_values": pixel_values(images).to(model.dtype)} if images else {}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **seen,
        do_sample=False,
        max_new_tokens=48,
    )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def pixel_values(images: list[Image.Image]) -> torch.Tensor:
    """ImageNet-normalised tiles, float32 [N, 3, 448, 448]."""
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images]))
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def accuracy(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    count: int,
    show: int = 0,
) -> float:
    """Share of `count` held-out samples answered right; prints up to `show` wrong answers."""
    by_question: dict[str, list[data.Sample]] = defaultdict(list)
    for sample in held_out(task, count):
        by_question[sample.question].append(sample)
    wrong: list[tuple[str, str]] = []
    for samples in by_question.values():
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            said = answer(model, tokenizer, part)
            pairs = [(sample.answer, text) for sample, text in zip(part, said, strict=True)]
            wrong += [pair for pair in pairs if pair[0] != pair[1]]
    for wanted, text in wrong[:show]:
        tqdm.write(f"    {wanted!r} read as {text!r}")
    return 1 - len(wrong) / count


def evaluate(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    tasks: tuple[str, ...] = tuple(ROWS),
    show: int = 0,
) -> dict[str, float]:
    """Accuracy by task, printed as it is measured."""
    shares = {}
    for task in tasks:
        shares[task] = accuracy(model, tokenizer, task, count, show)
        tqdm.write(f"{ROWS[task]:26} {100 * shares[task]:6.2f} %  of {count}")
    return shares


def write_card(card: Path, shares: dict[str, float], count: int) -> None:
    """Put the table between the marks of the model card."""
    lines = ["| task | accuracy | samples |", "|---|---:|---:|"]
    lines += [f"| {ROWS[task]} | {100 * share:.1f} % | {count} |" for task, share in shares.items()]
    before, rest = card.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    card.write_text(before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after)
