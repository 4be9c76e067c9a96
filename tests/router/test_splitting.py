"""Who encodes which tiles of a large image, and what becomes of it when one of them fails."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.service.errors import Unavailable
from protos.status_pb2 import VisionLoad
from router.splitting import MIN_SAVED_SECONDS, WHOLE, divide
from tests.router.conftest import png, running_system, user
from tests.router.fakes import FLASH

PHOTO = png("green", (1920, 1080))
"""Eight tiles and a thumbnail."""


@given(st.integers(1, 41), st.integers(0, 6), st.integers(1, 8))
def test_parts_cover_the_image_once_and_in_order(num_tiles, num_servers, min_tiles):
    servers = [f"server-{number}" for number in range(num_servers)]
    parts = divide(num_tiles, servers, min_tiles, 0.0)
    if parts is WHOLE:
        assert num_servers < 2 or num_tiles < 2 * min_tiles
        return
    sizes = [part.num_tiles for part in parts]
    assert [part.server for part in parts] == servers[: len(parts)]
    assert parts[0].first_tile == 0 and sum(sizes) == num_tiles
    assert all(after.first_tile == part.first_tile + part.num_tiles for part, after in pairwise(parts))
    assert min(sizes) == sizes[0] >= min_tiles and max(sizes) - min(sizes) <= 1


def test_what_saves_next_to_nothing_is_not_divided():
    slow, fast = 6 / MIN_SAVED_SECONDS, 7 / MIN_SAVED_SECONDS  # of 13 tiles the other part has 7: 6 are saved
    assert [part.num_tiles for part in divide(13, ["a", "b"], 4, slow)] == [6, 7]
    assert divide(13, ["a", "b"], 4, fast) is WHOLE


def parts_seen(system):
    """First tile and number of tiles of each call, by server."""
    return [[(call.first_tile, call.num_tiles) for call in vision.requests] for vision in system.visions]


async def test_a_large_image_is_divided_among_idle_servers():
    async with running_system(num_vision=2) as system:
        assert (await system.chat(messages=[user(PHOTO)])).status_code == 200
        seen = parts_seen(system)
        assert sorted(seen) == [[(0, 4)], [(4, 5)]]
        assert (await system.chat(messages=[user(PHOTO, "again")])).status_code == 200
        assert parts_seen(system) == [2 * calls for calls in seen]  # equal images meet, part by part


@pytest.mark.parametrize("load", [VisionLoad(queued_tiles=4), VisionLoad(tiles_per_second=1000)])
async def test_it_is_not_where_servers_are_busy_or_fast(load):
    async with running_system(num_vision=2) as system:
        for vision in system.visions:
            vision.change(load=load)
        workers = system.router.fleet.vision
        await system.until(lambda: all(worker.status and worker.status.vision == load for worker in workers))
        assert (await system.chat(messages=[user(PHOTO)])).status_code == 200
        assert sorted(parts_seen(system)) == [[], [(0, 0)]]


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"split_min_tiles": 0}, {}),
        ({"split_min_tiles": 5}, {}),
        ({"model": FLASH}, {}),  # its tiles are compared with one another
        ({"model": FLASH}, {"dvd": {"vir": {"scope": "image"}}}),
    ],
)
async def test_some_images_are_left_whole(options, body):
    async with running_system(num_vision=2, **options) as system:
        assert (await system.chat(messages=[user(PHOTO)], **body)).status_code == 200
        assert sorted(parts_seen(system)) == [[], [(0, 0)]]


@pytest.mark.parametrize("vir", [{"mode": "off"}, {"mode": "force64"}, {"scope": "absolute"}])
async def test_a_flash_model_divides_where_a_tile_is_decided_alone(vir):
    async with running_system(num_vision=2, model=FLASH) as system:
        assert (await system.chat(messages=[user(PHOTO)], dvd={"vir": vir})).status_code == 200
        assert sorted(parts_seen(system)) == [[(0, 4)], [(4, 5)]]


async def test_a_lost_part_is_encoded_again_alone():
    async with running_system(num_vision=2) as system:
        failing = system.visions[0]
        failing.failures.append(Unavailable("gone"))
        assert (await system.chat(messages=[user(PHOTO)])).status_code == 200
        calls = [call for vision in system.visions for call in vision.requests]
        assert len(calls) == 3
        lost = failing.requests[0]
        assert [(call.first_tile, call.attempt) for call in system.visions[1].requests if call.attempt] == [
            (lost.first_tile, 1)
        ]
