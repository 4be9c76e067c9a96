"""An image whose KV is here is not encoded again, whatever became of its features, and its KV stays while it must."""

import asyncio
import dataclasses

import pytest

from common.service import metrics
from common.service.errors import Unavailable
from tests.language_server.conftest import (
    TOKENS_PER_TILE,
    Image,
    eventually,
    make_request,
    reference_tokens,
)
from tests.language_server.messages import message
from tests.language_server.test_language_server import failure, rest_of

QUESTION = "what number is written in the picture? how many shapes are there? describe the difference"
NUM_BIG_TILES = 3


@pytest.fixture(scope="module")
def big(images):
    """An image whose features fill the memory."""
    rows = images[0].features.repeat(NUM_BIG_TILES, 1)
    return Image(rows, [TOKENS_PER_TILE] * NUM_BIG_TILES, b"B" * 32)


@pytest.fixture
async def small(start_system, big):
    """Room for the features of three tiles; KV for many more."""
    async with start_system(feature_bytes=big.features.nbytes) as system:
        yield system
        await system.at_rest()


def reused():
    return metrics.LANGUAGE_FEATURES_REUSED.labels("kv")._value.get()


async def drive_out(system, big):
    """Have the features of another image take all the room."""
    await system.generate(make_request([message("user", 0, "x")], [big], max_tokens=1), [big])
    await system.at_rest()  # who comes next need not wait for this room


async def test_an_image_whose_kv_is_here_is_not_asked_for(small, checkpoint, images, big):
    messages, before = [message("user", 0, QUESTION)], reused()
    first = await small.generate(make_request(messages, images[:1]), images)
    await drive_out(small, big)
    again = await small.generate(make_request(messages, images[:1]))
    assert not again.admitted.missing and not again.admitted.deliver_to
    assert again.ids() == first.ids() == reference_tokens(checkpoint, messages, images[:1])
    assert again.finished[0].usage.cached_tokens > TOKENS_PER_TILE
    assert again.finished[0].usage.image_tokens == TOKENS_PER_TILE
    assert reused() == before + 1


async def test_the_next_turn_needs_no_image_and_a_new_one_only_itself(small, checkpoint, images, big):
    turns = [message("user", 0, QUESTION)]
    first = await small.generate(make_request(turns, images[:1]), images)
    turns += [message("assistant", first.text()), message("user", "and here? ", 1, QUESTION)]
    await drive_out(small, big)
    reply = await small.generate(make_request(turns, images[:2]), images)
    assert [missing.image_index for missing in reply.admitted.missing] == [1]
    assert reply.ids() == reference_tokens(checkpoint, turns, images[:2])
    await drive_out(small, big)
    again = await small.generate(make_request(turns, images[:2]))
    assert not again.admitted.missing
    assert again.ids() == reply.ids()


async def test_another_scope_or_question_shares_nothing_it_must_not(small, checkpoint, images, big):
    messages = [message("user", 0, QUESTION)]
    await small.generate(make_request(messages, images[:1]), images)
    await drive_out(small, big)
    request = make_request(messages, images[:1])
    request.cache_scope = "somebody else"
    reply = await small.generate(request, images)
    assert len(reply.admitted.missing) == 1
    assert reply.ids() == reference_tokens(checkpoint, messages, images[:1])


async def test_choices_share_what_is_held(small, images, big):
    messages, options = [message("user", 0, QUESTION)], {"n": 3, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    first = await small.generate(make_request(messages, images[:1], **options), images)
    await drive_out(small, big)
    again = await small.generate(make_request(messages, images[:1], **options))
    assert not again.admitted.missing
    assert [again.ids(choice) for choice in range(3)] == [first.ids(choice) for choice in range(3)]


async def test_what_is_held_outlives_preemption(start_system, checkpoint, images, big):
    """Rows of the image are nowhere; others take every block that is not held, again and again."""
    messages, long = [message("user", 0, QUESTION)], {"max_tokens": 150, "ignore_eos": True}
    block_bytes = 2 * 4 * 16 * 1024  # more than a block has, whatever the shape
    async with start_system(
        feature_bytes=big.features.nbytes, block_size=16, kv_cache_bytes=70 * block_bytes, max_model_len=900
    ) as system:
        total = system.server.engine.stats.num_total_blocks
        first = await system.generate(make_request(messages, images[:1], **long), images)
        await drive_out(system, big)
        num_preempted = metrics.LANGUAGE_PREEMPTIONS._value.get()
        request = make_request(messages, images[:1], **long)
        call = system.open(request)
        admitted = (await call.read()).admitted
        assert not admitted.missing
        num_others = total * 16 // 400 + 2
        others = [
            asyncio.create_task(system.generate(make_request(f"{index} " * 100, **(long | {"max_tokens": 300}))))
            for index in range(num_others)
        ]
        ids = [event.token.token_id for event in await rest_of(call) if event.WhichOneof("event") == "token"]
        await asyncio.gather(*others)
        assert ids == first.ids()
        assert metrics.LANGUAGE_PREEMPTIONS._value.get() > num_preempted
        await system.at_rest()


async def test_nobody_waits_in_line_with_blocks_in_his_hands(small, images, big):
    """The request needs another image for which there is no room: it lets go of what it held, and asks for both."""
    turns = [message("user", 0, QUESTION)]
    await small.generate(make_request(turns, images[:1]), images)
    await drive_out(small, big)
    waiting = small.open(make_request([message("user", 0, "x")], [dataclasses.replace(big, mm_hash=b"w" * 32)]))
    await waiting.read()
    other = dataclasses.replace(images[2], mm_hash=b"o" * 32)
    request = make_request([*turns, message("assistant", "4"), message("user", 1, QUESTION)], [images[0], other])
    call = small.open(request)
    await eventually(lambda: small.in_use.waiting_reservations == 1)
    waiting.cancel()
    admitted = (await call.read()).admitted
    assert [missing.image_index for missing in admitted.missing] == [0, 1]
    call.cancel()


async def test_leaving_lets_go_of_what_was_held(small, images, big):
    messages = [message("user", 0, QUESTION)]
    await small.generate(make_request(messages, images[:1]), images)
    await drive_out(small, big)
    await small.at_rest()
    call = small.open(make_request(messages, images[:1], max_tokens=10000, ignore_eos=True))
    assert not (await call.read()).admitted.missing
    call.cancel()
    await small.at_rest()


async def test_when_the_engine_dies_who_asks_for_its_cache_is_told(start_system, images, big, monkeypatch):
    async with start_system(feature_bytes=big.features.nbytes) as system:
        messages = [message("user", 0, QUESTION)]
        await system.generate(make_request(messages, images[:1]), images)
        await drive_out(system, big)
        await system.at_rest()

        def hold(holder):
            raise RuntimeError("device lost")

        monkeypatch.setattr(system.server.engine._engine, "hold", hold)
        error = await failure(system.generate(make_request(messages, images[:1])))
        assert isinstance(error, Unavailable)
        assert isinstance(system.server.engine.ended.exception(), RuntimeError)
