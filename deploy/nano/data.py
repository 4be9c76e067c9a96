"""Seeded pictures with questions for the nano checkpoint.

Four tasks: `number` (1 to 4 digits), `shape` (one coloured shape), `count` (1 to 6 shapes) and `pair`
(two images of three digits, same number or not). `text` is a fifth, image-free kind. Knows nothing of tensors, tokens
or training: numpy and Pillow only. Run as a program it writes the demo pictures into `images/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 448  # pixels, one InternVL tile
CELL = 28  # pixels, 2 x 2 patches = one image token
GRID = TILE // CELL  # 16 cells a side

TASKS = ("number", "shape", "count", "pair")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 38, 38),
    "orange": (245, 128, 10),
    "yellow": (238, 204, 20),
    "green": (42, 150, 70),
    "blue": (32, 92, 205),
    "purple": (128, 50, 168),
    "pink": (245, 130, 185),
    "black": (28, 28, 30),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "number": (
        "What number is this?",
        "Which number do you see?",
        "Read the number.",
        "What is the number in the image?",
    ),
    "digits": (
        "How many digits does it have?",
        "How many digits are there?",
    ),
    "shape": (
        "What is in the image?",
        "What do you see?",
        "Describe the image.",
        "What is this?",
    ),
    "colour": (
        "What colour is it?",
        "Which colour do you see?",
    ),
    "kind": (
        "Which shape is this?",
        "What shape do you see?",
    ),
    "count": (
        "How many shapes are there?",
        "How many objects do you see?",
        "Count the shapes.",
        "How many shapes are in the image?",
    ),
    "pair": (
        "Do both images show the same number?",
        "Are the two numbers the same?",
        "Is it the same number?",
        "Compare the two numbers.",
    ),
    "text": (
        "Hello",
        "Hi",
        "Hello!",
        "Who are you?",
        "What can you do?",
        "What can you read?",
        "Help",
        "Thank you",
    ),
}
ABOUT = (
    "I am a very small model. I read numbers of up to four digits, name a coloured shape, "
    "count up to six shapes and compare the numbers in two images."
)

DEMOS = {"number": ("number", 271), "shape": ("shape", 303), "count": ("count", 170)}  # task, seed

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Limits:
    """How hard a picture may be; the defaults are the full tasks."""

    digit_weights: tuple[float, float, float, float] = (1, 1, 1, 1)  # chance of 1, 2, 3, 4 digits
    max_count: int = 6
    pair_weights: tuple[float, float, float, float] = (0, 0, 1, 0)  # pairs: three digits only


FULL = Limits()


@dataclass(frozen=True)
class Sprite:
    """A coloured mask, uint8 coverage [h, w], whose upper left pixel is (left, top)."""

    mask: np.ndarray
    left: int
    top: int
    colour: Colour


@dataclass(frozen=True)
class Scene:
    """One tile before it is drawn: a flat background with sprites on it."""

    background: Colour
    sprites: tuple[Sprite, ...]

    def planes(self) -> np.ndarray:
        """Draw the scene channel by channel: uint8 [3, 448, 448]."""
        canvas = np.empty((3, TILE, TILE), np.uint8)
        for plane, value in zip(canvas, self.background, strict=True):
            plane.fill(value)
        for sprite in self.sprites:
            height, width = sprite.mask.shape
            area = canvas[:, sprite.top : sprite.top + height, sprite.left : sprite.left + width]
            alpha = sprite.mask.astype(np.uint16)
            ink = np.array(sprite.colour, np.uint16)[:, None, None]
            area[:] = (area * (255 - alpha) + ink * alpha + 127) // 255
        return canvas

    def cells(self) -> np.ndarray:
        """Which of the 16 x 16 cells a sprite's box touches: bool [16, 16]."""
        touched = np.zeros((GRID, GRID), bool)
        for sprite in self.sprites:
            height, width = sprite.mask.shape
            rows = slice(sprite.top // CELL, (sprite.top + height - 1) // CELL + 1)
            columns = slice(sprite.left // CELL, (sprite.left + width - 1) // CELL + 1)
            touched[rows, columns] = True
        return touched

    def image(self) -> Image.Image:
        """The scene as a 448 x 448 RGB picture."""
        return Image.fromarray(np.ascontiguousarray(self.planes().transpose(1, 2, 0)))


@dataclass(frozen=True)
class Drawn:
    """A question whose pictures are still scenes."""

    scenes: tuple[Scene, ...]
    question: str
    answer: str
    short_answer: str


@dataclass(frozen=True)
class Sample:
    """A question about 448 x 448 RGB pictures; `short_answer` is the part of `answer` that is scored."""

    images: list[Image.Image]
    question: str
    answer: str
    short_answer: str


def sample(task: str, rng: np.random.Generator) -> Sample:
    """One question of `task` (see TASKS, or "text"), drawn from `rng` at full difficulty."""
    drawn = draw(task, rng)
    images = [scene.image() for scene in drawn.scenes]
    return Sample(images, drawn.question, drawn.answer, drawn.short_answer)


def demo(name: str) -> Sample:
    """One of DEMOS: the sample behind `images/<name>.png`."""
    task, seed = DEMOS[name]
    return sample(task, np.random.default_rng(seed))


def draw(task: str, rng: np.random.Generator, limits: Limits = FULL) -> Drawn:
    """One question of `task` with its scenes, not harder than `limits`."""
    makers = {"number": _number, "shape": _shape, "count": _count, "pair": _pair, "text": _text}
    return makers[task](rng, limits)


def number_scene(number: str, rng: np.random.Generator) -> Scene:
    """`number` in dark ink somewhere on a light background, 32 to 64 px type."""
    mask = _number_mask(number, int(rng.integers(32, 65)), int(rng.integers(2, 6)))
    left, top = _place(mask, rng)
    ink = tuple(int(value) for value in rng.integers(0, 90, 3))
    return Scene(_background(rng), (Sprite(mask, left, top, ink),))  # type: ignore[arg-type]


def shape_scene(shape: str, colour: str, rng: np.random.Generator) -> Scene:
    """One `shape` of 28 to 84 px in `colour` somewhere on a light background."""
    mask = _shape_mask(shape, int(rng.integers(28, 85)))
    left, top = _place(mask, rng)
    return Scene(_background(rng), (Sprite(mask, left, top, _tint(colour, rng)),))


def count_scene(count: int, rng: np.random.Generator) -> Scene:
    """`count` shapes of 28 to 60 px, of any kind and colour, at least 10 px apart."""
    background, sprites = _background(rng), []
    while len(sprites) < count:
        shape, colour = _pick(SHAPES, rng), _pick(tuple(COLOURS), rng)
        mask = _shape_mask(shape, int(rng.integers(28, 61)))
        left, top = _place(mask, rng)
        if all(_apart(sprite, mask, left, top) for sprite in sprites):
            sprites.append(Sprite(mask, left, top, _tint(colour, rng)))
    return Scene(background, tuple(sprites))


def _number(rng: np.random.Generator, limits: Limits) -> Drawn:
    number = _digits(rng, limits.digit_weights)
    scene = number_scene(number, rng)
    if rng.random() < 0.1:
        length = len(number)
        answer = f"It has {length} digits." if length > 1 else "It has 1 digit."
        return Drawn((scene,), _pick(QUESTIONS["digits"], rng), answer, str(length))
    return Drawn((scene,), _pick(QUESTIONS["number"], rng), f"The number is {number}.", number)


def _shape(rng: np.random.Generator, limits: Limits) -> Drawn:
    shape, colour = _pick(SHAPES, rng), _pick(tuple(COLOURS), rng)
    scene = shape_scene(shape, colour, rng)
    asked = rng.random()
    if asked < 0.15:
        return Drawn((scene,), _pick(QUESTIONS["colour"], rng), f"It is {colour}.", colour)
    if asked < 0.3:
        return Drawn((scene,), _pick(QUESTIONS["kind"], rng), f"It is a {shape}.", shape)
    both = f"{colour} {shape}"
    article = "An" if colour[0] in "aeiou" else "A"
    return Drawn((scene,), _pick(QUESTIONS["shape"], rng), f"{article} {both}.", both)


def _count(rng: np.random.Generator, limits: Limits) -> Drawn:
    count = int(rng.integers(1, limits.max_count + 1))
    answer = f"There are {count} shapes." if count > 1 else "There is 1 shape."
    question = _pick(QUESTIONS["count"], rng)
    return Drawn((count_scene(count, rng),), question, answer, str(count))


def _pair(rng: np.random.Generator, limits: Limits) -> Drawn:
    first = _digits(rng, limits.pair_weights)
    second, verdict = first, "the same number"
    if rng.random() < 0.5:
        second, verdict = _other(first, rng, limits.pair_weights), "different numbers"
    scenes = (number_scene(first, rng), number_scene(second, rng))
    answer = f"The first shows {first}, the second shows {second}: {verdict}."
    return Drawn(scenes, _pick(QUESTIONS["pair"], rng), answer, verdict)


def _text(rng: np.random.Generator, limits: Limits) -> Drawn:
    return Drawn((), _pick(QUESTIONS["text"], rng), ABOUT, ABOUT)


def _digits(rng: np.random.Generator, weights: tuple[float, ...]) -> str:
    """A number without leading zeros; `weights` are the chances of 1, 2, 3 and 4 digits."""
    length = int(rng.choice(4, p=np.array(weights) / sum(weights))) + 1
    low = 10 ** (length - 1) if length > 1 else 0
    return str(int(rng.integers(low, 10**length)))


def _other(number: str, rng: np.random.Generator, weights: tuple[float, ...]) -> str:
    """A different number; in half of the cases a near miss in one digit."""
    while True:
        if rng.random() < 0.5:
            other = _digits(rng, weights)
        else:
            place = int(rng.integers(len(number)))
            other = number[:place] + str(int(rng.integers(10))) + number[place + 1 :]
        if other != number and (len(other) == 1 or other[0] != "0"):
            return other


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _place(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A (left, top) anywhere on the tile, 4 px inside its border."""
    height, width = mask.shape
    left, top = rng.integers(4, (TILE - width - 3, TILE - height - 3))
    return int(left), int(top)


def _apart(sprite: Sprite, mask: np.ndarray, left: int, top: int, gap: int = 10) -> bool:
    height, width = sprite.mask.shape
    return (
        left >= sprite.left + width + gap
        or top >= sprite.top + height + gap
        or sprite.left >= left + mask.shape[1] + gap
        or sprite.top >= top + mask.shape[0] + gap
    )


def _background(rng: np.random.Generator) -> Colour:
    red, green, blue = (int(value) for value in rng.integers(222, 256, 3))
    return red, green, blue


def _tint(colour: str, rng: np.random.Generator) -> Colour:
    """The named colour, every channel off by at most 10."""
    channels = np.clip(np.array(COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255)
    return int(channels[0]), int(channels[1]), int(channels[2])


def _number_mask(number: str, size: int, spacing: int) -> np.ndarray:
    """Coverage of the digits side by side with `spacing` px between them."""
    glyphs = [_glyph(digit, size) for digit in number]
    gap = np.zeros((glyphs[0].shape[0], spacing), np.uint8)
    parts = [part for glyph in glyphs for part in (glyph, gap)]
    return np.concatenate(parts[:-1], axis=1)


@cache
def _glyph(digit: str, size: int) -> np.ndarray:
    """Coverage of one digit in Pillow's built-in font, cropped to its ink; equal heights per size."""
    font = ImageFont.load_default(size=size)
    _, top, _, bottom = font.getbbox("0123456789")
    left, _, right, _ = font.getbbox(digit)
    canvas = Image.new("L", (int(right - left) + 1, int(bottom - top) + 1))
    ImageDraw.Draw(canvas).text((-left, -top), digit, fill=255, font=font)
    return np.asarray(canvas)


@cache
def _shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage [size, size] of a shape, drawn four times larger for smooth edges."""
    side = size * 4
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        hole = side * 0.27
        pen.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
    if shape == "square":
        inset = side * 0.06
        pen.rectangle((inset, inset, side - 1 - inset, side - 1 - inset), fill=255)
    if shape == "triangle":
        pen.polygon([(side / 2, 0), (side - 1, side - 1), (0, side - 1)], fill=255)
    if shape == "cross":
        low, high = side * 0.34, side * 0.66
        pen.rectangle((low, 0, high, side - 1), fill=255)
        pen.rectangle((0, low, side - 1, high), fill=255)
    if shape == "star":
        pen.polygon(_star_points(side), fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _star_points(side: int) -> list[tuple[float, float]]:
    """Ten corners of a five-pointed star that fills a box of `side` px."""
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.22) * side
    return [(side / 2 + r * np.cos(a), side / 2 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]


if __name__ == "__main__":
    for demo_name in DEMOS:
        demo(demo_name).images[0].save(Path(__file__).parent / "images" / f"{demo_name}.png")
