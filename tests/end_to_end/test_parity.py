"""The last proof: the programs give, token for token, what the undivided transformers model gives in FP32."""

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
from openai import AsyncOpenAI
from PIL import Image

from tests.checkpoints import VISION_6B, VISION_300M, make_checkpoint
from tests.end_to_end.conftest import data_url, serve, user
from tests.reference import Turn, greedy

NUM_TOKENS = 12


@dataclass(frozen=True)
class System:
    """One checkpoint served as its parts, and the same checkpoint in one piece."""

    address: str
    model: object
    tokenizer: object
    system_message: str | None

    def expected(self, turns: list[Turn]) -> list[int]:
        return greedy(self.model, self.tokenizer, turns, NUM_TOKENS, self.system_message)

    async def answered(self, turns: list[Turn]) -> list[int]:
        async with AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=100, max_retries=0) as client:
            reply = await client.chat.completions.create(
                model="parity",
                messages=[message(turn) for turn in turns],
                max_completion_tokens=NUM_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True, "skip_special_tokens": False},
            )
        return reply.choices[0].model_extra["token_ids"]


def message(turn: Turn) -> dict:
    if turn.role == "assistant":
        return {"role": "assistant", "content": turn.text}
    return user(turn.text, *(data_url(image) for image in turn.images))


# Odd head counts, both ViT styles, all three layouts on disk, both transports; seeds whose replies are not monotonous.
CASES = {
    "github 300M qwen3 zmq": ("github", VISION_300M, "qwen3", {"transports": ["zmq"]}, 1, 7),
    "hf 6B qwen2 grpc sharded": ("hf", VISION_6B, "qwen2", {"transports": ["grpc"]}, 3, 11),
    "legacy 300M moe zmq sharded": ("hf_legacy", VISION_300M, "qwen3_moe", {"transports": ["zmq"]}, 2, 7),
    "hf 6B qwen2 colocated": ("hf", VISION_6B, "qwen2", {"colocated": True}, 1, 11),
}


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def system(request, tmp_path_factory):
    layout, vision, text, options, shards, seed = request.param
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoint = make_checkpoint(path, layout=layout, vision=vision, text=text, shards=shards, seed=seed)
    default = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
    with serve(str(path), served_model_name=["parity"], dtype="float32", **options) as deployment:
        yield System(
            deployment.address, checkpoint.reference(), checkpoint.tokenizer, default if layout == "github" else None
        )


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Smooth random colours: no two images alike, none hard for the resizer."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


TEXT_ONLY = [Turn("user", "Tell me something about the sea.")]
ONE_TILE = [Turn("user", "What is this?", [noise(448, 448, 1)])]
MANY_TILES = [Turn("user", "Describe it.", [noise(900, 620, 2)])]
TWO_IMAGES = [Turn("user", "Which one is brighter?", [noise(300, 420, 3), noise(500, 500, 4)])]
THREE_TURNS = [
    Turn("user", "What is this?", [noise(448, 300, 5)]),
    Turn("assistant", "A picture."),
    Turn("user", "And this one?", [noise(448, 448, 6)]),
    Turn("assistant", "Another picture."),
    Turn("user", "Do they differ?"),
]
REQUESTS = {
    "text only": TEXT_ONLY,
    "one tile": ONE_TILE,
    "many tiles with thumbnail": MANY_TILES,
    "two images": TWO_IMAGES,
    "three turns": THREE_TURNS,
}


@pytest.mark.parametrize("turns", REQUESTS.values(), ids=REQUESTS)
async def test_one_request(system, turns):
    expected = system.expected(turns)
    assert len(set(expected)) > 2, "a degenerate reference proves nothing"
    assert await system.answered(turns) == expected


async def test_sixteen_requests_at_once(system):
    """Different lengths and images side by side: batches of strangers must not touch each other."""
    kinds = [
        lambda seed: [Turn("user", f"Tell me something about number {seed}.")],
        lambda seed: [Turn("user", f"What is {seed}?", [noise(448, 448, seed)])],
        lambda seed: [Turn("user", "Compare.", [noise(200, 448, seed), noise(448, 200, seed + 50)])],
        lambda seed: [Turn("user", "Look.", [noise(700, 350, seed)]), Turn("assistant", "Yes."), Turn("user", "And?")],
    ]
    requests = [kinds[index % 4](100 + index) for index in range(16)]
    answers = await asyncio.gather(*(system.answered(turns) for turns in requests))
    assert answers == [system.expected(turns) for turns in requests]
