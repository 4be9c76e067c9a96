"""The share of a checkpoint that one of several ranks holds: the same tensors, only smaller.

A cut tensor differs from any other in one thing: its bytes may lie in many runs. So whoever reads it needs to know
nothing of ranks. Knows nothing of models: which parameter is cut where is the caller's to say.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from common.model.checkpoint import Checkpoint
from common.model.names import Part, locate
from common.model.shards import ITEM_SIZE, TensorEntry
from common.service.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Cut:
    """What rank ``rank`` of ``num_ranks`` holds of a parameter that is ``full`` long along ``dim``.

    The first ranks hold as much each as ``full`` asks for, rounded up; the last ones may hold less. ``dim`` counts from
    the end, so that it also holds for one expert of all. A parameter of several ``num_slots`` is that many tensors
    behind one another along ``dim``, such as gate and up, and each of them is cut.
    """

    dim: int
    full: int
    rank: int
    num_ranks: int
    num_slots: int = 1

    @property
    def share(self) -> int:
        """The most that a rank holds of a slot."""
        return -(-(self.full // self.num_slots) // self.num_ranks)

    @property
    def start(self) -> int:
        """Where ours begins in each slot."""
        return min(self.rank * self.share, self.full // self.num_slots)

    @property
    def stop(self) -> int:
        return min(self.start + self.share, self.full // self.num_slots)

    @property
    def local(self) -> int:
        """How long the parameter is on this rank."""
        return (self.stop - self.start) * self.num_slots

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Of the parameter on this rank."""
        local = list(full)
        local[self.dim] = self.local
        return tuple(local)


def cut_checkpoint(checkpoint: Checkpoint, cuts: Mapping[str, Cut], without: Collection[str] = ()) -> Checkpoint:
    """The checkpoint as the language role of one rank sees it.

    Args:
        cuts: by parameter, under the canonical names of ``load_role``.
        without: parameters that this rank does not hold at all.

    Raises:
        CheckpointError: a tensor does not have the length that is to be cut.
    """

    def of_shard(entries: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        located = ((entry, *locate(entry.name)) for entry in entries)
        return tuple(
            _cut_entry(entry, cuts[name], part) if role == "language" and name in cuts else entry
            for entry, role, name, part in located
            if role != "language" or name not in without
        )

    shards = tuple(replace(shard, entries=of_shard(shard.entries)) for shard in checkpoint.shards)
    return Checkpoint(checkpoint.path, shards)


def _cut_entry(entry: TensorEntry, cut: Cut, part: Part) -> TensorEntry:
    """``part`` says which slot of the parameter the tensor fills, or that it fills all of them."""
    num_slots = cut.num_slots if part.num_slots == 1 else 1
    per_slot = cut.full // cut.num_slots
    dim = len(entry.shape) + cut.dim
    if dim < 0 or entry.shape[dim] != num_slots * per_slot:
        raise CheckpointError(
            f"tensor {entry.name!r} in shard {entry.shard!r}: expected length {num_slots * per_slot} along dimension "
            f"{cut.dim}, found shape {list(entry.shape)}"
        )
    row_bytes = math.prod(entry.shape[dim + 1 :]) * ITEM_SIZE[entry.dtype]
    length = cut.stop - cut.start
    run_bytes = length * row_bytes
    num_runs = math.prod(entry.shape[:dim]) * num_slots
    return replace(
        entry,
        shape=(*entry.shape[:dim], num_slots * length, *entry.shape[dim + 1 :]),
        offset=entry.offset + cut.start * row_bytes,
        num_bytes=num_runs * run_bytes,
        run_bytes=None if num_runs == 1 else run_bytes,
        pitch_bytes=per_slot * row_bytes,
    )
