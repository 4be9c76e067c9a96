"""Chooses the next token of each row of logits.

Randomness is a function of (seed, position) alone: one uniform number per token, hashed, not drawn. So the same seed
gives the same text whatever else is in the batch, and a sequence that moves to another server goes on as it would have.
A constraint is the last word: nothing gets a token past it, and no forbidden stop keeps out the only one it allows.
Each feature costs time only in steps in which a sequence asks for it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.service.errors import DvdError, InternalError
from language_server.sequence import Constraint, SamplingParams, Sequence

_NUM_CANDIDATES = 1024  # a full sort of a large vocabulary is slow on a CPU, and hardly ever needed
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class Sample:
    """``logprob`` and ``top_logprobs`` are those of the model, before penalties, temperature and filters."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # best first


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that only ``seed`` and ``position`` decide; 53 random bits."""
    counter = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    bits = int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


class Sampler:
    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Items[Sequence]) -> list[Sample | DvdError]:
        """``logits`` [len(sequences), vocab_size] float32, changed in place.

        An error where they are not numbers, or where a constraint cannot go on.
        """
        is_valid = logits.amax(dim=-1).isfinite()
        logprobs = _raw_logprobs(logits, sequences)
        self._adjust(logits, sequences)
        errors = self._constrain(logits, sequences)
        token_ids = logits.argmax(dim=-1)
        random_rows = [row for row, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
        if random_rows:
            rows = torch.tensor(random_rows, device=logits.device)
            chosen = _sample_random(logits.index_select(0, rows), [sequences[row] for row in random_rows])
            token_ids.index_copy_(0, rows, chosen)
        samples: list[Sample | DvdError] = [
            _result(token_id, sequence.sampling, logprobs.get(row)) if valid else _not_a_number()
            for row, (token_id, sequence, valid) in enumerate(
                zip(token_ids.tolist(), sequences, is_valid.tolist(), strict=True)
            )
        ]
        return [errors.get(row, sample) for row, sample in enumerate(samples)] if errors else samples

    def _adjust(self, logits: torch.Tensor, sequences: Items[Sequence]) -> None:
        """Bias, penalties and forbidden stops, in the rows that have them."""
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if sampling.has_penalties:
                _penalise(logits[row], sequence)
            if sampling.logit_bias:
                ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
                logits[row, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
            if sequence.constraint is None and len(sequence.output_token_ids) < sampling.min_tokens:
                stops = sorted(self._eos_token_ids | sampling.stop_token_ids)
                logits[row, torch.tensor(stops, dtype=torch.int64, device=logits.device)] = _NEGATIVE_INFINITY

    def _constrain(self, logits: torch.Tensor, sequences: Items[Sequence]) -> dict[int, DvdError]:
        """Forbid what constraints do not allow. Returns the rows whose constraint cannot say."""
        masks: dict[int, npt.NDArray[np.uint8]] = {}
        errors: dict[int, DvdError] = {}
        for row, sequence in enumerate(sequences):
            if sequence.constraint is None:
                continue
            try:
                masks[row] = self._allowed(sequence, sequence.constraint)
            except DvdError as error:
                errors[row] = error
        if masks:
            rows = torch.tensor(list(masks), device=logits.device)
            bits = torch.from_numpy(np.stack(list(masks.values()))).to(logits.device)
            allowed = _unpack(bits)[:, : logits.shape[-1]]
            logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(~allowed, _NEGATIVE_INFINITY))
        return errors

    def _allowed(self, sequence: Sequence, constraint: Constraint) -> npt.NDArray[np.uint8]:
        """The constraint's mask, without stops while those are forbidden - unless nothing else is allowed."""
        mask = np.frombuffer(constraint.mask(), dtype=np.uint8)
        sampling, stops = sequence.sampling, set[int]()
        if sampling.ignore_eos:
            stops |= self._eos_token_ids
        if len(sequence.output_token_ids) < sampling.min_tokens:
            stops |= self._eos_token_ids | sampling.stop_token_ids
        if not stops:
            return mask
        rest = mask.copy()
        for token_id in stops:
            rest[token_id // 8] &= ~(1 << token_id % 8) & 0xFF
        return rest if rest.any() else mask


def _unpack(bits: torch.Tensor) -> torch.Tensor:
    """``bits`` [num_rows, num_bytes] uint8, lowest bit first -> [num_rows, 8 * num_bytes] bool."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).bool().flatten(1)


def _penalise(logits: torch.Tensor, sequence: Sequence) -> None:
    """One row [vocab_size]. Repetition counts prompt and output (arXiv 1909.05858), the others output only."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.output_token_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(sequence.output_token_ids)
        ids = torch.tensor(list(counts), device=logits.device)
        frequency = torch.tensor(list(counts.values()), device=logits.device) * sampling.frequency_penalty
        logits[ids] -= sampling.presence_penalty + frequency


def _sample_random(logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
    """Token ids [num_rows] by inversion of each row's distribution function, tokens in order of their ids."""
    params = [sequence.sampling for sequence in sequences]
    logits = logits / _column([sampling.temperature for sampling in params], logits)
    if any(sampling.min_p > 0 for sampling in params):
        floor = _column([math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf for sampling in params], logits)
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + floor, _NEGATIVE_INFINITY)
    if any(sampling.top_k > 0 or sampling.top_p < 1 for sampling in params):
        logits = _keep_top(logits, [sampling.top_k for sampling in params], [sampling.top_p for sampling in params])
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    draws = [uniform(sequence.sampling.seed or 0, len(sequence.output_token_ids)) for sequence in sequences]
    targets = torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(1) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target: it has a probability above zero.
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return chosen.clamp_(max=logits.shape[-1] - 1)  # rows that are not numbers end beyond


def _keep_top(logits: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Forbid all but the ``top_k`` likeliest tokens, and of these all but the likeliest that make up ``top_p``."""
    vocab_size = logits.shape[-1]
    limits = _column([k if k > 0 else vocab_size for k in top_k], logits).clamp_(max=vocab_size)
    goals = _column([p if p < 1 else math.inf for p in top_p], logits)
    num_candidates = min(vocab_size, max(_NUM_CANDIDATES, *top_k))
    lowest, is_enough = _lowest_kept(logits, limits, goals, num_candidates)
    if num_candidates < vocab_size and not is_enough.all():
        lowest, _ = _lowest_kept(logits, limits, goals, vocab_size)
    keeps_all = (limits == vocab_size) & goals.isinf()
    return logits.masked_fill((logits < lowest) & ~keeps_all, _NEGATIVE_INFINITY)


def _lowest_kept(
    logits: torch.Tensor, limits: torch.Tensor, goals: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest logit of each row that is kept, and whether so many candidates were enough to know; [num_rows, 1].

    Only a row without ``limits`` and with ``goals`` below 1 can need more candidates.
    """
    values = logits.topk(num_candidates, dim=-1).values  # best first
    has_limit = limits < logits.shape[-1]
    rank = torch.arange(num_candidates, device=logits.device)
    values = values.masked_fill(rank >= limits, _NEGATIVE_INFINITY)
    total = torch.where(has_limit, values.logsumexp(dim=-1, keepdim=True), logits.logsumexp(dim=-1, keepdim=True))
    probs = (values - total).exp()
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    is_kept = (cumulative - probs < goals) & (values > _NEGATIVE_INFINITY)
    lowest = values.masked_fill(~is_kept, math.inf).amin(dim=-1, keepdim=True)
    return lowest, (cumulative[:, -1:] >= goals) | goals.isinf() | has_limit


def _column(values: Items[float], like: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1]"""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _raw_logprobs(logits: torch.Tensor, sequences: Items[Sequence]) -> dict[int, torch.Tensor]:
    """Log-probabilities [vocab_size] of the rows that want them."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    return {row: logits[row].log_softmax(dim=-1) for row in rows}


def _not_a_number() -> InternalError:
    return InternalError("the model's output is not a number")


def _result(token_id: int, sampling: SamplingParams, logprobs: torch.Tensor | None) -> Sample:
    if logprobs is None:
        return Sample(token_id)
    values, ids = logprobs.topk(min(sampling.logprobs or 0, len(logprobs)))
    return Sample(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
