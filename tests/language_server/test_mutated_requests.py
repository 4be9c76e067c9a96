"""Whatever a router sends: an answer or a status of ours, and nothing of it stays. Never the engine's end.

The seed decides what is sent; ``FUZZ_SECONDS`` (``make fuzz``) how much of it.
"""

import asyncio
import os
import random

import grpc
import pytest

from common.service.errors import InternalError, from_grpc, was_raised_by_us
from protos.language_pb2 import (
    Choices,
    Continuation,
    DetokenizeRequest,
    GenerateRequest,
    Grammar,
    RawPrompt,
    TokenIds,
    TokenizeRequest,
)
from tests.fuzz.messages import mutated
from tests.language_server.conftest import make_request, reference_tokens
from tests.language_server.messages import message

SEED = 7
NUM_CALLS = 10 * int(os.environ.get("FUZZ_SECONDS", "60"))
TURNS = [message("system", "be brief"), message("user", 0, "and ", [(1, 0, 1)], "what?"), message("assistant", "x")]
PATIENCE = 30


def generate_requests(images) -> list[GenerateRequest]:
    """Good ones."""
    grammars = (Grammar(regex="a+"), Grammar(choice=Choices(texts=["a", "b"])), Grammar(json_object=True))
    return [
        make_request("hello", max_tokens=2),
        make_request("hello", max_tokens=2, n=2, stop=["x"], logprobs=True, top_logprobs=2, logit_bias={5: 1.0}),
        make_request([*TURNS, message("user", "why?")], images[:2], max_tokens=2, temperature=1.0, seed=3, top_k=5),
        make_request("go on", continuations=[Continuation(output_token_ids=[3, 4])], max_tokens=4),
        GenerateRequest(
            request_id=bytes(16), raw=RawPrompt(token_ids=TokenIds(ids=[1, 2, 3])), sampling={"max_tokens": 2, "n": 1}
        ),
        *(make_request("hello", max_tokens=2, grammar=grammar) for grammar in grammars),
    ]


def must_be_ours(error: grpc.aio.AioRpcError, request) -> None:
    assert was_raised_by_us(error), (error, request)
    assert not isinstance(from_grpc(error), InternalError), (error, request)
    assert len(error.details() or "") <= 512


async def some_of(call) -> None:
    """The first events of a call, which is cancelled then: what was asked for may be long, or wait for images."""
    try:
        async with asyncio.timeout(0.05):
            for _ in range(3):
                if await call.read() is grpc.aio.EOF:
                    return
    except TimeoutError:
        pass
    finally:
        call.cancel()


@pytest.mark.timeout(600)
async def test_generate(system, checkpoint, images):
    rng, good = random.Random(SEED), generate_requests(images)
    refused = 0
    for number in range(NUM_CALLS):
        request = mutated(rng.choice(good), rng)
        if len(request.request_id) == 16 and rng.random() < 0.9:
            request.request_id = number.to_bytes(16, "big")
        try:
            async with asyncio.timeout(PATIENCE):
                await some_of(system.open(request, timeout=None))
        except grpc.aio.AioRpcError as error:
            must_be_ours(error, request)
            refused += 1
    assert NUM_CALLS / 10 < refused < NUM_CALLS
    await system.at_rest()
    prompt = [message("user", "how many shapes are there?")]
    reply = await system.generate(make_request("how many shapes are there?"))
    assert reply.ids() == reference_tokens(checkpoint, prompt)


@pytest.mark.timeout(600)
async def test_tokenize_and_detokenize(system):
    rng = random.Random(SEED)
    good = [
        TokenizeRequest(raw=RawPrompt(text="hello"), return_token_strs=True),
        TokenizeRequest(messages=TURNS, num_tiles=[1, 2], thinking=True),
        DetokenizeRequest(token_ids=[1, 2, 3]),
    ]
    for _ in range(NUM_CALLS):
        request = mutated(rng.choice(good), rng)
        call = system.stub.Detokenize if isinstance(request, DetokenizeRequest) else system.stub.Tokenize
        try:
            await call(request, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            must_be_ours(error, request)
