"""Requests as the simulator sees them: numbers of tokens and tiles, drawn from the same recipes as the benchmarks'."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.workload import Picture, Recipe, Workload, recipes
from common.model.geometry import Tiling, count_tiles

INTERNVL = Tiling(min_tiles=1, max_tiles=12, use_thumbnail=True)
TOKENS_PER_TILE = 256
TOKENS_PER_COMPRESSED_TILE = 64


@dataclass(slots=True, eq=False)
class Image:
    """One picture of a request. Its first ``num_compressed`` tiles are the ones that ViR makes small."""

    num_tiles: int
    num_compressed: int = 0
    num_sent: int = 0
    """Tiles that have left a vision server."""
    num_there: int = 0
    """Tiles at the language server; they arrive in order."""

    def tokens(self, num_tiles: int) -> int:
        """Of its first so many tiles."""
        return TOKENS_PER_TILE * num_tiles - (TOKENS_PER_TILE - TOKENS_PER_COMPRESSED_TILE) * min(
            num_tiles, self.num_compressed
        )


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. Pictures stand before the text. Times are simulated seconds."""

    number: int
    text_tokens: int
    output_tokens: int
    images: list[Image] = field(default_factory=list)
    cached_tokens: int = 0
    """Of the prompt's beginning: their KV is at the language server."""

    arrived_at: float = 0.0
    first_at: float | None = None
    ended_at: float | None = None
    num_answered: int = 0
    """Tokens of the whole answer, whoever gives them."""
    prompt_tokens: int = 0
    num_ready: int = 0
    """Tokens of the prompt that can be read: all features before them are there."""
    num_read: int = 0
    num_generated: int = 0
    lost_at: float | None = None
    """When its language server was lost, until another has gone on."""
    is_queued: bool = False
    """Whether the language server knows that it can read on."""
    attempt: int = 0
    """Features on their way for an earlier one are for nobody."""

    def __post_init__(self) -> None:
        self.num_answered = self.output_tokens
        self._lay_out()

    def _lay_out(self) -> None:
        images = sum(image.tokens(image.num_tiles) for image in self.images)
        self.prompt_tokens = self.cached_tokens + images + self.text_tokens
        self.num_read = self.cached_tokens
        self.count_ready()

    def count_ready(self) -> None:
        """To be called when tiles have come."""
        ready = self.cached_tokens
        for image in self.images:
            ready += image.tokens(image.num_there)
            if image.num_there < image.num_tiles:
                self.num_ready = ready
                return
        self.num_ready = self.prompt_tokens

    def start_again(self, now: float) -> None:
        """At another language server: what was said so far is part of the prompt, and nothing of it is there."""
        self.lost_at = now
        self.text_tokens += self.cached_tokens + self.num_generated
        self.output_tokens -= self.num_generated
        self.cached_tokens = self.num_generated = 0
        for image in self.images:
            image.num_there = 0
        self.is_queued = False
        self.attempt += 1
        self._lay_out()


def jobs(
    workload: Workload, seed: int, vir_share: float = 0.0, tiling: Tiling = INTERNVL, salt: int = 0
) -> Iterator[Job]:
    """Endless, the same for the same seed. ``vir_share`` of all tiles are compressed; 0: a model without ViR.

    A picture that was seen before is not encoded again. One at the beginning of the prompt is not read again either;
    the others are read, but their features are there.
    """
    rng = np.random.default_rng([seed, 1])
    seen: dict[Picture, Image] = {}
    for recipe in recipes(workload, seed, salt=salt):
        yield _job(recipe, seen, rng, vir_share, tiling)


def _job(recipe: Recipe, seen: dict[Picture, Image], rng: np.random.Generator, vir_share: float, tiling: Tiling) -> Job:
    images: list[Image] = []
    cached_tokens = 0
    for picture in recipe.pictures:
        known = seen.get(picture)
        if known is not None and not images:
            cached_tokens += known.tokens(known.num_tiles)
            continue
        if known is not None:
            images.append(Image(known.num_tiles, known.num_compressed, known.num_tiles, known.num_tiles))
            continue
        num_tiles = count_tiles(picture.size.width, picture.size.height, tiling)
        num_compressed = int(rng.binomial(num_tiles, vir_share)) if vir_share else 0
        seen[picture] = Image(num_tiles, num_compressed)
        images.append(Image(num_tiles, num_compressed))
    return Job(recipe.number, max(1, recipe.input_tokens), recipe.output_tokens, images, cached_tokens)
