"""One large image on two vision servers gives, token for token, what the undivided transformers model gives in FP32."""

import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from deploy.local import LocalDeployment
from tests.checkpoints import RandomCheckpoint, make_checkpoint
from tests.end_to_end.conftest import data_url, openai_client, scrape, serve, user
from tests.end_to_end.test_parity import noise
from tests.reference import Turn, greedy

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> RandomCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="hf", text="qwen2", seed=11)


@pytest.fixture(scope="module")
def system(checkpoint) -> Iterator[LocalDeployment]:
    with serve(str(checkpoint.path), served_model_name=["parity"], dtype="float32", vision_servers=2) as deployment:
        yield deployment


def picture(seed: int) -> Turn:
    """Four by three tiles and a thumbnail."""
    return Turn("user", "Describe it.", [noise(1200, 900, seed)])


def expected(checkpoint: RandomCheckpoint, turn: Turn) -> list[int]:
    return greedy(checkpoint.reference(), checkpoint.tokenizer, [turn], NUM_TOKENS, None)


def answered(client: OpenAI, turn: Turn) -> list[int]:
    reply = client.chat.completions.create(
        model="parity",
        messages=[user(turn.text, *(data_url(image) for image in turn.images))],
        max_completion_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "skip_special_tokens": False},
    )
    extra = reply.choices[0].model_extra
    assert extra is not None
    return extra["token_ids"]


def num_encoded(system: LocalDeployment, server: str) -> float:
    """Calls that ended well."""
    return scrape(system.address).get(f"dvd_dispatch_total{{outcome=ok,server={server},tier=vision}}", 0)


def until_idle(system: LocalDeployment) -> None:
    """Until both servers have said that they have nothing to do."""
    ends_at = time.monotonic() + 20
    while time.monotonic() < ends_at:
        servers = httpx.get(f"{system.address}/pipeline").json()["servers"]
        if not any(
            server["queued_tiles"] + server["running_tiles"] for server in servers if server["tier"] == "vision"
        ):
            return
        time.sleep(0.05)
    raise AssertionError("the vision servers have work")


def test_an_image_divided_between_two_servers_reads_the_same(system, checkpoint):
    with openai_client(system) as client:
        assert answered(client, picture(5)) == expected(checkpoint, picture(5))
    assert [num_encoded(system, server) for server in ("vision-0", "vision-1")] == [1, 1]


def test_the_part_of_a_server_that_hangs_is_encoded_by_the_other(system, checkpoint):
    before = num_encoded(system, "vision-0")
    until_idle(system)  # or the image would not be divided
    (victim,) = [process for process in system.processes if process.name == "vision-1"]
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        with openai_client(system) as client:
            assert answered(client, picture(6)) == expected(checkpoint, picture(6))
        assert num_encoded(system, "vision-0") == before + 2
    finally:
        os.kill(victim.pid, signal.SIGCONT)
