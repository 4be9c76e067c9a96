"""The official ``openai`` package does its normal job: streaming and not, sync and async."""

import openai
import pytest
from openai import AsyncOpenAI

from tests.end_to_end.conftest import data_url, sample_of, user

SAMPLE = sample_of("number", 1)
REQUEST = {"model": "nano", "messages": [user(SAMPLE.question, data_url(SAMPLE.images[0]))], "temperature": 0}


def test_plain(client):
    reply = client.chat.completions.create(**REQUEST)
    assert reply.choices[0].message.content == SAMPLE.answer
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.model_extra["multimodal_tokens"]["image"] == 256


def test_stream_gives_one_token_an_event_and_the_same_text(client):
    stream = client.chat.completions.create(**REQUEST, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    content = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.finish_reason is None]
    assert "".join(content) == SAMPLE.answer
    usage = chunks[-1].usage
    # The role chunk carries no token; the end-of-turn token ends the reply without an event of its own.
    assert usage.completion_tokens - 1 <= len(content) - 1 <= usage.completion_tokens
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"


async def test_async_both_ways(nano):
    async with AsyncOpenAI(base_url=f"{nano.address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        reply = await client.chat.completions.create(**REQUEST)
        stream = await client.chat.completions.create(**REQUEST, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        models = [model.id async for model in await client.models.list()]
    assert reply.choices[0].message.content == text == SAMPLE.answer
    assert models == ["nano"]


def test_logprobs_and_several_choices(client):
    reply = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "hello"}], n=3, temperature=1, seed=5, logprobs=True,
        top_logprobs=2, max_tokens=4,
    )  # fmt: skip
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for token in reply.choices[0].logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
    again = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "hello"}], n=3, temperature=1, seed=5, max_tokens=4
    )
    assert [c.message.content for c in again.choices] == [c.message.content for c in reply.choices]


def test_errors_arrive_as_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-17", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "hi"}], temperature=9)
    assert wrong.value.param == "temperature"
