"""Spans answer as a walk over every token would, and a long video is not walked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_server.image_spans import ImageSpan, ImageSpans


@st.composite
def prompts(draw):
    """Pieces of three images in any mixture, the rows of each in order, with text between them or not."""
    spans, position, rows = [], 0, {}
    for _ in range(draw(st.integers(0, 8))):
        position += draw(st.integers(0, 3))
        image, length = draw(st.integers(0, 2)), draw(st.integers(1, 5))
        spans.append(ImageSpan(image, position, length, bytes([image]), rows.get(image, 0)))
        rows[image] = rows.get(image, 0) + length
        position += length
    return spans, position + draw(st.integers(0, 3))


def rows_by_position(spans):
    return {
        position: (span.image_index, span.row_at(position))
        for span in spans
        for position in range(span.start, span.end)
    }


@given(prompts(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_question_is_answered_as_by_a_walk_over_the_tokens(prompt, data):
    spans, num_tokens = prompt
    indexed, rows = ImageSpans(spans), rows_by_position(spans)
    start = data.draw(st.integers(0, num_tokens))
    end = data.draw(st.integers(start, num_tokens))
    found = list(indexed.overlapping(start, end))
    assert found == [span for span in spans if span.start < end and span.end > start]
    assert rows_by_position(indexed.until(end)) == {p: row for p, row in rows.items() if p < end}
    ready = [data.draw(st.integers(0, 20)) for _ in range(3)]
    missing = [p for p, (image, row) in rows.items() if p >= start and row >= ready[image]]
    assert indexed.first_missing(start, ready.__getitem__) == min(missing, default=None)
    assert (list(indexed), len(indexed)) == (spans, len(spans))


@pytest.mark.parametrize("num_ready", [0, 256 * 100, 256 * 100 + 17, 256 * 128])
def test_a_video_is_asked_for_once_however_many_frames_it_has(num_ready):
    spans = [ImageSpan(0, 10 + 262 * frame, 256, b"v", 256 * frame) for frame in range(128)]
    indexed, asked = ImageSpans(spans), []

    def count(image_index):
        asked.append(image_index)
        return num_ready

    frame, row = divmod(num_ready, 256)
    expected = 10 + 262 * frame + row if frame < 128 else None
    assert indexed.first_missing(5, count) == expected
    assert asked == [0]


def test_the_whole_images_of_a_prefix_fill_their_blocks_alone():
    spans = ImageSpans([ImageSpan(0, 2, 4, b"a"), ImageSpan(1, 9, 3, b"b"), ImageSpan(0, 14, 2, b"a", first_row=4)])
    assert [spans.whole_end(end, 1) for end in (5, 12, 15, 16, 20)] == [0, 0, 0, 16, 16]
    apart = ImageSpans([ImageSpan(0, 2, 4, b"a"), ImageSpan(1, 9, 3, b"b"), ImageSpan(2, 20, 3, b"c")])
    assert [apart.whole_end(end, 1) for end in (5, 6, 11, 12, 22, 23)] == [0, 6, 6, 12, 12, 23]
    # In blocks of 8, image 1 has rows in the block in which it begins behind text, and none beside image 0.
    assert [apart.whole_end(end, 8) for end in (8, 16, 24)] == [6, 12, 23]
    assert [apart.whole_end(end, 5) for end in (10, 15, 20)] == [0, 12, 12]  # one block would hold rows of both
    assert ImageSpans().whole_end(100, 4) == 0


@given(data=st.data(), block_size=st.integers(1, 6))
def test_what_is_whole_is_whole(data, block_size):
    """Against a slow definition: the longest prefix of whole blocks in which every image either lies or has no row."""
    spans, position, rows = [], 0, {}
    for index in data.draw(st.lists(st.integers(0, 3), max_size=6)):
        position += data.draw(st.integers(0, 3))
        size = data.draw(st.integers(1, 5))
        spans.append(ImageSpan(index, position, size, b"x", first_row=rows.get(index, 0)))
        rows[index] = rows.get(index, 0) + size
        position += size
    end = data.draw(st.integers(0, position // block_size + 1)) * block_size
    whole = ImageSpans(spans).whole_end(end, block_size)
    expected = 0
    for stop in {span.end for span in spans if span.end <= end}:
        blocks_end = -(-stop // block_size) * block_size
        begun = {span.image_index for span in spans if span.start < blocks_end}
        if all(span.end <= stop for span in spans if span.image_index in begun):
            expected = max(expected, stop)
    assert whole == expected
