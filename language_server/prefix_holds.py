"""Prefixes of which the blocks stay, because their images were asked for from nobody: their KV is all there is of them.

A request whose images lie in the prefix cache needs no features of them, as long as that KV is there. So its blocks
are held from that answer until the request has ended: also while its sequences are preempted, who find them again.

What is held cannot be taken back, so holds must never keep anybody from ending. The rule: whoever is alive could run
to its end alone, beside all blocks that others hold. A hold that would break it is not granted, and a sequence that
comes later and does not fit beside the holds waits until they are gone; meanwhile no new ones are granted.

Pure Python, as the scheduler, to which it belongs.
"""

from collections import Counter
from collections.abc import Iterable

from language_server.block_manager import BlockManager
from language_server.sequence import Sequence


class PrefixHolds:
    """Holds by the ``seq_id`` of whoever stands for the request: a sequence that itself never runs."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._holders: dict[int, Sequence] = {}
        self._num_holds: Counter[int] = Counter()  # of each block that is held

    def add(self, holder: Sequence, alive: Iterable[Sequence]) -> int:
        """Hold the cached prefix of ``holder`` up to the last image that lies in it wholly, as all of the images do of
        which there are rows in these blocks. ``holder.max_num_tokens`` is how long its request may become; ``alive``
        are all other sequences.

        Returns:
            How many tokens of the prompt are held; 0: nothing is, because no image lies there, or because somebody
            could not run to its end.
        """
        prefix = self._blocks.find_prefix(holder)
        block_size = self._blocks.block_size
        num_tokens = holder.image_spans.whole_end(len(prefix) * block_size, block_size)
        if num_tokens == 0:
            return 0
        self._blocks.attach(holder, prefix[: self._blocks.blocks_needed(num_tokens)])
        self._holders[holder.seq_id] = holder
        self._num_holds.update(holder.block_table)
        if all(map(self._lets_go_on, self._holders.values())) and all(map(self.lets_finish, alive)):
            return num_tokens
        self.drop(holder.seq_id)
        return 0

    def drop(self, seq_id: int) -> bool:
        """Let go of a request's blocks, behind its sequences; False if it holds none."""
        holder = self._holders.pop(seq_id, None)
        if holder is None:
            return False
        for block in holder.block_table:
            self._num_holds[block] -= 1
            if self._num_holds[block] == 0:
                del self._num_holds[block]
        self._blocks.free(holder)
        return True

    def lets_finish(self, sequence: Sequence) -> bool:
        """Whether it could run to its end, if all other sequences gave up their blocks."""
        return not self._num_holds or self._leaves_room(sequence, sequence.holder)

    def _lets_go_on(self, holder: Sequence) -> bool:
        """The same of a request whose sequences may not be here yet."""
        return self._leaves_room(holder, holder)

    def _leaves_room(self, sequence: Sequence, holder: Sequence | None) -> bool:
        num_others = len(self._num_holds) - (0 if holder is None else len(holder.block_table))
        return self._blocks.blocks_needed(sequence.max_num_tokens) + num_others <= self._blocks.num_blocks
