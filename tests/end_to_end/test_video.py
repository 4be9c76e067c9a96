"""A video, a list of frames and combined images: token for token what the undivided model gives for their tiles."""

import base64
import io
from typing import Any

import av
import numpy as np
import pytest
import torch
from openai import AsyncOpenAI
from PIL import Image

from tests import reference
from tests.checkpoints import VISION_300M, make_checkpoint
from tests.end_to_end.conftest import data_url, serve
from tests.end_to_end.test_parity import System, noise

NUM_TOKENS = 10
NUM_FRAMES = 20
FPS = 10


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    path = tmp_path_factory.mktemp("video")
    checkpoint = make_checkpoint(path, layout="hf", vision=VISION_300M, seed=7)
    with serve(str(path), served_model_name=["parity"], dtype="float32") as deployment:
        yield System(deployment.address, checkpoint.reference(), checkpoint.tokenizer, None)


def video() -> bytes:
    """Two seconds of a picture that changes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_image(noise(320, 240, number // 5))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def segments(num_segments: int) -> list[int]:
    """Frame numbers that the published ``get_index`` gives for a whole video."""
    last = NUM_FRAMES - 1
    size = last / num_segments
    return [int(size / 2 + np.round(size * number)) for number in range(num_segments)]


def frames_of(data: bytes, num_segments: int) -> list[Image.Image]:
    with av.open(io.BytesIO(data), "r") as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == NUM_FRAMES
    return [frames[number] for number in segments(num_segments)]


def block(num_tiles: int) -> str:
    return f"<img>{'<IMG_CONTEXT>' * 256 * num_tiles}</img>\n"


def expected(system: Any, content: str, images: list[Image.Image], max_tiles: int = 12) -> list[int]:
    """What the undivided model says of ``content`` with the tiles of ``images`` in it."""
    text = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([system.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        output = system.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pixel_values=reference.pixel_values(images, hi=max_tiles),
        )
    return output[0, ids.shape[1] :].tolist()


async def answered(system: System, parts: list[dict[str, Any]], **extra: Any) -> list[int]:
    async with AsyncOpenAI(base_url=f"{system.address}/v1", api_key="none", timeout=100, max_retries=0) as client:
        reply = await client.chat.completions.create(
            model="parity",
            messages=[{"role": "user", "content": parts}],
            max_completion_tokens=NUM_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "skip_special_tokens": False, **extra},
        )
    return reply.choices[0].model_extra["token_ids"]


QUESTION = {"type": "text", "text": "What happens?"}


def frame_prompt(num_frames: int) -> str:
    return "".join(f"Frame-{number}: {block(1)}" for number in range(1, num_frames + 1)) + QUESTION["text"]


@pytest.mark.parametrize(
    ("asked", "num_frames"), [({}, 8), ({"num_frames": 4}, 4), ({"fps": 3}, 6), ({"num_frames": 3, "fps": 5}, 3)]
)
async def test_a_video_file(system, asked, num_frames):
    data = video()
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    tokens = await answered(
        system, [{"type": "video_url", "video_url": {"url": url}}, QUESTION], media_io_kwargs={"video": asked}
    )
    assert tokens == expected(system, frame_prompt(num_frames), frames_of(data, num_frames), max_tiles=1)


async def test_a_list_of_frames(system):
    frames = [noise(640, 200, number) for number in range(3)]
    part = {"type": "video", "video": [data_url(frame) for frame in frames]}
    assert await answered(system, [part, QUESTION]) == expected(system, frame_prompt(3), frames, max_tiles=1)


async def test_combined_images(system):
    images = [noise(900, 448, 11), noise(448, 448, 12)]
    num_tiles = sum(len(reference.tiles(image)) for image in images)
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    tokens = await answered(system, [*parts, QUESTION], dvd={"combine_images": True})
    assert tokens == expected(system, block(num_tiles) + QUESTION["text"], images)
