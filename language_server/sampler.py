"""Chooses the next token of each row of logits.

Randomness is a function of (seed, position) alone: one uniform number per token, hashed, not drawn. So the same seed
gives the same text whatever else is in the batch, and a sequence that moves to another server goes on as it would have.
A constraint is the last word: nothing gets a token past it, and no forbidden stop keeps out the only one it allows.
Each feature costs time only in steps in which a sequence asks for it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.service.errors import DvdError, InternalError
from language_server.sequence import Constraint, SamplingParams, Sequence
from language_server.transfer import to_device, to_host

_NUM_CANDIDATES = 1024  # a full sort of a large vocabulary is slow on a CPU, and hardly ever needed
_NEGATIVE_INFINITY = float("-inf")
_NEVER = -1e30  # so small that any other token is chosen, and still the one that a constraint leaves
_NOT_A_NUMBER = -1  # in place of a token id
# What divides logits may be as small as float32 allows. Within these bounds the result is still a number.
_LEAST_TEMPERATURE = 1e-6
_LARGEST_LOGIT = 1e30


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


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens of a step, on their way to the host."""

    sequences: Items[Sequence]
    token_ids: torch.Tensor  # [num_sequences] int64 on the device; where logits were not numbers, any token
    _host_ids: torch.Tensor  # the same with ``_NOT_A_NUMBER``, on the host as soon as this has happened:
    _arrival: torch.cuda.Event | None
    _logprobs: Mapping[int, torch.Tensor]  # [vocab_size], by row
    _errors: Mapping[int, DvdError]  # of constraints, by row

    def fetch(self) -> list[Sample | DvdError]:
        """One for each sequence; an error where logits were not numbers, or where a constraint cannot go on."""
        if self._arrival is not None:
            self._arrival.synchronize()  # the one moment in a step in which the host waits for the device
        samples: list[Sample | DvdError] = [
            _not_a_number()
            if token_id == _NOT_A_NUMBER
            else _result(token_id, sequence.sampling, self._logprobs.get(row))
            for row, (token_id, sequence) in enumerate(zip(self._host_ids.tolist(), self.sequences, strict=True))
        ]
        return [self._errors.get(row, sample) for row, sample in enumerate(samples)] if self._errors else samples


class Sampler:
    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, sequences: Items[Sequence]) -> Choice:
        """``logits`` [len(sequences), vocab_size] float32, changed in place.

        Does not wait for the device, unless a sequence ``needs_known_tokens``.
        """
        is_valid = logits.amax(dim=-1).isfinite()
        logprobs = _raw_logprobs(logits, sequences)
        self._adjust(logits, sequences)
        errors = self._constrain(logits, sequences)
        token_ids = logits.argmax(dim=-1)
        random_rows = [row for row, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
        if random_rows:
            rows = to_device(random_rows, logits.device)
            chosen = _sample_random(logits.index_select(0, rows), [sequences[row] for row in random_rows])
            token_ids.index_copy_(0, rows, chosen)
        host_ids, arrival = to_host(torch.where(is_valid, token_ids, _NOT_A_NUMBER))
        return Choice(sequences, token_ids, host_ids, arrival, logprobs, errors)

    def _adjust(self, logits: torch.Tensor, sequences: Items[Sequence]) -> None:
        """Bias, penalties and forbidden stops, in the rows that have them."""
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if sampling.has_penalties:
                _penalise(logits[row], sequence)
            if sampling.logit_bias:
                ids = to_device(list(sampling.logit_bias), logits.device)
                logits[row, ids] += to_device(list(sampling.logit_bias.values()), logits.device, logits.dtype)
            if ids_of_bad_words := sampling.bad_words.forbidden(sequence.output_token_ids):
                logits[row, to_device(ids_of_bad_words, logits.device)] = _NEVER
            if sequence.constraint is None and len(sequence.output_token_ids) < sampling.min_tokens:
                stops = sorted(self._eos_token_ids | sampling.stop_token_ids)
                logits[row, to_device(stops, logits.device)] = _NEGATIVE_INFINITY

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
            rows = to_device(list(masks), logits.device)
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
        seen = to_device(sorted(set(sequence.token_ids)), logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp_(max=_LARGEST_LOGIT)
    if sequence.output_token_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(sequence.output_token_ids)
        ids = to_device(list(counts), logits.device)
        frequency = to_device(list(counts.values()), logits.device) * sampling.frequency_penalty
        logits[ids] -= sampling.presence_penalty + frequency


def _sample_random(logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
    """Token ids [num_rows] by inversion of each row's distribution function, tokens in order of their ids."""
    params = [sequence.sampling for sequence in sequences]
    logits = logits / _column([max(sampling.temperature, _LEAST_TEMPERATURE) for sampling in params], logits)
    if any(sampling.min_p > 0 for sampling in params):
        floor = _column([math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf for sampling in params], logits)
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + floor, _NEGATIVE_INFINITY)
    if any(sampling.top_k > 0 or sampling.top_p < 1 for sampling in params):
        logits = _keep_top(logits, [sampling.top_k for sampling in params], [sampling.top_p for sampling in params])
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    draws = [uniform(sequence.sampling.seed or 0, len(sequence.output_token_ids)) for sequence in sequences]
    targets = to_device(draws, logits.device, torch.float64).unsqueeze(1) * cumulative[:, -1:]
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
    # A limit is known to the host; whether a goal without one is reached, only to the device.
    may_need_more = num_candidates < vocab_size and any(p < 1 and k == 0 for k, p in zip(top_k, top_p, strict=True))
    if may_need_more and not is_enough.all():
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
    return to_device(values, like.device, like.dtype).unsqueeze(1)


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
