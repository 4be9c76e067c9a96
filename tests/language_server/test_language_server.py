"""The server as its neighbours meet it: over gRPC, with features from real senders, against the undivided model."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import threading
import time
from typing import Any

import grpc
import pytest

from common.service import metrics, rpc
from common.service.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, from_grpc
from language_server import generation
from language_server.__main__ import main, run
from language_server.engine import LanguageEngine
from language_server.generation import Generation
from language_server.grammar import GrammarCompiler
from language_server.prompt import THINKING_MESSAGE
from language_server.settings import LanguageSettings
from protos.frame import FrameRejected
from protos.language_pb2 import Choices, Continuation, Grammar, ImageRef
from protos.language_pb2_grpc import LanguageStub
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, WatchStatusRequest
from tests.checkpoints import make_checkpoint
from tests.language_server.conftest import (
    eventually,
    make_request,
    reference_tokens,
    running_system,
)
from tests.language_server.messages import message

TURNS = [
    message("user", 0, "what number is written in the picture?"),
    message("assistant", "the number is 1234"),
    message("user", "first ", 1, "and second ", 2, "describe the difference"),
    message("assistant", "there are three triangles"),
    message("user", "how many shapes are there?"),
]
ENDLESS = {"max_tokens": 10000, "ignore_eos": True}


async def failure(awaitable):
    """The error a router would see."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return from_grpc(caught.value)


async def rest_of(call):
    """The events that a call still has."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


# --- parity


async def test_text_equals_the_undivided_model(system, checkpoint):
    for text in ("how many shapes are there?", "你好，请描述这张图片。", "def main() -> None: return {}"):
        reply = await system.generate(make_request(text))
        expected = reference_tokens(checkpoint, [message("user", text)])
        assert reply.ids() == expected
        assert reply.text() == checkpoint.tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.finished[0].usage.completion_tokens == len(expected)
        assert not reply.admitted.missing


@pytest.mark.parametrize("transport", ["shm", "tcp", "zmq", "grpc"])
async def test_images_equal_the_undivided_model(start_system, checkpoint, images, transport):
    async with start_system(transports=(transport,)) as system:
        request = make_request([message("user", 0, 1, "describe the difference")], images[:2])
        reply = await system.generate(request, images)
        assert {endpoint.transport for endpoint in reply.admitted.deliver_to} == {transport}
        assert reply.ids() == reference_tokens(checkpoint, request.messages, images[:2])
        usage = reply.finished[0].usage
        assert usage.image_tokens == 3 * 256
        assert usage.prompt_tokens == reply.admitted.num_prompt_tokens
        await system.at_rest()


async def test_three_turns_with_three_images(system, checkpoint, images):
    request = make_request(TURNS, images)
    reply = await system.generate(request, images)
    assert reply.ids() == reference_tokens(checkpoint, TURNS, images)
    again = make_request(TURNS, images)
    reply = await system.generate(again)
    assert not reply.admitted.missing  # features are still here
    assert reply.finished[0].usage.cached_tokens > 256  # and so is their KV
    assert reply.ids() == reference_tokens(checkpoint, TURNS, images)


async def test_github_format_starts_with_its_system_message(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", layout="github", github_config={"system_message": "be brief"})
    async with running_system(checkpoint, tmp_path) as system:
        reply = await system.generate(make_request("how many shapes are there?"))
        messages = [message("system", "be brief"), message("user", "how many shapes are there?")]
        assert reply.ids() == reference_tokens(checkpoint, messages)


async def test_32_requests_at_once_are_not_mixed_up(start_system, checkpoint, images):
    async with start_system(max_num_seqs=8, feature_bytes=4 * 256 * 1024) as system:
        requests = [
            (make_request([message("user", 0, f"describe {index}")], [image]), [image])
            if index % 2
            else (make_request(f"what number is {index}?"), [])
            for index, image in enumerate((*images, images[0]) * 8)
        ]
        replies = await asyncio.gather(*(system.generate(request, own) for request, own in requests))
        for (request, own), reply in zip(requests, replies, strict=True):
            assert reply.ids() == reference_tokens(checkpoint, request.messages, own)
        await system.at_rest()


# --- what a request may ask for


async def test_stop_strings_end_the_text(system, checkpoint):
    whole = (await system.generate(make_request("describe the image", max_tokens=40))).text()
    stop = whole[10:13]
    reply = await system.generate(make_request("describe the image", max_tokens=40, stop=[stop, "never"]))
    assert reply.text() == whole[: whole.index(stop)]
    assert reply.finished[0].finish_reason == "stop"
    assert reply.finished[0].usage.completion_tokens == len(reply.ids()) < 40


async def test_stop_token_ids_end_the_text(system):
    ids = (await system.generate(make_request("describe", ignore_eos=True))).ids()
    reply = await system.generate(make_request("describe", ignore_eos=True, stop_token_ids=[ids[5]]))
    assert reply.ids() == ids[: ids.index(ids[5]) + 1]
    assert reply.finished[0].finish_reason == "stop"


async def test_choices_of_one_request(system):
    sampled = {"temperature": 1.5, "seed": 7, "ignore_eos": True}
    reply = await system.generate(make_request("describe the image", n=2, **sampled))
    assert reply.ids(0) != reply.ids(1)
    assert {finished.finish_reason for finished in reply.finished.values()} == {"length"}
    alone = await system.generate(make_request("describe the image", **sampled))
    assert alone.ids() == reply.ids(0)


async def test_logprobs(system):
    reply = await system.generate(make_request("describe", logprobs=True, top_logprobs=3))
    for token in reply.tokens:
        assert token.logprob.token_id == token.token_id
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob.logprob)  # greedy
        assert token.logprob.token_bytes.decode("utf-8", "replace") == token.logprob.text
    plain = await system.generate(make_request("describe"))
    assert not plain.tokens[0].HasField("logprob")


async def test_a_lost_servers_reply_is_continued(system):
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    whole = await system.generate(make_request("describe the image", **options))
    for cut in (1, 7, 19):
        rest = await system.generate(make_request("describe the image", output_token_ids=whole.ids()[:cut], **options))
        assert rest.ids() == whole.ids()[cut:]
        assert [t.text for t in rest.tokens] == [t.text for t in whole.tokens[cut:]]
        assert rest.finished[0].usage.completion_tokens == 20


async def test_a_reply_that_was_already_whole_only_ends(system, checkpoint):
    whole = await system.generate(make_request("describe the image", max_tokens=5))
    rest = await system.generate(make_request("describe the image", max_tokens=5, output_token_ids=whole.ids()))
    assert (rest.ids(), rest.finished[0].finish_reason) == ([], whole.finished[0].finish_reason)
    stopped = make_request("describe", output_token_ids=[4, checkpoint.tokenizer.eos_token_id])
    assert (await system.generate(stopped)).finished[0].finish_reason == "stop"


async def test_max_tokens_is_what_the_context_holds(start_system):
    async with start_system(max_model_len=64) as system:
        reply = await system.generate(make_request("describe", max_tokens=0, ignore_eos=True))
        usage = reply.finished[0].usage
        assert usage.prompt_tokens + usage.completion_tokens == 64
        error = await failure(system.generate(make_request("describe " * 64)))
        assert (type(error), error.code) == (InvalidRequest, "context_length_exceeded")
        await system.at_rest()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda request: setattr(request, "request_id", b"short"), "request_id"),
        (lambda request: setattr(request.sampling, "n", 0), "n"),
        (lambda request: setattr(request.sampling, "n", 1000), "n"),
        (lambda request: setattr(request.sampling, "temperature", float("nan")), "temperature"),
        (lambda request: setattr(request.sampling, "top_p", 0.0), "top_p"),
        (lambda request: setattr(request.sampling, "repetition_penalty", float("inf")), "repetition_penalty"),
        (lambda request: setattr(request.sampling, "top_k", -1), "top_k"),
        (lambda request: setattr(request.sampling, "top_logprobs", 21), "top_logprobs"),
        (lambda request: request.sampling.stop.append(""), "stop"),
        (lambda request: request.sampling.logit_bias.update({1: float("nan")}), "logit_bias"),
        (lambda request: request.sampling.stop_token_ids.append(512), "stop_token_ids"),
        (lambda request: request.sampling.logit_bias.update({10**6: 1.0}), "logit_bias"),
        (lambda request: request.continuations.add(output_token_ids=[512]), "continuations[0]"),
        (lambda request: request.continuations.add(output_token_ids=[4] * 13), "continuations[0]"),
        (lambda request: request.continuations.add(choice=1), "continuations[0]"),
        (lambda request: request.continuations.extend([Continuation(), Continuation()]), "continuations[1]"),
        (lambda request: request.continuations.add(is_finished=True), "continuations"),
        (lambda request: request.images.append(ImageRef(mm_hash=bytes(32), max_num_tokens=256)), "messages"),
        (lambda request: setattr(request.messages[0], "role", "robot"), "messages[0].role"),
        (lambda request: request.ClearField("messages"), "messages"),
        (lambda request: request.sampling.grammar.CopyFrom(Grammar(regex="(", param="here")), "here"),
        (lambda request: request.sampling.grammar.CopyFrom(Grammar(regex="a" * 2**17, param="here")), "here"),
        (lambda request: request.sampling.grammar.CopyFrom(Grammar(json_schema='{"not": {}}', param="here")), "here"),
        (lambda request: request.sampling.grammar.CopyFrom(Grammar(param="here")), "here"),
    ],
)
async def test_what_cannot_be_served_is_refused(system, change, param):
    request = make_request("describe")
    change(request)
    error = await failure(system.generate(request))
    assert isinstance(error, InvalidRequest)
    assert error.param == param


async def test_a_grammar_that_cannot_be_compiled_is_counted(system):
    before = num_refused_grammars()
    await failure(system.generate(make_request("describe", grammar=Grammar(regex="(", param="here"))))
    assert num_refused_grammars() == before + 1


def num_refused_grammars() -> float:
    (family,) = metrics.LANGUAGE_GRAMMAR_FAILURES.collect()
    return family.samples[0].value


# --- grammars

POINT = {
    "type": "object",
    "properties": {"name": {"enum": ["circle", "square"]}, "x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "x"],
    "additionalProperties": False,
}
KINDS = {
    "regex": Grammar(regex=r"[a-f]{4}-\d{2}"),
    "choice": Grammar(choice=Choices(texts=["a red circle", "two squares"])),
    "json_schema": Grammar(json_schema=json.dumps(POINT)),
}
DRAWN = {"temperature": 2.0, "seed": 11, "max_tokens": 300}


def num_compiled_grammars() -> float:
    (family,) = metrics.LANGUAGE_GRAMMAR_COMPILE_SECONDS.collect()
    return next(sample.value for sample in family.samples if sample.name.endswith("_count"))


def obeys(kind, text):
    if kind == "regex":
        return re.fullmatch(r"[a-f]{4}-[0-9]{2}", text) is not None
    if kind == "choice":
        return text in ("a red circle", "two squares")
    point = json.loads(text)
    return list(point) == ["name", "x"] and point["name"] in ("circle", "square") and 0 <= point["x"] <= 99


@pytest.mark.parametrize("sampling", [{"max_tokens": 300}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", KINDS)
async def test_grammars_are_kept_and_text_beside_them_is_unchanged(system, checkpoint, kind, sampling):
    messages = [message("user", "describe the image")]
    compiled_before = num_compiled_grammars()
    replies = await asyncio.gather(
        system.generate(make_request("describe", grammar=KINDS[kind], **sampling)),
        system.generate(make_request(messages)),
        system.generate(make_request("what number?", grammar=KINDS[kind], **sampling)),
    )
    assert num_compiled_grammars() == compiled_before + 2
    for reply in (replies[0], replies[2]):
        assert obeys(kind, reply.text()), reply.text()
        assert reply.finished[0].finish_reason == "stop"
        assert reply.finished[0].usage.completion_tokens == len(reply.ids())
    assert replies[1].ids() == reference_tokens(checkpoint, messages)


async def test_a_channel_is_named_before_the_grammar_and_is_no_text(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", layout="github", text="gpt_oss")
    async with running_system(checkpoint, tmp_path) as system:
        reply = await system.generate(make_request("describe", grammar=KINDS["choice"], max_tokens=100))
        header = checkpoint.tokenizer("<|channel|>final<|message|>")["input_ids"]
        assert checkpoint.tokenizer.decode(reply.ids()).startswith(checkpoint.tokenizer.decode(header))
        assert obeys("choice", reply.text()), reply.text()
        await system.at_rest()


async def test_each_choice_of_a_request_has_its_own_place_in_the_grammar(system):
    reply = await system.generate(make_request("describe", grammar=KINDS["regex"], n=4, **DRAWN))
    texts = [reply.text(index) for index in range(4)]
    assert all(obeys("regex", text) for text in texts)
    assert len(set(texts)) > 1


async def test_a_grammar_goes_on_where_a_lost_server_left_it(system):
    request = {"grammar": KINDS["json_schema"], **DRAWN}
    whole = await system.generate(make_request("describe", **request))
    for cut in (1, 5, len(whole.ids())):
        rest = await system.generate(make_request("describe", output_token_ids=whole.ids()[:cut], **request))
        assert rest.ids() == whole.ids()[cut:]
        assert rest.finished[0].finish_reason == "stop"
    error = await failure(system.generate(make_request("describe", output_token_ids=[300], **request)))
    assert (type(error), error.param) == (InvalidRequest, "continuations")


async def test_stops_beside_a_grammar(system):
    """A stop string ends the text as ever; wishes for more than the grammar has are void."""
    options = {"grammar": KINDS["choice"], "max_tokens": 50}
    whole = (await system.generate(make_request("describe", **options))).text()
    stopped = await system.generate(make_request("describe", stop=[whole[3:5]], **options))
    assert (stopped.text(), stopped.finished[0].finish_reason) == (whole[:3], "stop")
    longer = await system.generate(make_request("describe", min_tokens=40, ignore_eos=True, **options))
    assert (longer.text(), longer.finished[0].finish_reason) == (whole, "stop")
    cut = await system.generate(make_request("describe", **(options | {"max_tokens": 2})))
    assert whole.startswith(cut.text()) and cut.finished[0].finish_reason == "length"


async def test_a_grammar_that_becomes_too_much_ends_its_own_request(system, checkpoint):
    messages = [message("user", "describe the image")]
    heavy = Grammar(regex="(.*[a-z].{1,500}[^x].{1,500}){9}", param="structured_outputs.regex")
    error, reply = await asyncio.gather(
        failure(system.generate(make_request("describe", grammar=heavy, ignore_eos=True, **DRAWN))),
        system.generate(make_request(messages)),
    )
    assert (type(error), error.param) == (InvalidRequest, "structured_outputs.regex")
    assert reply.ids() == reference_tokens(checkpoint, messages)


async def test_a_grammar_that_takes_too_long_is_refused(system, monkeypatch):
    monkeypatch.setattr(generation, "_COMPILE_SECONDS", 0.01)
    monkeypatch.setattr(GrammarCompiler, "compile", lambda self, grammar: time.sleep(0.2))
    error = await failure(system.generate(make_request("describe", grammar=Grammar(regex="a", param="here"))))
    assert (type(error), error.param) == (InvalidRequest, "here")


async def test_a_grammar_behind_slow_ones_is_not_blamed_for_them(system, monkeypatch):
    begun, release = threading.Semaphore(0), threading.Event()

    def compile_slowly(*_: Any) -> None:
        begun.release()
        release.wait(60)

    monkeypatch.setattr(generation, "_COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(GrammarCompiler, "compile", compile_slowly)
    grammar = Grammar(regex="a", param="here")
    slow = [asyncio.create_task(failure(system.generate(make_request("one", grammar=grammar)))) for _ in range(2)]
    for _ in slow:  # until both compiling threads are taken
        assert await asyncio.to_thread(begun.acquire, timeout=60)
    error = await failure(system.generate(make_request("two", grammar=grammar)))
    release.set()
    assert type(error) is Overloaded
    assert {type(each) for each in await asyncio.gather(*slow)} == {InvalidRequest}


# --- thoughts

THOUGHTFUL = Grammar(regex=r"<think>\n[a-f]{6} [a-f]{6}\n</think>\n\n[0-9]{4}")
THINKS = {"grammar": THOUGHTFUL, "separate_reasoning": True, **DRAWN}


async def test_thoughts_are_divided_from_the_answer(system):
    reply = await system.generate(make_request("describe", n=2, logprobs=True, **THINKS))
    for choice in (0, 1):
        assert re.fullmatch("[a-f]{6} [a-f]{6}", reply.reasoning(choice))
        assert re.fullmatch("[0-9]{4}", reply.text(choice))
        usage = reply.finished[choice].usage
        assert 3 < usage.reasoning_tokens < usage.completion_tokens == len(reply.ids(choice))
    assert reply.reasoning(0) != reply.reasoning(1)
    assert all(token.logprob.token_id == token.token_id for token in reply.tokens)  # tags have theirs, too
    undivided = await system.generate(make_request("describe", **(THINKS | {"separate_reasoning": False})))
    assert undivided.ids() == reply.ids(0)
    assert undivided.text() == f"<think>\n{reply.reasoning(0)}\n</think>\n\n{reply.text(0)}"
    assert (undivided.reasoning(), undivided.finished[0].usage.reasoning_tokens) == ("", 0)


async def test_a_lost_servers_thoughts_are_continued(system):
    whole = await system.generate(make_request("describe", **THINKS))
    for cut in (1, len(whole.ids()) // 2, len(whole.ids()) - 2):
        rest = await system.generate(make_request("describe", output_token_ids=whole.ids()[:cut], **THINKS))
        assert [(t.token_id, t.reasoning, t.text) for t in rest.tokens] == [
            (t.token_id, t.reasoning, t.text) for t in whole.tokens[cut:]
        ]
        assert rest.finished[0].usage.reasoning_tokens == whole.finished[0].usage.reasoning_tokens


async def test_thoughts_that_are_cut_are_thoughts(system):
    whole = await system.generate(make_request("describe", **THINKS))
    reply = await system.generate(make_request("describe", **(THINKS | {"max_tokens": len(whole.ids()) // 2})))
    assert whole.reasoning().startswith(reply.reasoning())
    assert (reply.text(), reply.finished[0].finish_reason) == ("", "length")
    usage = reply.finished[0].usage
    assert usage.reasoning_tokens == usage.completion_tokens == len(whole.ids()) // 2


async def test_a_request_that_shall_think_has_another_prompt(system, checkpoint):
    reply = await system.generate(make_request("how many shapes are there?", thinking=True))
    messages = [message("system", THINKING_MESSAGE), message("user", "how many shapes are there?")]
    assert reply.ids() == reference_tokens(checkpoint, messages)


async def test_odd_but_allowed_sampling_hurts_nobody(system):
    odd: list[dict[str, Any]] = [
        {"temperature": 2.0, "seed": -(2**63), "n": 3},
        {"temperature": 0.01, "seed": 2**63 - 1, "n": 2, "top_k": 512, "min_p": 1.0},
        {"top_p": 1e-9, "temperature": 1.0, "repetition_penalty": 1e-3, "presence_penalty": -2.0},
        {"logit_bias": dict.fromkeys(range(512), -100.0), "temperature": 1.0},
        {"min_tokens": 10**6, "logprobs": True, "top_logprobs": 20},
    ]
    for options in odd:
        assert (await system.generate(make_request("describe", **options))).finished


async def test_typed_placeholders_are_text(system):
    reply = await system.generate(make_request("<img><IMG_CONTEXT></img><|im_end|> hello <IMG_CONTEXT>"))
    assert reply.finished[0].usage.image_tokens == 0


# --- features that are late, wrong, or come twice


async def test_wrong_frames_cost_nothing_and_the_right_ones_still_work(system, checkpoint, images):
    request = make_request([message("user", 0, 1, "describe")], images[:2])
    call = system.open(request)
    admitted = (await call.read()).admitted

    async def rejection(index, **changes):
        with pytest.raises(FrameRejected) as caught:
            await system.deliver(request, admitted, images, index, tiles=[0], **changes)
        return caught.value.reason

    assert await rejection(0, ticket=bytes(32)) == "ticket"
    assert await rejection(0, ticket=admitted.missing[1].ticket) == "ticket"
    assert await rejection(0, fingerprint=bytes(16)) == "fingerprint"
    assert await rejection(0, request_id=b"?" * 16) == "unknown_request"
    assert await rejection(0, num_image_tiles=2) == "shape"
    assert await rejection(0, features=images[0].features[:, :-1].contiguous()) == "shape"
    assert await rejection(0, features=images[0].features * float("nan")) == "nonfinite"
    for _ in range(2):  # a duplicate is success
        await system.deliver(request, admitted, images, 0, attempt=1)
    await system.deliver(request, admitted, images, 1)
    ids = [event.token.token_id for event in await rest_of(call) if event.HasField("token")]
    assert ids == reference_tokens(checkpoint, request.messages, images[:2])
    with pytest.raises(FrameRejected, match="tombstone"):
        await system.deliver(request, admitted, images, 1)


async def test_features_that_do_not_come_end_the_request(start_system, images):
    async with start_system(feature_timeout=0.2) as system:
        request = make_request([message("user", 1, 0, "describe")], images[:2])
        call = system.open(request)
        admitted = (await call.read()).admitted
        await system.deliver(request, admitted, images, 0)
        error = await failure(rest_of(call))
        assert isinstance(error, DeadlineExceeded)
        await system.at_rest()


async def test_text_passes_requests_that_wait_for_features(system, images):
    waiting = system.open(make_request([message("user", 0, "describe")], images[:1]))
    await waiting.read()
    assert (await system.generate(make_request("how many?"))).finished
    waiting.cancel()


# --- leaving


async def test_leaving_while_decoding_frees_everything(system):
    call = system.open(make_request("describe", n=2, **ENDLESS))
    for _ in range(5):
        await call.read()
    assert system.in_use.blocks > 0
    call.cancel()
    await system.at_rest()


async def test_leaving_while_waiting_for_features_frees_everything(system, images):
    call = system.open(make_request([message("user", 0, "describe")], images[:1]))
    await call.read()
    await eventually(lambda: system.in_use.blocks > 0)  # the text before the image is prefilled
    assert system.in_use.feature_bytes == images[0].features.nbytes
    call.cancel()
    await system.at_rest()


async def test_leaving_while_waiting_for_a_reservation_leaves_the_line(start_system, images):
    async with start_system(feature_bytes=images[0].features.nbytes) as system:
        first = system.open(make_request([message("user", 0, "describe")], images[:1]))
        await first.read()
        second = system.open(make_request([message("user", 0, "describe")], [images[2]]))
        reading = asyncio.create_task(second.read())
        await eventually(lambda: system.in_use.waiting_reservations == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await eventually(lambda: system.in_use.waiting_reservations == 0)
        third_request = make_request([message("user", 0, "describe")], [images[2]])
        third = asyncio.create_task(system.generate(third_request, [images[2]]))
        await eventually(lambda: system.in_use.waiting_reservations == 1)
        first.cancel()
        assert (await third).finished
        await system.at_rest()


async def test_the_callers_deadline_holds_in_every_stage(system, images):
    decoding = make_request("describe", **ENDLESS)
    assert isinstance(await failure(system.generate(decoding, timeout=0.3)), DeadlineExceeded)
    waiting = make_request([message("user", 0, "describe")], images[:1])
    assert isinstance(await failure(rest_of(system.open(waiting, timeout=0.3))), DeadlineExceeded)


# --- limits


async def test_more_than_fits_is_refused_at_once(start_system):
    async with start_system(max_num_seqs=1, max_num_waiting=2) as system:
        calls = [system.open(make_request("describe", **ENDLESS)) for _ in range(3)]
        await asyncio.gather(*(call.read() for call in calls))
        await eventually(lambda: system.server.engine.num_live == 3)
        assert isinstance(await failure(system.generate(make_request("describe"))), Overloaded)
        for call in calls:
            call.cancel()
        await system.at_rest()
        assert (await system.generate(make_request("describe"))).finished


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [5, -5]), ("priority", [-5, 5])])
async def test_priorities_count_where_they_are_switched_on(start_system, policy, order):
    async with start_system(max_num_seqs=1, scheduling_policy=policy) as system:
        running = system.open(make_request("describe", **ENDLESS))
        for _ in range(2):  # admitted, and a token
            await running.read()
        finished = []

        async def ask(priority):
            request = make_request("describe")
            request.priority = priority
            await system.generate(request)
            finished.append(priority)

        waiting = [asyncio.create_task(ask(5))]
        await eventually(lambda: system.in_use.sequences == 2 * 2)
        waiting.append(asyncio.create_task(ask(-5)))
        await eventually(lambda: system.in_use.sequences == 2 * 3)
        running.cancel()
        await asyncio.gather(*waiting)
        assert finished == order


async def test_a_slow_reader_loses_its_request_not_our_memory(start_system):
    async with start_system(max_stream_events=16) as system:
        backend = system.server._servicer.backend
        generation = Generation(backend, make_request("describe", **ENDLESS), deadline=float("inf"))
        events = generation.events()
        with pytest.raises(Overloaded, match="too slow"):
            for _ in range(3):
                await anext(events)
            await eventually(lambda: system.server.engine.num_live == 0)
            await anext(events)
        assert len(generation._inbox) <= 16
        generation.close()
        await system.at_rest()


async def test_a_request_id_is_not_used_twice(system, images):
    request = make_request([message("user", 0, "describe")], images[:1])
    call = system.open(request)
    await call.read()
    assert isinstance(await failure(system.generate(request)), InvalidRequest)
    call.cancel()


# --- the server's own life


async def test_status_tells_routers_what_they_need(system):
    call = system.stub.WatchStatus(WatchStatusRequest(router_id="test"), timeout=20)
    status = await call.read()
    assert status.state == WORKER_STATE_READY
    assert (status.model.tokens_per_tile, status.model.vocab_size, status.model.max_model_len) == (256, 512, 16384)
    assert not status.model.is_flash
    assert status.language.total_kv_blocks == status.language.free_kv_blocks > 0
    assert status.language.free_feature_bytes == 2**22
    later = await call.read()
    assert later.progress > status.progress  # also without work
    assert later.language.num_preemptions == 0
    engine = system.server.engine
    engine.stats = dataclasses.replace(engine.stats, num_preemptions=3)  # it is idle: nobody else writes them
    while (await call.read()).language.num_preemptions != 3:  # the call has a deadline
        pass
    call.cancel()


async def test_a_draining_server_finishes_what_it_admitted(system):
    call = system.open(make_request("describe", max_tokens=300, ignore_eos=True))
    await call.read()
    drain = asyncio.create_task(system.server.drain())
    await eventually(lambda: system.server.board.state == WORKER_STATE_DRAINING)
    error = await failure(system.generate(make_request("describe")))
    assert (type(error), error.code) == (Unavailable, "draining")
    events = await rest_of(call)
    assert events[-1].finished.usage.completion_tokens == 300
    await drain


async def test_when_the_engine_dies_every_request_is_told(start_system, images, monkeypatch):
    async with start_system() as system:
        decoding = system.open(make_request("describe", **ENDLESS))
        waiting = system.open(make_request([message("user", 0, "describe")], images[:1]))
        for call in (decoding, waiting):
            await call.read()
        await eventually(lambda: system.server.engine.num_live == 2)

        def step(limits):
            raise RuntimeError("device lost")

        monkeypatch.setattr(system.server.engine._engine, "step", step)
        for call in (decoding, waiting):
            assert isinstance(await failure(rest_of(call)), Unavailable)
        assert isinstance(system.server.engine.ended.exception(), RuntimeError)
        assert isinstance(await failure(system.generate(make_request("describe"))), Unavailable)
        assert system.in_use.feature_bytes == 0


async def start_program(checkpoint, directory):
    """The program as ``main`` runs it: a task that ends with its exit status, its announcement and its stub."""
    announce = directory / "announce.json"
    options = {
        "model": checkpoint.path,
        "listen": f"unix:{directory}/s",
        "feature_listen": f"unix-dir:{directory}/f",
        "device": "cpu",
        "kv_cache_bytes": 2**20,
        "announce": announce,
    }
    settings = LanguageSettings(**options)
    program = asyncio.create_task(run(settings))
    await eventually(lambda: announce.exists() or program.done())
    return program, json.loads(announce.read_text())


async def test_the_program_announces_itself_serves_and_drains_on_a_signal(checkpoint, tmp_path, capsys):
    program, said = await start_program(checkpoint, tmp_path)
    assert (said["role"], said["address"], said["pid"]) == ("language", f"unix:{tmp_path}/s", os.getpid())
    async with rpc.make_channel(said["address"]) as channel:
        call = LanguageStub(channel).Generate(make_request("describe", max_tokens=200, ignore_eos=True), timeout=60)
        await call.read()
        os.kill(os.getpid(), signal.SIGTERM)
        events = await rest_of(call)
    assert events[-1].finished.usage.completion_tokens == 200
    assert await program == 0
    assert f"language server ready at unix:{tmp_path}/s" in capsys.readouterr().err


async def test_the_program_ends_when_its_engine_dies(checkpoint, tmp_path, monkeypatch):
    step = LanguageEngine.step

    def fail_on_requests(engine):
        if any(seq_id >= 0 for seq_id in engine._sequences):  # the warm-up is not one
            raise RuntimeError("device lost")
        return step(engine)

    monkeypatch.setattr(LanguageEngine, "step", fail_on_requests)
    program, said = await start_program(checkpoint, tmp_path)
    async with rpc.make_channel(said["address"]) as channel:
        error = await failure(rest_of(LanguageStub(channel).Generate(make_request("describe"), timeout=60)))
    assert isinstance(error, Unavailable)
    assert await program == 1


def test_what_the_operator_must_change_is_said(checkpoint, tmp_path, capsys):
    assert main(["--model", str(tmp_path / "nothing")]) == 2
    assert main(["--modle", str(checkpoint.path)]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["--model", str(checkpoint.path), "--max-model-len", "99999999"]) == 2
    assert "max_model_len" in capsys.readouterr().err
