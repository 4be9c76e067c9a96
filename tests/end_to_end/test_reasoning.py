"""Thoughts and answer apart, through the whole system. Nano was never taught to think: a grammar has it begin with a
thought, which is legal without thinking mode, and thinking mode itself shows in the prompt."""

import re
from typing import Any

import openai
import pytest

from language_server.prompt import THINKING_MESSAGE
from tests.end_to_end.conftest import data_url, sample_of, user

SAMPLE = sample_of("number", 1)
QUESTION = user(SAMPLE.question, data_url(SAMPLE.images[0]))
WRONG = f"The number is {(int(SAMPLE.short_answer) + 1111) % 10000}."
THOUGHT = "it has four digits"
REGEX = f"<think>\\n{THOUGHT}\\n</think>\\n\\n({re.escape(WRONG)}|{re.escape(SAMPLE.answer)})"
THINKS = {"structured_outputs": {"regex": REGEX}}


def ask(client, *messages, stream=False, **body) -> Any:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return client.chat.completions.create(
        model="nano", messages=messages or [QUESTION], temperature=0, max_tokens=200, **options, extra_body=body
    )


def test_thoughts_have_their_own_place(client):
    reply = ask(client, **THINKS, logprobs=True)
    message, usage = reply.choices[0].message, reply.usage
    assert (message.content, message.reasoning_content, message.reasoning) == (SAMPLE.answer, THOUGHT, THOUGHT)
    spelled = "".join(token.token for token in reply.choices[0].logprobs.content)
    assert (
        spelled.removesuffix("<|im_end|>") == f"<think>\n{THOUGHT}\n</think>\n\n{SAMPLE.answer}"
    )  # one for each token
    assert 10 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_a_stream_brings_the_same_a_token_an_event(client):
    chunks = list(ask(client, **THINKS, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.finish_reason is None]
    thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(thought or "" for thought in thoughts) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == SAMPLE.answer
    assert not any(delta.content for delta in deltas[: 1 + max(i for i, thought in enumerate(thoughts) if thought)])
    # The role chunk carries no token; the end-of-turn token may end the reply without an event of its own.
    usage = chunks[-1].usage
    assert usage.completion_tokens - 1 <= len(deltas) - 1 <= usage.completion_tokens
    assert 10 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_undivided_where_the_client_says_so(client):
    message = ask(client, **THINKS, separate_reasoning=False).choices[0].message
    assert message.content == f"<think>\n{THOUGHT}\n</think>\n\n{SAMPLE.answer}"
    assert message.reasoning_content is None


def test_thinking_mode_is_the_system_message_it_stands_for(client):
    by_hand = ask(client, {"role": "system", "content": THINKING_MESSAGE}, QUESTION).usage
    asked = ask(client, chat_template_kwargs={"enable_thinking": True}).usage
    assert asked.prompt_tokens == by_hand.prompt_tokens
    assert asked.prompt_tokens_details.cached_tokens > by_hand.prompt_tokens - 32  # token by token, all but a block
    plain = ask(client, chat_template_kwargs={"enable_thinking": False})
    assert plain.usage.prompt_tokens < asked.prompt_tokens - 100
    assert plain.choices[0].message.content == SAMPLE.answer


def test_a_form_leaves_no_room_for_thoughts(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **THINKS, chat_template_kwargs={"enable_thinking": True})
    assert caught.value.param == "chat_template_kwargs.enable_thinking"
