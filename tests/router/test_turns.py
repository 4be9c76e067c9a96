"""Who waits for a turn, and who gets it."""

import asyncio

import pytest

from protos.status_pb2 import VisionLoad
from router.turns import Turn, Turns
from tests.router.conftest import png, running_system, user


def waiting_for(turns: Turns, num_tiles: int) -> asyncio.Task[Turn]:
    return asyncio.create_task(turns.take(num_tiles))


async def let_run() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_no_more_tiles_are_under_way_than_may_be_and_who_came_first_goes_first():
    turns = Turns(lambda: 10)
    first, second = await turns.take(6), await turns.take(4)
    large, small = waiting_for(turns, 8), waiting_for(turns, 1)
    await let_run()
    assert turns.num_waiting == 2
    second.is_over()
    await let_run()
    assert turns.num_waiting == 2  # the small one would fit, but came later
    first.is_over()
    await let_run()
    assert large.done() and small.done() and turns.num_waiting == 0


async def test_text_never_waits():
    turns = Turns(lambda: 1)
    with await turns.take(1):
        image = waiting_for(turns, 1)
        await let_run()
        async with asyncio.timeout(0):
            await turns.take(0)
        assert not image.done()
    await image


async def test_what_is_larger_than_all_goes_when_it_is_alone():
    turns = Turns(lambda: 4)
    small = await turns.take(1)
    large = waiting_for(turns, 40)
    await let_run()
    assert not large.done()
    small.is_over()
    (await large).is_over()
    assert (await turns.take(40)) is not None


async def test_nothing_waits_while_no_server_has_said_what_it_takes():
    turns = Turns(lambda: 0)
    assert [await turns.take(40) for _ in range(3)]


async def test_a_turn_ends_once():
    turns = Turns(lambda: 2)
    with await turns.take(1) as turn:
        turn.is_over()
        turn.is_over()
        await turns.take(2)
    third = waiting_for(turns, 1)
    await let_run()
    assert not third.done()
    third.cancel()


@pytest.mark.parametrize("is_granted", [False, True])
async def test_who_leaves_hands_the_turn_on(is_granted: bool):
    turns = Turns(lambda: 4)
    first = await turns.take(3)
    large, small = waiting_for(turns, 4), waiting_for(turns, 1)
    await let_run()
    if is_granted:
        first.is_over()  # the large one has it, but does not know yet
    large.cancel()
    await let_run()
    assert large.cancelled() and small.done() and turns.num_waiting == 0
    if not is_granted:
        first.is_over()
    (await small).is_over()
    assert (await turns.take(4)) is not None


async def test_more_room_is_used_at_once():
    room = 1
    turns = Turns(lambda: room)
    await turns.take(1)
    waiting = waiting_for(turns, 1)
    await let_run()
    room = 2
    turns.grant()
    await let_run()
    assert waiting.done()


async def test_requests_with_images_go_to_the_servers_a_few_at_a_time_and_text_passes_them():
    async with running_system() as system:
        system.vision.change(load=VisionLoad(max_batch_tiles=1))
        await system.until(lambda: system.router.fleet.turns._max_tiles() == 4)
        gate = system.vision.at_encode
        gate.is_open.clear()
        chats = [
            asyncio.create_task(system.chat(messages=[user(png(f"#0000{number:02x}"))], max_tokens=1))
            for number in range(9)
        ]
        await gate.wait_for(lambda gate: gate.num_entered == 4)
        async with asyncio.timeout(10):
            while system.router.fleet.turns.num_waiting < 5:
                await asyncio.sleep(0.01)
        assert (await system.chat(messages=[user("text")])).status_code == 200
        assert 'reason="budget"} 5.0' in (await system.http.get("/metrics")).text
        assert gate.num_entered == 4

        chats.pop().cancel()  # its client leaves
        late = await system.http.post(
            "/v1/chat/completions",
            json={"messages": [user(png("red"))]},
            headers={"X-Dvd-Deadline-Ms": "200"},
        )
        assert late.status_code == 504
        gate.is_open.set()
        assert [reply.status_code for reply in await asyncio.gather(*chats)] == [200] * 8
        await system.until_idle()
        assert system.router.fleet.turns.num_waiting == 0
