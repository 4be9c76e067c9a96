"""Requests are what was asked for, differ from one another, and are the same for the same seed."""

import base64
import io
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from benchmarks.arrivals import Recorded
from benchmarks.workload import (
    Lengths,
    Recipe,
    Size,
    Workload,
    body_bytes,
    fixed,
    noise_picture,
    prompt_text,
    recipes,
    render,
)

SMALL = ((Size(64, 48), 1.0),)


def first(number: int, workload: Workload, seed: int = 0) -> list[Recipe]:
    return list(itertools.islice(recipes(workload, seed), number))


def images_of(body: bytes) -> list[Image.Image]:
    parts = json.loads(body)["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_a_body():
    workload = Workload(SMALL, images_per_request=fixed(2), output_tokens=fixed(7), ignore_eos=True, options={"a": 1})
    (recipe,) = first(1, workload)
    body = render(recipe, workload, "nano")
    assert [image.size for image in images_of(body)] == [(64, 48), (64, 48)]
    rest = json.loads(body)
    assert rest["messages"][0]["content"][-1] == {"type": "text", "text": prompt_text(recipe)}
    del rest["messages"]
    assert rest == {
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "model": "nano",
        "ignore_eos": True,
        "a": 1,
    }
    assert body == render(recipe, workload, "nano")


def test_seeds():
    workload = Workload(SMALL, image_reuse_ratio=0.5)
    assert first(20, workload) == first(20, workload)
    assert first(20, workload) != first(20, workload, seed=1)


def test_another_salt_is_another_content_of_the_same_shape():
    workload = Workload(images_per_request=Lengths(0, 3), image_reuse_ratio=0.5, input_tokens=Lengths(1, 50))
    plain = first(50, workload)
    salted = list(itertools.islice(recipes(workload, 0, salt=12345), 50))

    def shape(recipe: Recipe):
        return recipe.number, recipe.input_tokens, recipe.output_tokens, [picture.size for picture in recipe.pictures]

    assert [shape(recipe) for recipe in salted] == [shape(recipe) for recipe in plain]
    contents = [{p.seed for recipe in found for p in recipe.pictures} for found in (plain, salted)]
    assert len(contents[0]) == len(contents[1]) and not contents[0] & contents[1]
    assert not {prompt_text(recipe) for recipe in plain} & {prompt_text(recipe) for recipe in salted}


def test_no_two_prompts_begin_alike():
    texts = [prompt_text(recipe) for recipe in first(2000, Workload(text_only_share=1, input_tokens=fixed(64)))]
    assert len({text[:40] for text in texts}) == len(texts)


@pytest.mark.parametrize("tokens", [1, 16, 500])
def test_a_prompt_has_about_one_word_a_token(tokens):
    (recipe,) = first(1, Workload(input_tokens=fixed(tokens)))
    words = prompt_text(recipe).split()
    assert len(words) == 1 + max(1, tokens - 8)


def test_without_reuse_every_picture_is_new():
    pictures = [picture for recipe in first(500, Workload(images_per_request=fixed(3))) for picture in recipe.pictures]
    assert len(set(pictures)) == 1500


def test_the_share_of_repeated_pictures():
    pictures = [picture for recipe in first(4000, Workload(image_reuse_ratio=0.3)) for picture in recipe.pictures]
    assert 1 - len(set(pictures)) / len(pictures) == pytest.approx(0.3, abs=0.03)


def test_the_share_of_text_and_the_mix_of_sizes():
    mixed = Workload(image_sizes=((Size(448, 448), 3.0), (Size(896, 896), 1.0)), text_only_share=0.25)
    found = first(4000, mixed)
    assert sum(not recipe.pictures for recipe in found) / len(found) == pytest.approx(0.25, abs=0.03)
    sizes = Counter(picture.size.width for recipe in found for picture in recipe.pictures)
    assert sizes[448] / sizes.total() == pytest.approx(0.75, abs=0.03)


def test_lengths_include_both_ends():
    ranged = Workload(images_per_request=Lengths(0, 2), input_tokens=Lengths(10, 12), output_tokens=Lengths(1, 3))
    found = first(300, ranged)
    assert {recipe.input_tokens for recipe in found} == {10, 11, 12}
    assert {recipe.output_tokens for recipe in found} == {1, 2, 3}
    assert {len(recipe.pictures) for recipe in found} == {0, 1, 2}


def test_recorded_lengths_win():
    recorded = [Recorded(0.0, 5, 6), Recorded(1.0, 7, 8)]
    found = list(recipes(Workload(), 0, recorded))
    assert [(recipe.input_tokens, recipe.output_tokens) for recipe in found] == [(5, 6), (7, 8)]


@pytest.mark.parametrize("side", [448, 896])
def test_pictures_compress_like_photos(side):
    """About 1.1 bit per pixel; the estimate of a body's size is of the right order."""
    workload = Workload(((Size(side, side), 1.0),))
    (recipe,) = first(1, workload)
    body = render(recipe, workload, None)
    assert 0.8 < len(body) * 3 / 4 * 8 / side**2 < 1.5
    assert len(body) == pytest.approx(body_bytes(workload), rel=0.2)


def test_a_picture_may_be_tiny():
    assert noise_picture(Size(1, 3), np.random.default_rng(0)).size == (1, 3)


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (Workload(), "1 x 448 px, 0% repeated, 128 tokens in, 64 out"),
        (Workload(text_only_share=1, ignore_eos=True), "text only, 128 tokens in, 64 out (ignore_eos)"),
        (
            Workload(((Size(448, 448), 1), (Size(1920, 1080), 3)), text_only_share=0.5, image_reuse_ratio=0.9),
            "1 x 448 px:0.25 1920x1080 px:0.75, 90% repeated, 50% text only, 128 tokens in, 64 out",
        ),
    ],
)
def test_in_words(workload, words):
    assert str(workload) == words
