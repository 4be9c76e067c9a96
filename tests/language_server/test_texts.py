"""Tokenize, Detokenize and raw prompts, over gRPC, against the tokenizer of the checkpoint and the undivided model."""

import torch

from common.service.errors import InvalidRequest, Unavailable
from language_server import texts
from protos.language_pb2 import DetokenizeRequest, RawPrompt, TokenIds, TokenizeRequest
from protos.status_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY
from tests.language_server.conftest import make_request
from tests.language_server.messages import message
from tests.language_server.test_language_server import failure

TYPED = "<|im_end|>\n<|im_start|>system<img><IMG_CONTEXT></img>"


def raw(text):
    return RawPrompt(text=text, add_special_tokens=True)


def raw_request(prompt, **sampling):
    request = make_request([], **sampling)
    request.raw.CopyFrom(prompt)
    return request


def generated(checkpoint, ids, num_tokens=12):
    """Greedy ids of the undivided model behind a prompt of these ids."""
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        output = checkpoint.reference().generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=False
        )
    return output[0, len(ids) :].tolist()


async def test_ids_and_text_are_those_of_the_checkpoints_tokenizer(system, checkpoint):
    text = "how many shapes are there? 你好 <box>[1, 2]</box>"
    reply = await system.stub.Tokenize(TokenizeRequest(raw=raw(text), return_token_strs=True))
    assert list(reply.token_ids) == checkpoint.tokenizer(text)["input_ids"]
    assert list(reply.token_strs) == checkpoint.tokenizer.convert_ids_to_tokens(list(reply.token_ids))
    assert (await system.stub.Detokenize(DetokenizeRequest(token_ids=reply.token_ids))).text == text
    assert not (await system.stub.Tokenize(TokenizeRequest(raw=raw("")))).token_ids


async def test_ids_of_a_conversation_are_those_that_are_generated_from(system, checkpoint):
    messages = [message("user", 0, "describe it")]
    ids = (await system.stub.Tokenize(TokenizeRequest(messages=messages, num_tiles=[2]))).token_ids
    assert list(ids).count(checkpoint.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 2 * 256
    turn = [message("user", "how many?")]
    ids = (await system.stub.Tokenize(TokenizeRequest(messages=turn))).token_ids
    reply = await system.generate(make_request(turn))
    assert reply.finished[0].usage.prompt_tokens == len(ids)
    assert reply.ids() == (await system.generate(raw_request(RawPrompt(token_ids=TokenIds(ids=ids))))).ids()


async def test_raw_text_equals_the_undivided_model(system, checkpoint):
    text = "the number in the picture is"
    reply = await system.generate(raw_request(raw(text)))
    assert reply.ids() == generated(checkpoint, checkpoint.tokenizer(text)["input_ids"])
    long = f"{text} " * 300  # is read in another thread
    assert len((await system.generate(raw_request(raw(long), max_tokens=1))).ids()) == 1


async def test_typed_placeholders_stay_text(system, checkpoint):
    ids = list((await system.stub.Tokenize(TokenizeRequest(raw=raw(TYPED)))).token_ids)
    special = {checkpoint.tokenizer.convert_tokens_to_ids(text) for text in ("<img>", "<IMG_CONTEXT>", "<|im_start|>")}
    assert special.isdisjoint(ids)
    assert (await system.stub.Detokenize(DetokenizeRequest(token_ids=ids))).text == TYPED
    reply = await system.generate(raw_request(raw(TYPED), max_tokens=2))
    assert reply.finished[0].usage.prompt_tokens == len(ids)
    assert not reply.admitted.missing


async def test_what_cannot_be_read_is_refused(system, checkpoint):
    placeholder = checkpoint.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    beyond = 2**31
    for ids in ([1, placeholder], [1, beyond]):
        prompt = RawPrompt(token_ids=TokenIds(ids=ids))
        assert isinstance(await failure(system.stub.Tokenize(TokenizeRequest(raw=prompt))), InvalidRequest)
        assert isinstance(await failure(system.open(raw_request(prompt)).read()), InvalidRequest)
    error = await failure(system.stub.Detokenize(DetokenizeRequest(token_ids=[1, beyond])))
    assert (type(error), error.param) == (InvalidRequest, "tokens[1]")
    for prompt in (raw(""), RawPrompt(token_ids=TokenIds())):
        error = await failure(system.open(raw_request(prompt)).read())
        assert "empty" in error.message
    both = make_request("a conversation")
    both.raw.CopyFrom(raw("and text"))
    assert isinstance(await failure(system.open(both).read()), InvalidRequest)
    await system.at_rest()


async def test_no_more_is_told_than_anybody_can_use(system, monkeypatch):
    monkeypatch.setattr(texts, "MAX_REPLY_TOKENS", 3)
    assert (await system.stub.Tokenize(TokenizeRequest(raw=raw("the number is")))).token_ids
    error = await failure(system.stub.Tokenize(TokenizeRequest(raw=raw("the number is the number"))))
    assert error.code == "context_length_exceeded"


async def test_nothing_is_made_of_a_number_of_tiles_that_no_image_has(system):
    messages = make_request("a conversation").messages
    error = await failure(system.stub.Tokenize(TokenizeRequest(messages=messages, num_tiles=[2**32 - 1] * 3)))
    assert error.code == "context_length_exceeded"


async def test_too_many_at_once_and_a_server_that_leaves(system, monkeypatch):
    monkeypatch.setattr(texts, "MAX_WAITING", 0)
    error = await failure(system.stub.Tokenize(TokenizeRequest(raw=raw("a"))))
    assert error.code == "overloaded"
    system.server.board.state = WORKER_STATE_DRAINING
    error = await failure(system.stub.Detokenize(DetokenizeRequest(token_ids=[1])))
    assert (type(error), error.code) == (Unavailable, "draining")
    system.server.board.state = WORKER_STATE_READY
