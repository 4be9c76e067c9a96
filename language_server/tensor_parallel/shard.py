"""One rank's share of the language model: built small, filled from its share of the checkpoint, summed with others.

Rank 0 alone embeds tokens, so it alone holds the embedding; a head that is tied to it is a view of its first rows.
Knows nothing of commands or processes.
"""

# mypy: disable-error-code="no-untyped-call"
import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from common.model.checkpoint import Checkpoint, load_role
from common.model.config import InternVLConfig
from common.model.cuts import Cut, cut_checkpoint
from language_server.attention.base import KVShape
from language_server.backbone import LanguageBackbone, build_model
from language_server.tensor_parallel.collectives import Collectives
from language_server.tensor_parallel.plan import HEAD, Plan, make_plan

_EMBEDDING: Final = "model.embed_tokens.weight"


class ShardBackbone(LanguageBackbone):
    """A language model of which this rank holds a share; computes only while all ranks compute the same.

    Its layers are transformers' own: the fused ones for CPUs know nothing of other ranks.
    """

    def __init__(self, model: Any, plan: Plan, ranks: Collectives) -> None:
        super().__init__(model)
        self.vocab_size = model.config.vocab_size
        self._head_share = plan.cuts[HEAD].share
        self.ranks = ranks
        for name in plan.summed:
            model.get_submodule(name).register_forward_hook(lambda module, args, output: ranks.sum(output))

    @property
    def kv_shape(self) -> KVShape:
        """Of this rank's heads."""
        shape = super().kv_shape
        return dataclasses.replace(shape, num_kv_heads=shape.num_kv_heads // self.ranks.num_ranks)

    def gather_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[num_rows, hidden_size], equal on all ranks -> [num_rows, vocab_size] float32 on rank 0, None elsewhere."""
        local = self.model.lm_head(hidden)
        parts = self.ranks.to_first(F.pad(local, (0, self._head_share - local.shape[-1])))
        return None if parts is None else torch.cat(parts, dim=-1)[:, : self.vocab_size].float()


def load_shard(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    ranks: Collectives,
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, Plan]:
    """This rank's share of a checkpoint's language model, and what it is a share of. Needs no other rank yet.

    Raises:
        CheckpointError: as ``language_server.backbone.load_backbone``.
    """
    is_tied, is_first = config.tie_word_embeddings, ranks.rank == 0
    plans: list[Plan] = []

    def divide(model: Any) -> None:
        plan = make_plan(model, ranks.rank, ranks.num_ranks)
        plans.append(plan)
        for name, cut in plan.cuts.items():
            if name != HEAD or not (is_tied and is_first):
                _shrink(model, name, cut)
        if not is_first:
            model.set_input_embeddings(nn.Embedding(0, model.config.hidden_size, dtype=dtype, device="meta"))

    model: Any = build_model(config.text, is_tied, dtype=dtype, device=ranks.device, on_meta=divide)
    plan = plans[0]
    parameters, cuts = dict(model.named_parameters()), dict(plan.cuts)
    without: set[str] = set()
    if not is_first:
        del parameters[_EMBEDDING]
        without.add(_EMBEDDING)
    if is_tied:  # the head is what the embedding is on disk
        cut = cuts.pop(HEAD)
        if not is_first:
            parameters[_EMBEDDING], cuts[_EMBEDDING] = parameters.pop(HEAD), cut
            without.clear()
    load_role(cut_checkpoint(checkpoint, cuts, without), config, "language", parameters, progress=progress)
    if is_tied and is_first:
        rows = model.get_input_embeddings().weight[: plan.cuts[HEAD].local]
        model.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    if not is_first:
        for name in plan.added_once:
            parameters[name].data.zero_()
    return model, plan


def _shrink(model: Any, name: str, cut: Cut) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    full: nn.Parameter = getattr(module, parameter_name)
    local = torch.empty(cut.shape(tuple(full.shape)), dtype=full.dtype, device=full.device)
    setattr(module, parameter_name, nn.Parameter(local, requires_grad=False))
