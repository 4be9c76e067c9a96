"""A reply that was cut anywhere goes on elsewhere as if nothing had happened: event for event, whatever it is made of.

Each reply here is cut behind each of its events in turn, as if the server had been lost there, and asked for again with
what a router would know by then.
"""

import asyncio
import json
from typing import Any

import pytest

from protos.language_pb2 import Continuation, Finished, Grammar, Token
from tests.language_server.conftest import make_request
from tests.language_server.messages import message

POINT = {
    "type": "object",
    "properties": {"name": {"enum": ["círculo", "四角"]}, "x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "x"],
    "additionalProperties": False,
}
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5}
REPLIES: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 16, "ignore_eos": True},
    "drawn": {"max_tokens": 16, "ignore_eos": True, "top_p": 0.9, **DRAWN},
    "drawn among few": {"max_tokens": 12, "ignore_eos": True, "top_k": 20, "min_p": 0.01, **DRAWN},
    "choices": {"max_tokens": 8, "n": 3, "ignore_eos": True, **DRAWN},
    "choices of many lengths": {"n": 3, "max_tokens": 60, "grammar": Grammar(regex="[a-f]{1,9}"), **DRAWN},
    "penalties": {
        "max_tokens": 16, "repetition_penalty": 1.3, "presence_penalty": 1.5, "frequency_penalty": 1.5, "min_tokens": 9,
    },
    "bias": {"max_tokens": 8, "logit_bias": {70: 50.0, 77: 50.0}, "frequency_penalty": 2.0},
    "logprobs": {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, **DRAWN},
    "schema": {"max_tokens": 60, "grammar": Grammar(json_schema=json.dumps(POINT)), "frequency_penalty": 2.0},
    "regex": {"max_tokens": 60, "grammar": Grammar(regex=r"[a-f]{4}-\d{2}")},
    "characters of several tokens": {"max_tokens": 60, "grammar": Grammar(regex="[好你世界😀]{4}"), **DRAWN},
    "half a character at the end": {"max_tokens": 8, "grammar": Grammar(regex="[好你世界😀]{9}"), **DRAWN},
    "thoughts": {
        "max_tokens": 60, "separate_reasoning": True, **DRAWN,
        "grammar": Grammar(regex=r"<think>\n[a-f好]{3} [a-f]{2}\n</think>\n\n[0-9]{3}"),
    },
    "whole thoughts": {
        "max_tokens": 60, "separate_reasoning": False, **DRAWN, "grammar": Grammar(regex="<think>\n[a-f]{3}</think>"),
    },
    "thoughts that do not end": {
        "max_tokens": 12, "separate_reasoning": True, **DRAWN, "grammar": Grammar(regex="<think>\n[a-f]{30}</think>"),
    },
    "special tokens": {"max_tokens": 30, "skip_special_tokens": False, "grammar": Grammar(regex="[a-f]+"), **DRAWN},
    "an end that is ignored": {"max_tokens": 30, "ignore_eos": True, "grammar": Grammar(regex="[a-f]{3,4}"), **DRAWN},
}  # fmt: skip
STOPS = {
    "a stop string of several tokens": ("0123456789", ["456", "xx"]),
    "what only begins like a stop string": ("01230124", ["0124", "24x"]),
    "a stop string that never comes": ("0012", ["013", "2x"]),
    "a stop string of half characters": ("好界你好", ["你好"]),
}


async def events_of(system, request):
    """What is said after Admitted."""
    events = []
    async for event in system.stub.Generate(request, timeout=60):
        events.append(event)
    assert events[0].HasField("admitted")
    return [event.token if event.HasField("token") else event.finished for event in events[1:]]


def told(events, num_choices):
    """What a router tells of a reply of which it has relayed ``events``."""
    continuations = [Continuation(choice=choice) for choice in range(num_choices)]
    for event in events:
        if isinstance(event, Token):
            continuations[event.choice].output_token_ids.append(event.token_id)
        else:
            continuations[event.choice].is_finished = True
    return continuations


def facts(events, choice):
    """All that a client can see of one choice, exact values of logprobs apart."""
    return [_facts(event) for event in events if event.choice == choice]


def _facts(event):
    if isinstance(event, Finished):
        usage = event.usage
        counts = (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens, usage.image_tokens)
        assert usage.cached_tokens <= usage.prompt_tokens
        return event.finish_reason, event.reasoning, event.text, counts
    top = [(each.token_id, pytest.approx(each.logprob, abs=1e-3)) for each in event.top_logprobs]
    logprob = pytest.approx(event.logprob.logprob, abs=1e-3)
    return event.token_id, event.reasoning, event.text, event.logprob.text, logprob, top


async def check_every_cut(system, messages, images=(), **sampling):
    """Returns the undisturbed events."""
    num_choices = sampling.get("n", 1)
    whole = await events_of(system, make_request(messages, images, **sampling))
    assert sum(isinstance(event, Finished) for event in whole) == num_choices

    async def check(cut):
        continuations = told(whole[:cut], num_choices)
        rest = await events_of(system, make_request(messages, images, continuations=continuations, **sampling))
        for choice in range(num_choices):
            assert facts(rest, choice) == facts(whole[cut:], choice), f"cut behind event {cut}"

    await asyncio.gather(*(check(cut) for cut in range(len(whole))))
    return whole


@pytest.mark.parametrize("kind", REPLIES)
async def test_the_rest_is_what_the_undisturbed_server_says(system, kind):
    await check_every_cut(system, "describe the image", **REPLIES[kind])


@pytest.mark.parametrize("kind", STOPS)
async def test_stop_strings_are_found_across_a_cut(system, kind):
    said, stop = STOPS[kind]
    whole = await check_every_cut(system, "describe", grammar=Grammar(regex=said), stop=stop, max_tokens=60)
    text = "".join(event.text for event in whole)
    assert text == said[: min((said.index(each) for each in stop if each in said), default=len(said))]


async def test_images_are_found_again_or_brought_again(start_system, images):
    messages = [message("user", 0, "what is ", 1, "?")]
    async with start_system() as system:
        await system.generate(make_request(messages, images[:2]), images)  # from here on they are resident
        whole = await check_every_cut(system, messages, images[:2], max_tokens=8, ignore_eos=True, **DRAWN)
        await system.at_rest()
    ids = [event.token_id for event in whole if isinstance(event, Token)]
    async with start_system() as other:
        request = make_request(messages, images[:2], output_token_ids=ids[:3], max_tokens=8, ignore_eos=True, **DRAWN)
        reply = await other.generate(request, images)
        assert len(reply.admitted.missing) == 2
        assert reply.ids() == ids[3:]
        await other.at_rest()


async def test_a_long_reply_is_replayed_beside_others(start_system):
    """Beyond a thousand tokens in a thread; the engine finds prompt and output among its blocks."""
    long = {"max_tokens": 1500, "ignore_eos": True, **DRAWN}
    async with start_system() as system:
        whole = await system.generate(make_request("describe", **long))
        rest = await system.generate(make_request("describe", output_token_ids=whole.ids()[:1490], **long))
        assert rest.ids() == whole.ids()[1490:]
        usage = rest.finished[0].usage
        assert usage.completion_tokens == 1500
        assert usage.cached_tokens <= usage.prompt_tokens
        assert system.server.engine.stats.num_prefix_hits > 1000


async def test_what_is_said_again_is_not_counted_again(start_system, monkeypatch):
    counted = []
    monkeypatch.setattr("common.service.metrics.LANGUAGE_GENERATION_TOKENS.inc", counted.append)
    async with start_system() as system:
        whole = await system.generate(make_request("describe", max_tokens=9, ignore_eos=True))
        request = make_request("describe", max_tokens=9, ignore_eos=True, output_token_ids=whole.ids()[:5])
        await system.generate(request)
        await system.at_rest()
    assert counted == [9, 4]
