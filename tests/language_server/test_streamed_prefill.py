"""Rows that are here are read while others are awaited, and with the switch off they are not."""

import asyncio

from common.service import metrics
from tests.language_server.conftest import (
    TOKENS_PER_TILE,
    Reply,
    eventually,
    make_request,
    reference_tokens,
)
from tests.language_server.messages import message
from tests.language_server.test_language_server import rest_of


def tokens_run():
    """In all steps of this process so far."""
    return metrics.LANGUAGE_STEP_TOKENS._sum.get()


async def test_each_tile_is_read_as_it_comes(system, checkpoint, images):
    """Whichever image it belongs to: text and tiles without a gap."""
    messages = [message("user", "look: ", 0, 1, "describe the difference")]
    request, before = make_request(messages, images[:2]), tokens_run()
    call = system.open(request)
    reply = Reply(admitted := (await call.read()).admitted)
    await eventually(lambda: tokens_run() > before)  # the text before the first image
    text = tokens_run() - before
    await system.deliver(request, admitted, images, 1, tiles=[0])
    await asyncio.sleep(0.05)
    assert tokens_run() - before == text  # nothing of the second image can be read before the first one
    await system.deliver(request, admitted, images, 0)
    await eventually(lambda: tokens_run() - before >= text + 2 * TOKENS_PER_TILE)
    assert tokens_run() - before < text + 2 * TOKENS_PER_TILE + 8  # and what lies between them, no row of tile 2
    await system.deliver(request, admitted, images, 1, tiles=[1])
    for event in await rest_of(call):
        reply.add(event)
    assert reply.ids() == reference_tokens(checkpoint, messages, images[:2])


async def test_with_a_barrier_nothing_is_read_before_the_last_tile(start_system, checkpoint, images):
    messages = [message("user", "look: ", 0, "and ", 1, "describe the difference")]
    async with start_system(streamed_prefill=False) as system:
        request, before = make_request(messages, images[:2]), tokens_run()
        call = system.open(request)
        reply = Reply(admitted := (await call.read()).admitted)
        await system.deliver(request, admitted, images, 0)
        await system.deliver(request, admitted, images, 1, tiles=[0])
        await asyncio.sleep(0.1)
        assert tokens_run() == before
        await system.deliver(request, admitted, images, 1, tiles=[1])
        for event in await rest_of(call):
            reply.add(event)
        assert reply.ids() == reference_tokens(checkpoint, messages, images[:2])
        assert reply.finished[0].timings.feature_wait_ms > 100
        again = await system.generate(make_request(messages, images[:2]))
        assert again.ids() == reply.ids()
        await system.at_rest()


async def test_leaving_before_the_barrier_frees_everything(start_system, images):
    async with start_system(streamed_prefill=False) as system:
        call = system.open(make_request([message("user", 0, "x")], images[:1]))
        assert (await call.read()).admitted.missing
        call.cancel()
        await system.at_rest()


async def test_requests_for_one_image_wait_for_it_together(start_system, checkpoint, images):
    """Room for one: what comes for the first serves the second, whose own frames are then duplicates."""
    messages = [message("user", 0, "what number is written in the picture?")]
    async with start_system(feature_bytes=images[0].features.nbytes) as system:
        first, second = (make_request(messages, images[:1]) for _ in range(2))
        calls = [system.open(request) for request in (first, second)]
        replies = [Reply((await call.read()).admitted) for call in calls]
        assert all(reply.admitted and len(reply.admitted.missing) == 1 for reply in replies)
        await system.deliver(first, replies[0].admitted, images, 0)
        calls[0].cancel()
        for event in await rest_of(calls[1]):
            replies[1].add(event)
        assert replies[1].ids() == reference_tokens(checkpoint, messages, images[:1])
        await system.at_rest()
