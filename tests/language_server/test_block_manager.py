"""KV accounting: what is taken comes back, and two sequences share a block only on purpose."""

from itertools import pairwise

import pytest

from language_server.block_manager import BlockManager
from language_server.image_spans import ImageSpan, ImageSpans
from language_server.sequence import SamplingParams, Sequence

BLOCK = 4


def make_sequence(tokens, *, spans=(), scope="", seq_id=0):
    return Sequence(seq_id, b"r", list(tokens), SamplingParams(max_tokens=8), ImageSpans(spans), cache_scope=scope)


def compute(blocks, sequence):
    """Let a sequence take what the cache has, allocate the rest and mark it computed; returns tokens found."""
    prefix = blocks.find_prefix(sequence)
    blocks.attach(sequence, prefix)
    assert blocks.allocate(sequence, sequence.num_tokens)
    blocks.commit(sequence, sequence.num_tokens)
    return len(prefix) * BLOCK


def test_allocation_is_all_or_nothing():
    blocks = BlockManager(3, BLOCK)
    first, second = make_sequence(range(8)), make_sequence(range(8))
    assert blocks.allocate(first, 8)
    assert not blocks.allocate(second, 8)
    assert second.block_table == []
    assert blocks.num_free_blocks == 1


def test_allocation_extends_only_by_what_is_missing():
    blocks = BlockManager(8, BLOCK)
    sequence = make_sequence(range(9))
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (9, 3)):
        assert blocks.allocate(sequence, num_tokens)
        assert len(sequence.block_table) == num_blocks
    blocks.free(sequence)
    assert blocks.num_free_blocks == 8
    assert sequence.num_computed_tokens == 0


def test_equal_beginnings_share_blocks_while_both_live_and_after():
    blocks = BlockManager(16, BLOCK)
    first = make_sequence([*range(10), 1, 2])
    second = make_sequence([*range(10), 7, 8])
    assert compute(blocks, first) == 0
    assert compute(blocks, second) == 8
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_free_blocks == 16
    assert compute(blocks, make_sequence(range(10))) == 8


def test_a_fully_cached_prompt_leaves_a_token_to_compute():
    blocks = BlockManager(16, BLOCK)
    compute(blocks, make_sequence(range(8)))
    assert compute(blocks, make_sequence(range(8))) == 4


def test_a_block_says_nothing_without_all_before_it():
    blocks = BlockManager(16, BLOCK)
    compute(blocks, make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert compute(blocks, make_sequence([0, 2, 3, 4, 5, 6, 7, 8, 9])) == 0


def test_images_with_equal_placeholders_do_not_share():
    prompt = [1, 2, *[9] * 8, 3, 4, 5]
    blocks = BlockManager(32, BLOCK)
    compute(blocks, make_sequence(prompt, spans=[ImageSpan(0, 2, 8, b"a" * 32)]))
    assert compute(blocks, make_sequence(prompt, spans=[ImageSpan(0, 2, 8, b"b" * 32)])) == 0
    assert compute(blocks, make_sequence(prompt, spans=[ImageSpan(1, 2, 8, b"a" * 32)])) == 12


def test_the_same_image_cut_differently_does_not_share():
    prompt = [*[9] * 8, 3]
    blocks = BlockManager(32, BLOCK)
    compute(blocks, make_sequence(prompt, spans=[ImageSpan(0, 0, 8, b"a" * 32)]))
    two_images = [ImageSpan(0, 0, 4, b"a" * 32), ImageSpan(1, 4, 4, b"a" * 32)]
    assert compute(blocks, make_sequence(prompt, spans=two_images)) == 4


def test_other_tiles_of_the_same_image_do_not_share():
    prompt = [1, 2, *[9] * 8, 3, 4, 5]
    blocks = BlockManager(32, BLOCK)
    compute(blocks, make_sequence(prompt, spans=[ImageSpan(0, 2, 8, b"a" * 32)]))
    assert compute(blocks, make_sequence(prompt, spans=[ImageSpan(0, 2, 8, b"a" * 32, first_row=8)])) == 0
    half = [ImageSpan(0, 2, 4, b"a" * 32), ImageSpan(0, 6, 4, b"a" * 32, first_row=8)]
    assert compute(blocks, make_sequence(prompt, spans=half)) == 4


@pytest.mark.parametrize("cuts", [(3,), (4,), (1, 2, 7)])
def test_the_same_rows_share_in_however_many_pieces(cuts):
    prompt = [1, 2, *[9] * 8, 3, 4, 5]
    edges = list(pairwise([0, *cuts, 8]))
    blocks = BlockManager(32, BLOCK)
    compute(blocks, make_sequence(prompt, spans=[ImageSpan(0, 2, 8, b"a" * 32)]))
    pieces = [ImageSpan(index, 2 + row, end - row, b"a" * 32, first_row=row) for index, (row, end) in enumerate(edges)]
    assert compute(blocks, make_sequence(prompt, spans=pieces)) == 12


def test_text_between_two_frames_is_part_of_what_is_shared():
    def video(gap, second_row=4):
        spans = [ImageSpan(0, 1, 4, b"v" * 32), ImageSpan(0, 5 + len(gap), 4, b"v" * 32, second_row)]
        return make_sequence([1, *[9] * 4, *gap, *[9] * 4, 3, 4, 5, 6], spans=spans)

    blocks = BlockManager(64, BLOCK)
    compute(blocks, video([7, 8]))
    assert compute(blocks, video([7, 8])) == 12
    assert compute(blocks, video([7, 8], second_row=8)) == 4
    assert compute(blocks, video([7, 6])) == 4


def test_scopes_do_not_share():
    blocks = BlockManager(16, BLOCK)
    compute(blocks, make_sequence(range(9), scope="alice"))
    assert compute(blocks, make_sequence(range(9), scope="bob")) == 0
    assert compute(blocks, make_sequence(range(9), scope="alice")) == 8


def test_unused_content_is_evicted_oldest_first_tail_before_head():
    blocks = BlockManager(4, BLOCK)
    old, new = make_sequence(range(8)), make_sequence(range(100, 108))
    for sequence in (old, new):
        compute(blocks, sequence)
    for sequence in (old, new):
        blocks.free(sequence)
    intruder = make_sequence(range(50, 54))
    assert blocks.allocate(intruder, 1)
    assert len(blocks.find_prefix(make_sequence(range(9)))) == 1
    assert len(blocks.find_prefix(make_sequence(range(100, 109)))) == 2


def test_discarded_content_is_not_found_again():
    blocks = BlockManager(8, BLOCK)
    sequence = make_sequence(range(9))
    compute(blocks, sequence)
    blocks.discard(sequence)
    assert blocks.num_free_blocks == 8
    assert blocks.find_prefix(make_sequence(range(9))) == []


@pytest.mark.parametrize("num_tokens", [3, 4, 11])
def test_without_prefix_caching_nothing_is_found(num_tokens):
    blocks = BlockManager(16, BLOCK, enable_prefix_caching=False)
    assert compute(blocks, make_sequence(range(num_tokens))) == 0
    assert compute(blocks, make_sequence(range(num_tokens))) == 0
