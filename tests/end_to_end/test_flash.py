"""A Flash checkpoint divided over programs gives, token for token, what the published code gives in one piece in FP32.

Nobody else serves this divided: the vision servers decide how long the prompt is.
"""

import asyncio
import urllib.request
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI
from PIL import Image

from deploy.local import LocalDeployment
from tests import reference
from tests.checkpoints import VISION_300M, RandomCheckpoint, make_checkpoint
from tests.end_to_end.conftest import serve
from tests.end_to_end.test_parity import message, noise
from tests.reference import Turn

NUM_TOKENS = 10
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    image_tokens: int
    saved_tokens: int


@dataclass(frozen=True)
class System:
    deployment: LocalDeployment
    checkpoint: RandomCheckpoint

    async def answer(self, turns: list[Turn], **dvd: Any) -> Answer:
        address = f"{self.deployment.address}/v1"
        async with AsyncOpenAI(base_url=address, api_key="none", timeout=100, max_retries=0) as client:
            reply = await client.chat.completions.create(
                model="flash",
                messages=[message(turn) for turn in turns],
                max_completion_tokens=NUM_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True, "skip_special_tokens": False, "dvd": dvd},
            )
        details = reply.usage.prompt_tokens_details.model_extra
        image_tokens = details["multimodal_tokens"]["image"]
        return Answer(reply.choices[0].model_extra["token_ids"], image_tokens, details["saved_tokens"])

    def expected(self, turns: list[Turn], scope: str = "request") -> Answer:
        """The published code: one call over all tiles, or over those of each image."""
        images = [image for turn in turns for image in turn.images]
        calls = [images] if scope == "request" else [[image] for image in images]
        features = [tile for call in calls for tile in self._routed(call)]
        full = 256 * len(features)
        ids = self.checkpoint.tokenizer(_prompt(turns, features), add_special_tokens=False)["input_ids"]
        token_ids = self._greedy(torch.tensor([ids]), torch.cat(features))
        num_tokens = sum(len(tile) for tile in features)
        return Answer(token_ids, num_tokens, full - num_tokens)

    def _routed(self, images: list[Image.Image]) -> list[torch.Tensor]:
        assert self.checkpoint.flash is not None
        model = self.checkpoint.reference().model
        with torch.no_grad():
            patches = model.vision_tower(reference.pixel_values(images)).last_hidden_state[:, 1:]
            return self.checkpoint.flash.route(patches, model.multi_modal_projector).features

    def _greedy(self, ids: torch.Tensor, features: torch.Tensor) -> list[int]:
        model, tokenizer = self.checkpoint.reference(), self.checkpoint.tokenizer
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids)
            embeds[ids == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")] = features
            chosen: list[int] = []
            while len(chosen) < NUM_TOKENS and tokenizer.eos_token_id not in chosen:
                hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
                chosen.append(int(model.lm_head(hidden[:, -1]).argmax()))
                embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[chosen[-1]]]))], dim=1)
        return chosen


def _prompt(turns: list[Turn], features: list[torch.Tensor]) -> str:
    """Placeholders as they are after deletion: those of a compressed tile are 64, in one run with its neighbours'."""
    counts = [len(reference.tiles(image)) for turn in turns for image in turn.images]
    ends = list(accumulate(counts, initial=0))
    rows = iter([sum(len(tile) for tile in features[start:stop]) for start, stop in pairwise(ends)])
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for turn in turns:
        blocks = "".join(f"<img>{'<IMG_CONTEXT>' * next(rows)}</img>\n" for _ in turn.images)
        text += f"<|im_start|>{turn.role}\n{blocks}{turn.text}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    path = tmp_path_factory.mktemp("flash")
    checkpoint = make_checkpoint(path, layout="github", vision=VISION_300M, seed=7, flash=True)
    with serve(str(path), served_model_name=["flash"], dtype="float32", vision_servers=2) as deployment:
        yield System(deployment, checkpoint)


MANY_TILES = [Turn("user", "Describe it.", [noise(900, 620, 2)])]
TWO_IMAGES = [Turn("user", "Which one is brighter?", [noise(900, 900, 3), noise(500, 500, 4)])]
TWO_TURNS = [
    Turn("user", "What is this?", [noise(900, 448, 5)]),
    Turn("assistant", "A picture."),
    Turn("user", "And this one?", [noise(448, 900, 6)]),
]
REQUESTS = {
    "one tile": [Turn("user", "What is this?", [noise(448, 448, 1)])],
    "many tiles": MANY_TILES,
    "two images": TWO_IMAGES,
    "two turns": TWO_TURNS,
}


@pytest.mark.parametrize("turns", REQUESTS.values(), ids=REQUESTS)
async def test_scope_request_is_the_published_code(system, turns):
    expected = system.expected(turns)
    assert len(set(expected.token_ids)) > 2, "a degenerate reference proves nothing"
    assert await system.answer(turns) == expected


async def test_scope_image(system):
    expected = system.expected(TWO_IMAGES, "image")
    assert expected != system.expected(TWO_IMAGES), "both scopes would be the same here"
    assert await system.answer(TWO_IMAGES, vir={"scope": "image"}) == expected


async def test_a_second_turn_routes_the_first_image_anew(system):
    """As in the published code, where the quantile spans all images of all turns; and a third time, from caches."""
    first = TWO_TURNS[:1]
    assert await system.answer(first) == system.expected(first)
    for _ in range(2):
        assert await system.answer(TWO_TURNS) == system.expected(TWO_TURNS)


@pytest.mark.parametrize(("mode", "per_tile"), [("off", 256), ("force64", 64)])
async def test_a_request_may_decide_otherwise(system, mode, per_tile):
    answer = await system.answer(MANY_TILES, vir={"mode": mode})
    num_tiles = len(reference.tiles(MANY_TILES[0].images[0]))
    assert (answer.image_tokens, answer.saved_tokens) == (per_tile * num_tiles, (256 - per_tile) * num_tiles)


async def test_strangers_at_the_same_time_do_not_change_each_others_routes(system):
    requests = [[replace(turn, text=f"{turn.text} {number}") for turn in TWO_IMAGES] for number in range(4)]
    requests += [[Turn("user", f"{number}?", [noise(900, 450 + 10 * number, number)])] for number in range(4)]
    answers = await asyncio.gather(*map(system.answer, requests))
    assert answers == [system.expected(turns) for turns in requests]


async def test_saved_tokens_are_counted(system):
    before = _saved(system)
    answer = await system.answer([Turn("user", "And this?", [noise(910, 620, 77)])])
    assert answer.saved_tokens > 0
    assert _saved(system) - before == answer.saved_tokens


def _saved(system: System) -> float:
    with urllib.request.urlopen(f"{system.deployment.address}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith("dvd_saved_prompt_tokens_total")]
    return float(line.rpartition(" ")[2])
