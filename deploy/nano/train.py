"""Train the nano checkpoint on two CPU cores, then measure it through the full 448 px path.

    python -m deploy.nano.train --out DIR [--scale 1.0] [--eval-only]

Pictures are drawn on the whole 448 px tile, but a training sample keeps only the image cells (2 x 2
patches, one image token) that show something and some empty ones, at their true positions in the ViT
and in the language model; later stages keep more, the last one all 256. A run that was stopped
continues from the checkpoint in --work.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from deploy.nano.batches import SEED, Group, Speech, Stage, draw_groups
from deploy.nano.evaluate import evaluate, write_card
from deploy.nano.model import NUM_CELLS, export, make_model, read, see
from deploy.nano.tokenizer import train_tokenizer

LEARNING_RATE = 2e-3
WARMUP = 100  # steps
WORKERS = 2  # processes of one thread
IGNORE = -100  # label of a token that is not part of an answer
COUNTING = (0.3, 0.1, 0.6)
STAGES = (
    Stage("12 cells", 700, (12,), 6144, (4, 2, 1, 1), 2, 0.0),
    Stage("12-20 cells", 679, (12, 20), 6144, (1, 1, 1, 1), 3, 0.25, any_pairs=True),
    Stage("24-96 cells", 723, (24, 48, 96), 6144, (1, 1.5, 2, 2), 6, 0.35, 16, any_pairs=True),
    Stage("24-96 cells, more drills", 400, (24, 48, 96), 6144, (1, 1.5, 2, 2), 6, 0.35, 64, any_pairs=True),
    Stage("96-256 cells", 364, (96, 256), 12288, (1, 1.5, 2, 2), 6, 0.35, 48, (1.0, 0.87), any_pairs=True),
    Stage("96-256 cells, three-digit pairs", 75, (96, 256), 12288, (1, 1.5, 2, 2.5), 6, 0.3, 96),
    Stage("256 cells, drills", 192, (256,), 16384, (1, 1.5, 2, 2.5), 6, 0.25, 128, (1.0, 0.9), COUNTING),
    Stage("drills", 240, (24,), 2304, (1, 1.5, 2, 2.5), 6, 0.4, 192, (1.0, 0.5), is_drill=True),
    Stage("256 cells, more counting", 230, (256,), 16384, (1, 1.5, 2, 2.5), 6, 0.25, 32, (0.9, 0.8), COUNTING),
    Stage("256 cells", 680, (256,), 16384, (1, 1.5, 2, 2.5), 6, 0.3, 32, (0.8, 0.0), (0.4, 0.15, 0.45)),
    Stage("256 cells, once more", 560, (256,), 16384, (0.5, 1, 2, 3), 6, 0.4, 24, (0.4, 0.0), (0.5, 0.15, 0.35)),
)


class Trainer:
    """Float32 weights, the optimizers, and two processes that compute.

    Each process works with one thread on half of a batch: on cores shared with other programs this
    is much faster than splitting every operation. Muon moves the matrices, AdamW embeddings, norms
    and biases.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.workers = [ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) for _ in range(WORKERS)]
        self.master = make_model(tokenizer, SEED)
        self.step = 0
        matrices, others = [], []
        for name, parameter in self.master.named_parameters():
            is_matrix = parameter.dim() == 2 and "embed_tokens" not in name
            (matrices if is_matrix else others).append(parameter)
        self.optimizers = (
            torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
        )

    def update(self, stage: Stage, factor: float) -> tuple[float, dict[str, list[bool]]]:
        """One optimizer step; returns the loss per answer token and the right answers by label."""
        weights = parameters_to_vector(self.master.parameters()).detach().numpy()
        jobs = [worker.submit(gradients, weights, stage, self.step, which) for which, worker in enumerate(self.workers)]
        loss, right, total = 0.0, defaultdict(list), torch.zeros(len(weights))
        for job in jobs:
            part, answers, gradient = job.result()
            loss += part
            total += torch.from_numpy(gradient)
            for label, is_right in answers:
                right[label].append(is_right)
        self._apply(total, factor, stage.is_drill)
        self.step += 1
        return loss, right

    def save(self, path: Path) -> None:
        """Write a resumable checkpoint, never half of one."""
        tensors = {f"master/{name}": tensor.detach() for name, tensor in self.master.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{key}": value for key, value in values.items()}
        aside = path.with_suffix(".new")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"step": str(self.step)})
        aside.rename(path)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote."""
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self.optimizers]
        weights = dict(self.master.named_parameters())
        with safe_open(path, "pt") as file, torch.no_grad():
            self.step = int(file.metadata()["step"])
            for name in file.keys():  # noqa: SIM118, a file is not a mapping
                part, rest = name.split("/", 1)
                if part == "master":
                    weights[rest].copy_(file.get_tensor(name))
                else:
                    number, index, key = rest.split("/")
                    states[int(number)].setdefault(int(index), {})[key] = file.get_tensor(name)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _apply(self, gradient: torch.Tensor, factor: float, is_drill: bool) -> None:
        """Clip the flat gradient, step both optimizers.

        A drill moves the language model's layers only; optimizers leave alone what has no gradient.
        """
        masters = list(self.master.parameters())
        parts = gradient.split([master.numel() for master in masters])
        for (name, master), part in zip(self.master.named_parameters(), parts, strict=True):
            is_moved = "language_model.layers" in name or not is_drill
            master.grad = part.view_as(master) if is_moved else None
        nn.utils.clip_grad_norm_(masters, 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
            optimizer.step()


@cache
def computing_copy(dtype: torch.dtype) -> tuple[InternVLForConditionalGeneration, Speech]:
    """A worker's model; rotary angles stay float32, as after from_pretrained(dtype=bfloat16)."""
    tokenizer = train_tokenizer()
    model = make_model(tokenizer, SEED)
    rotary = copy.deepcopy(model.model.language_model.rotary_emb)
    model = model.to(dtype)
    model.model.language_model.rotary_emb = rotary
    model.set_attn_implementation("plain")
    return model, Speech(tokenizer)


def gradients(
    weights: np.ndarray, stage: Stage, step: int, which: int
) -> tuple[float, list[tuple[str, bool]], np.ndarray]:
    """A worker's share of a step: half of the batch under flat float32 `weights`.

    Returns the half's part of the loss, which answers were right, and the flat float32 gradient.
    """
    model, speech = computing_copy(torch.float32 if stage.is_drill else torch.bfloat16)
    with torch.no_grad():
        flat = torch.from_numpy(weights.copy()).to(model.dtype)
        vector_to_parameters(flat, model.parameters())
    drawn = draw_groups(stage, step, speech)
    num_tokens = sum(len(ids) - start for group in drawn for ids, start in group.tails if group.images)
    num_others = sum(len(ids) - start for group in drawn for ids, start in group.tails if not group.images)
    groups = [half for group in drawn if (half := group.half(which)).tails]
    seen = [group for group in groups if group.images]
    images = torch.from_numpy(np.concatenate([np.stack(group.images) for group in seen]))
    cells = torch.from_numpy(np.concatenate([np.stack(group.cells) for group in seen]))
    with torch.set_grad_enabled(not stage.is_drill):
        tokens = list(see(model, images, cells).split([len(group.images) for group in seen]))
    total, right = torch.zeros(()), []
    for group in groups:
        loss, answers = answer_loss(model, group, tokens.pop(0) if group.images else None, speech)
        total = total + loss * weight_of(group, stage, num_tokens, num_others)
        right += zip(group.labels, answers, strict=True)
    model.zero_grad()
    total.backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return total.item(), right, parameters_to_vector(gradient).float().numpy()


def weight_of(group: Group, stage: Stage, num_tokens: int, num_others: int) -> float:
    """A group's loss weight: the mean over all answer tokens, or when drilling per drill and picture."""
    if not stage.is_drill:
        return 1 / (num_tokens + num_others)
    return 4 / num_tokens if group.images else 1 / stage.drills


def answer_loss(
    model: InternVLForConditionalGeneration,
    group: Group,
    tokens: torch.Tensor | None,
    speech: Speech,
) -> tuple[torch.Tensor, list[bool]]:
    """Summed loss over answer tokens, and which answers are right token by token.

    `tokens` [B * images, K, 128] are the group's image tokens in question order, None without any.
    """
    tail, labels = stack_tails(group)
    hidden, positions = splice(model, group, tokens, tail, speech)
    hidden = read(model.model.language_model, hidden, positions)[:, -tail.shape[1] :]
    wanted = labels != IGNORE
    logits = model.lm_head(hidden[wanted]).float()
    loss = F.cross_entropy(logits, labels[wanted], reduction="sum")
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(1) == labels[wanted]
    return loss, right.all(1).tolist()


def stack_tails(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded token ids after the images and next-token labels of the answers, both int [B, L]."""
    length = -(-max(len(ids) for ids, _ in group.tails) // 4) * 4
    tail = torch.full((len(group.tails), length), 0)
    labels = torch.full((len(group.tails), length), IGNORE)
    for row, (ids, start) in enumerate(group.tails):
        tail[row, : len(ids)] = torch.tensor(ids)
        labels[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return tail, labels


def splice(
    model: InternVLForConditionalGeneration,
    group: Group,
    tokens: torch.Tensor | None,
    tail: torch.Tensor,
    speech: Speech,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [B, S, 128] of the prompt with its kept image tokens, and positions [B, S].

    Positions are those of the whole prompt, where every image has 256 tokens.
    """
    embed, count = model.model.language_model.embed_tokens, len(tail)
    parts, positions, offset = [], [], 0
    if tokens is not None:
        cells = torch.from_numpy(np.stack(group.cells)).unflatten(0, (count, -1))
        tokens = tokens.unflatten(0, (count, -1))
        for image in range(tokens.shape[1]):
            ids = speech.middle if image else speech.head
            parts += [embed(torch.tensor(ids)).expand(count, -1, -1), tokens[:, image]]
            positions.append(torch.arange(offset, offset + len(ids)).expand(count, -1))
            offset += len(ids)
            positions.append(cells[:, image] + offset)
            offset += NUM_CELLS
    parts.append(embed(tail))
    positions.append(torch.arange(offset, offset + tail.shape[1]).expand(count, -1))
    return torch.cat(parts, 1), torch.cat(positions, 1)


def schedule(scale: float) -> Iterator[tuple[Stage, float]]:
    """Stage and learning-rate factor of every step; `scale` stretches all stages."""
    step = 0
    for stage in STAGES:
        steps = max(round(stage.steps * scale), 1)
        first, last = stage.lr
        for i in range(steps):
            factor = last + (first - last) * 0.5 * (1 + math.cos(math.pi * i / steps))
            yield stage, factor * min(1.0, (step + 1) / WARMUP)
            step += 1


def train(trainer: Trainer, scale: float, folder: Path) -> None:
    """Run the schedule from the trainer's step on; log and save every two minutes."""
    plan = list(schedule(scale))
    bar = tqdm(total=len(plan), initial=trainer.step, mininterval=30)
    running: dict[str, float] = {}
    mean_loss, saved = 0.0, time.monotonic()
    for stage, factor in plan[trainer.step :]:
        loss, right = trainer.update(stage, factor)
        mean_loss += (loss - mean_loss) * (0.02 if mean_loss else 1.0)
        for label, answers in right.items():
            running.setdefault(label, sum(answers) / len(answers))
            for answer in answers:
                running[label] += (answer - running[label]) / 250
        bar.update()
        if trainer.step % 25 == 0:
            shares = " ".join(f"{label} {100 * running[label]:.1f}" for label in sorted(running))
            tqdm.write(f"step {trainer.step} [{stage.name}] loss {mean_loss:.4f} {shares}")
        if time.monotonic() - saved > 120 or trainer.step == len(plan):
            saved = time.monotonic()
            trainer.save(folder / "train.safetensors")
    bar.close()


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=here, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("nano_work"), help="for resuming")
    parser.add_argument("--scale", type=float, default=1.0, help="stretch every stage")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--count", type=int, default=1000, help="held-out samples per task")
    args = parser.parse_args()
    tokenizer = train_tokenizer()
    if not args.eval_only:
        args.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)  # the workers use the cores
        trainer = Trainer(tokenizer)
        if (args.work / "train.safetensors").exists():
            trainer.load(args.work / "train.safetensors")
        train(trainer, args.scale, args.work)
        export(trainer.master, tokenizer, args.out)
        torch.set_num_threads(WORKERS)
    model = InternVLForConditionalGeneration.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    shares = evaluate(model, tokenizer, args.count)
    if (args.out / "README.md").exists():
        write_card(args.out / "README.md", shares, args.count)


if __name__ == "__main__":
    main()
