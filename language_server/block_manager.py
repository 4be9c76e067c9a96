"""Which blocks of KV memory belong to which sequences.

Blocks are reference-counted and never copied. A full block of computed tokens is registered under a hash that chains
over everything before it, so a later sequence with the same beginning takes the same block. Inside a block an image
contributes its ``mm_hash`` and which of its rows lie there, because its placeholder tokens look alike in every prompt:
nothing else about it, such as how many pieces it is in. A block nobody holds keeps its content until the memory is
needed, oldest first.

Pure Python: deals in block numbers, never in tensors.
"""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Iterator

from language_server.sequence import Sequence


class BlockManager:
    """Accounting of ``num_blocks`` blocks of ``block_size`` tokens each.

    Invariant: a block is in the free list exactly when its reference count is zero.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had now, those with reusable content included."""
        return len(self._free)

    def blocks_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_hold(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether ``sequence`` could now own the blocks of its first ``num_tokens`` tokens."""
        return self.blocks_needed(num_tokens) - len(sequence.block_table) <= len(self._free)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold ``num_tokens`` tokens. All or nothing; False when memory is short."""
        if not self.can_hold(sequence, num_tokens):
            return False
        for _ in range(self.blocks_needed(num_tokens) - len(sequence.block_table)):
            sequence.block_table.append(self._take())
        return True

    def free(self, sequence: Sequence) -> None:
        """Give back every block of the sequence. Last block first, so that the beginning of a prefix lives longest."""
        for block in reversed(sequence.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
        sequence.block_table.clear()
        sequence.num_computed_tokens = sequence.num_committed_tokens = 0

    def discard(self, sequence: Sequence) -> None:
        """Free a sequence whose KV must not be reused, because it holds something that is not a number. What it has
        offered is taken back even where preemption has taken the blocks themselves."""
        for content in sequence.block_hashes:
            if (block := self._block_of.get(content)) is not None:
                self._unregister(block)
        self.free(sequence)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix, those first that are held for it. At least one token is left to compute,
        because its logits are needed."""
        blocks = [] if sequence.holder is None else list(sequence.holder.block_table)
        if self.enable_prefix_caching:
            for index in range(len(blocks), (sequence.num_tokens - 1) // self.block_size):
                block = self._block_of.get(self._block_hash(sequence, index))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def attach(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give a sequence without blocks the ones ``find_prefix`` has just found."""
        for block in prefix:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        sequence.block_table.extend(prefix)
        sequence.num_computed_tokens = sequence.num_committed_tokens = len(prefix) * self.block_size

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that the KV of so many tokens has been written, and offer the blocks this filled to others."""
        first = sequence.num_committed_tokens // self.block_size
        sequence.num_committed_tokens = num_tokens
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, num_tokens)
        if not self.enable_prefix_caching:
            return
        for index in range(first, num_tokens // self.block_size):
            self._register(sequence.block_table[index], self._block_hash(sequence, index))

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._unregister(block)
        self._ref_counts[block] = 1
        return block

    def _unregister(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]

    def _register(self, block: int, content: bytes) -> None:
        """The first block with some content is the one that is shared; later twins stay private."""
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def _block_hash(self, sequence: Sequence, index: int) -> bytes:
        """Hash of block ``index`` and all before it, kept in the sequence so that each is computed once."""
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else sequence.cache_scope.encode()
            hashes.append(self._chain(parent, sequence, len(hashes)))
        return hashes[index]

    def _chain(self, parent: bytes, sequence: Sequence, index: int) -> bytes:
        start, end = index * self.block_size, (index + 1) * self.block_size
        digest = hashlib.blake2b(len(parent).to_bytes(4, "little"), digest_size=32)
        digest.update(parent)
        digest.update(array.array("q", sequence.token_ids[start:end]).tobytes())
        if sequence.has_images:
            for key in _image_keys(sequence, start, end):
                digest.update(key)
        return digest.digest()


def _image_keys(sequence: Sequence, start: int, end: int) -> Iterator[bytes]:
    """What tells images apart in tokens ``[start, end)``: each image's hash and which of its rows lie where."""
    stretches: list[tuple[int, int, int, bytes]] = []  # first token, last + 1, row of the first, hash
    for span in sequence.image_spans.overlapping(start, end):
        first, last = max(span.start, start), min(span.end, end)
        row = span.row_at(first)
        if stretches:
            begin, stop, begin_row, mm_hash = stretches[-1]
            if (stop, begin_row + stop - begin, mm_hash) == (first, row, span.mm_hash):  # goes on without a gap
                first, row = begin, begin_row
                stretches.pop()
        stretches.append((first, last, row, span.mm_hash))
    for first, last, row, mm_hash in stretches:
        position = array.array("q", (first - start, row, last - first)).tobytes()
        yield position + len(mm_hash).to_bytes(4, "little") + mm_hash
