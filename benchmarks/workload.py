"""What benchmarks ask: seeded pictures, texts and request bodies. Knows nothing of servers, connections or time.

A ``Recipe`` says all there is to a request in a few numbers and is drawn in order; ``render`` makes the body of it,
which is slow for pictures, may run in any thread, and gives the same bytes for the same recipe.

* Pictures are noise that is soft at the scale of 32 pixels, JPEG of quality 90: about 1.1 bit per pixel, as photos
  have.
* Text is common short English words, one token each in the vocabularies of Qwen and Llama (nano's is smaller: more
  tokens). How many tokens a prompt really had is what the server says in ``usage``.
* Pictures stand before the text, as in InternVL's own format. Every text starts with a number of its own, and every
  picture is new but for ``image_reuse_ratio`` of them, so no prefix cache and no feature cache answers except as
  stated; a ``salt`` keeps it so when the same seed is used again on a server that is still running.
"""

import base64
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from benchmarks.arrivals import Recorded

_RECENT_IMAGES: Final = 32
"""A repeated picture is one of the last this many."""
_OPENING_TOKENS: Final = 8
"""What the number that opens every text costs: each digit is a token."""
_COMMON: Final = (
    "the of and to in is that for it was on are as with they be at one have this from or had by word but what "
    "some we can out other were all there when up use your how said an each she which do their time if will way "
    "about many then them write would like so these her long make thing see him two has look more day could go "
    "come did number sound no most people my over know water than call first who may down side been now find any "
    "new work part take get place made live where after back little only round man year came show every good me "
    "give our under name very through just form sentence great think say help low line differ turn cause much "
    "mean before move right boy old too same tell does set three want air well also play small end put home read "
    "hand port large spell add even land here must big high such follow act why ask men change went light kind "
    "off need house picture try us again animal point "
)
_WORDS: Final = tuple(_COMMON.split())


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"


class Lengths(NamedTuple):
    """Drawn uniformly, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def fixed(length: int) -> Lengths:
    """Always the same."""
    return Lengths(length, length)


_SQUARE: Final = ((Size(448, 448), 1.0),)
_ONE_IMAGE, _TOKENS_IN, _TOKENS_OUT = fixed(1), fixed(128), fixed(64)


@dataclass(frozen=True, slots=True)
class Workload:
    """What one source asks. ``image_sizes`` are drawn by weight; ``options`` are further fields of every body."""

    image_sizes: tuple[tuple[Size, float], ...] = _SQUARE
    images_per_request: Lengths = _ONE_IMAGE
    image_reuse_ratio: float = 0.0
    text_only_share: float = 0.0
    input_tokens: Lengths = _TOKENS_IN
    output_tokens: Lengths = _TOKENS_OUT
    ignore_eos: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.describe_images()}, {self.input_tokens} tokens in, {self.output_tokens} out{self._ending}"

    def describe_images(self) -> str:
        if self.text_only_share == 1 or self.images_per_request.high == 0:
            return "text only"
        total = sum(weight for _, weight in self.image_sizes)
        sizes = " ".join(
            f"{size} px" if len(self.image_sizes) == 1 else f"{size} px:{weight / total:.2g}"
            for size, weight in self.image_sizes
        )
        share = f", {self.text_only_share:.0%} text only" if self.text_only_share else ""
        return f"{self.images_per_request} x {sizes}, {self.image_reuse_ratio:.0%} repeated{share}"

    @property
    def _ending(self) -> str:
        return " (ignore_eos)" if self.ignore_eos else ""


@dataclass(frozen=True, slots=True)
class Picture:
    """All there is to say of a picture: equal ones have equal bytes."""

    size: Size
    seed: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """One request."""

    number: int
    seed: int
    pictures: tuple[Picture, ...]
    input_tokens: int
    output_tokens: int


def recipes(
    workload: Workload, seed: int, recorded: Iterable[Recorded] | None = None, salt: int = 0
) -> Iterator[Recipe]:
    """Requests in order, endless unless their lengths are ``recorded``; the same for the same seed.

    Another ``salt`` (62 bits) makes other pictures and words of the same sizes and numbers.
    """
    rng = np.random.default_rng(seed)
    recent: deque[Picture] = deque(maxlen=_RECENT_IMAGES)
    lengths = None if recorded is None else iter(recorded)
    number = 0
    while True:
        if lengths is None:
            input_tokens, output_tokens = _draw(workload.input_tokens, rng), _draw(workload.output_tokens, rng)
        elif (given := next(lengths, None)) is not None:
            input_tokens, output_tokens = given.input_tokens, given.output_tokens
        else:
            return
        number += 1
        is_text_only = rng.random() < workload.text_only_share
        num_images = 0 if is_text_only else _draw(workload.images_per_request, rng)
        pictures = tuple(_picture(workload, recent, rng, salt) for _ in range(num_images))
        yield Recipe(number, int(rng.integers(2**62)) ^ salt, pictures, input_tokens, output_tokens)


def _draw(lengths: Lengths, rng: np.random.Generator) -> int:
    return int(rng.integers(lengths.low, lengths.high + 1))


def _picture(workload: Workload, recent: deque[Picture], rng: np.random.Generator, salt: int) -> Picture:
    if recent and rng.random() < workload.image_reuse_ratio:
        return recent[int(rng.integers(len(recent)))]
    weights = np.array([weight for _, weight in workload.image_sizes])
    size = workload.image_sizes[int(rng.choice(len(weights), p=weights / weights.sum()))][0]
    picture = Picture(size, int(rng.integers(2**62)) ^ salt)
    recent.append(picture)
    return picture


def render(recipe: Recipe, workload: Workload, model: str | None) -> bytes:
    """The JSON body. Pictures are put in as bytes, since encoding them again as JSON strings would take as long
    again."""
    parts = [
        b'{"type":"image_url","image_url":{"url":"data:image/jpeg;base64,%b"}}' % _base64_of(picture)
        for picture in recipe.pictures
    ]
    parts.append(msgspec.json.encode({"type": "text", "text": prompt_text(recipe)}))
    options: dict[str, Any] = {
        "max_tokens": recipe.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"model": model} if model is not None else {}),
        **({"ignore_eos": True} if workload.ignore_eos else {}),
        **workload.options,
    }
    messages = b'{"messages":[{"role":"user","content":[%b]}],' % b",".join(parts)
    return messages + msgspec.json.encode(options)[1:]


def prompt_text(recipe: Recipe) -> str:
    """About ``input_tokens`` tokens that no other request starts with."""
    rng = np.random.default_rng(recipe.seed)
    words = rng.integers(0, len(_WORDS), max(1, recipe.input_tokens - _OPENING_TOKENS))
    return f"{recipe.seed % 10**6:06}. {' '.join(_WORDS[word] for word in words)}"


@lru_cache(maxsize=_RECENT_IMAGES)
def _base64_of(picture: Picture) -> bytes:
    return base64.b64encode(jpeg(noise_picture(picture.size, np.random.default_rng(picture.seed))))


def body_bytes(workload: Workload) -> int:
    """About how large its bodies get, so that no more of them are held than fit into memory."""
    pixels = max(size.width * size.height for size, _ in workload.image_sizes)
    num_images = 0 if workload.text_only_share == 1 else workload.images_per_request.high
    return round(pixels * num_images * 1.15 / 8 * 4 / 3) + 6 * workload.input_tokens.high + 1024


def noise_image(side: int, rng: np.random.Generator) -> Image.Image:
    """A square of soft random colours: compresses like a photo, never twice the same."""
    return noise_picture(Size(side, side), rng)


def noise_picture(size: Size, rng: np.random.Generator) -> Image.Image:
    """A rectangle of the same."""
    shape = (max(1, size.height // 32), max(1, size.width // 32), 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def chat_body(text: str, images: Sequence[Image.Image], **options: Any) -> dict[str, Any]:
    """A chat-completions body: the pictures, then the text."""
    urls = ["data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode() for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **options}
