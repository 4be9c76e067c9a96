"""Packing: image rows replace placeholders, whatever the chunks, and rows that do not fit are refused one by one."""

from itertools import pairwise

import pytest
import torch

from common.service import metrics
from common.service.errors import InternalError
from language_server.attention import choose_backend
from language_server.attention.base import KVCache
from language_server.image_spans import ImageSpan, ImageSpans
from language_server.model_runner import ModelRunner
from language_server.scheduler import ScheduledChunk
from language_server.sequence import SamplingParams, Sequence
from tests.language_server.models import tiny_model

HIDDEN = 56
PLACEHOLDER = 10


class Rows:
    """Image rows by image index."""

    def __init__(self, images):
        self.images = images

    def num_ready_tokens(self, request_id, image_index):
        return len(self.images[image_index])

    def rows(self, request_id, image_index, start, stop):
        return self.images[image_index][start:stop]


class Bench:
    def __init__(self, images):
        self.model, backbone = tiny_model("qwen3")
        cache = KVCache(backbone.kv_shape, 32, 4, backbone.device)
        self.runner = ModelRunner(backbone, cache, choose_backend(backbone.device), Rows(images))
        self.next_block = 0

    def sequence(self, prompt, spans=()):
        sequence = Sequence(self.next_block, b"r", prompt, SamplingParams(max_tokens=4), ImageSpans(spans))
        sequence.block_table = list(range(self.next_block, self.next_block + 8))
        self.next_block += 8
        return sequence

    def run(self, *chunks):
        return self.runner.run([self.runner.prepare(ScheduledChunk(*chunk)) for chunk in chunks])

    def expected(self, prompt, spans, images):
        """Logits after the prompt, from the undivided language model on embeddings put together by hand."""
        embeds = self.model.get_input_embeddings()(torch.tensor([prompt])).clone()
        for span in spans:
            embeds[0, span.start : span.end] = images[span.image_index][span.first_row : span.end_row].float()
        with torch.inference_mode():
            hidden = self.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            return self.model.lm_head(hidden[0, -1])


def make_images(*lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(length, HIDDEN, generator=generator).to(dtype) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(), (3,), (6, 7, 20), (5, 13, 14, 25)])
def test_image_rows_take_the_places_of_their_placeholders(cuts, dtype):
    images = make_images(8, 11, dtype=dtype)
    spans = [ImageSpan(0, 5, 8, b"a"), ImageSpan(1, 14, 11, b"b")]
    prompt = [*range(20, 25), *[PLACEHOLDER] * 8, 30, *[PLACEHOLDER] * 11, 31]
    bench = Bench(images)
    sequence = bench.sequence(prompt, spans)
    edges = [0, *cuts, len(prompt)]
    for start, end in pairwise(edges):
        logits = bench.run((sequence, start, end))
    torch.testing.assert_close(logits[0], bench.expected(prompt, spans, images), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [(), (3,), (6, 7, 20), (5, 13, 14, 22)])
def test_frames_of_one_video_and_a_block_of_two_images(cuts):
    """Rows of an image go where its pieces lie, each from its own first row on."""
    images = make_images(9, 4)
    spans = [
        ImageSpan(0, 2, 3, b"v"),
        ImageSpan(0, 8, 3, b"v", first_row=3),
        ImageSpan(0, 13, 3, b"v", first_row=6),
        ImageSpan(1, 16, 4, b"i"),
    ]
    prompt = list(range(20, 44))
    for span in spans:
        prompt[span.start : span.end] = [PLACEHOLDER] * span.num_tokens
    bench = Bench(images)
    sequence = bench.sequence(prompt, spans)
    for start, end in pairwise([0, *cuts, len(prompt)]):
        logits = bench.run((sequence, start, end))
    torch.testing.assert_close(logits[0], bench.expected(prompt, spans, images), atol=5e-5, rtol=1e-5)


def test_only_chunks_that_end_the_known_tokens_yield_logits():
    bench = Bench(make_images(4))
    text, image = (
        bench.sequence([*range(20, 29)]),
        bench.sequence([40, *[PLACEHOLDER] * 4, 41], [ImageSpan(0, 1, 4, b"a")]),
    )
    bench.run((text, 0, 8))
    logits = bench.run((text, 8, 9), (image, 0, 3))
    assert logits.shape == (1, 512)
    torch.testing.assert_close(logits[0], bench.expected(text.token_ids, [], []), atol=5e-5, rtol=1e-5)
    assert bench.run((image, 3, 5)).shape == (0, 512)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(3, HIDDEN), torch.zeros(4, HIDDEN - 1), torch.zeros(4, HIDDEN, dtype=torch.int8), torch.zeros(HIDDEN)],
    ids=["too-few", "too-narrow", "integers", "flat"],
)
def test_rows_that_do_not_fit_the_placeholders_are_refused(rows):
    bench = Bench([rows])
    sequence = bench.sequence([40, *[PLACEHOLDER] * 4, 41], [ImageSpan(0, 1, 4, b"a")])
    num_before = num_mismatches()
    with pytest.raises(InternalError, match="image features are"):
        bench.runner.prepare(ScheduledChunk(sequence, 0, 6))
    assert num_mismatches() == num_before + 1


def num_mismatches() -> float:
    (family,) = metrics.LANGUAGE_PLACEHOLDER_MISMATCH.collect()
    return family.samples[0].value
