"""What benchmarks ask: seeded pictures and request bodies."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def noise_image(side: int, rng: np.random.Generator) -> Image.Image:
    """A square of soft random colours: compresses like a photo, never twice the same."""
    pixels = rng.integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_body(text: str, images: Sequence[Image.Image], **options: Any) -> dict[str, Any]:
    """A chat-completions body: the pictures, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **options}
