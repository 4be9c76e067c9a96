"""How many tiles an image may have and has: numbers, shared budgets, orientation."""

import io

import pytest
from PIL import Image

from tests.router.conftest import error_of, png, running_system, user
from tests.router.parts import PHOTO, RED, ask, frames, image, tiles, video


@pytest.mark.parametrize(
    ("limit", "num_tiles"), [(1, 1), (6, 3), (12, 9), (24, 16), (40, 29)]
)  # the tables of INTERNVL.md section 6.2, and a thumbnail
async def test_a_number_on_the_part_or_on_the_request(system, limit, num_tiles):
    photo = png(size=PHOTO)
    assert tiles(await ask(system, image(photo, max_dynamic_patch=limit))) == [num_tiles]
    assert tiles(await ask(system, image(photo), max_dynamic_patch=limit)) == [num_tiles]
    assert tiles(await ask(system, image(photo), mm_processor_kwargs={"max_dynamic_patch": limit})) == [num_tiles]
    assert {call.tiling.max_dynamic_patch for call in system.vision.requests} == {limit}


async def test_a_minimum(system):
    assert tiles(await ask(system, image(RED, min_dynamic_patch=4))) == [5]
    assert tiles(await ask(system, image(RED), min_dynamic_patch=40, max_dynamic_patch=40)) == [41]
    assert [call.tiling.min_dynamic_patch for call in system.vision.requests] == [4, 40]


async def test_a_shared_budget_is_divided_among_images():
    photo = png(size=PHOTO)
    shared = {"dvd": {"tile_budget": "shared"}}
    async with running_system() as system:
        assert tiles(await ask(system, photo, photo)) == [9, 9]
        assert tiles(await ask(system, photo, **shared)) == [9]
        assert tiles(await ask(system, photo, photo, **shared)) == [3, 3]
        assert tiles(await ask(system, *[photo] * 13, **shared)) == [1] * 13
        assert tiles(await ask(system, photo, photo, max_dynamic_patch=24, **shared)) == [9, 9]
        assert tiles(await ask(system, photo, image(photo, max_dynamic_patch=12), **shared)) == [3, 9]
        assert tiles(await ask(system, photo, image(photo, detail="low"), **shared)) == [3, 1]
        assert tiles(await ask(system, photo, video(), frames(photo, photo), **shared)) == [9, 8, 1, 1]
    async with running_system(tile_budget="shared") as system:
        assert tiles(await ask(system, photo, photo)) == [3, 3]
        assert tiles(await ask(system, photo, photo, dvd={"tile_budget": "per_image"})) == [9, 9]


async def test_images_of_all_messages_share(system):
    photo = png(size=PHOTO)
    messages = [user(photo), {"role": "assistant", "content": "a"}, user(photo, "b")]
    assert (await system.chat(messages=messages, dvd={"tile_budget": "shared"})).status_code == 200
    assert tiles(system.language.requests[-1]) == [3, 3]


async def test_a_minimum_above_a_share_is_refused(system):
    response = await system.chat(messages=[user(RED, RED)], min_dynamic_patch=7, dvd={"tile_budget": "shared"})
    error = error_of(response)
    assert (error["code"], error["param"]) == ("invalid_value", "min_dynamic_patch")
    assert "6 tiles" in error["message"]


def turned(orientation) -> dict:
    """500 x 400 pixels are one tile of at most six; 400 x 500 are two by three and a thumbnail."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (500, 400), "red").save(buffer, "JPEG", exif=exif)
    return image(buffer.getvalue(), max_dynamic_patch=6)


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_turned_image_is_priced_as_it_is_seen(orientation):
    async with running_system(exif_orientation=True) as system:
        assert tiles(await ask(system, turned(orientation))) == [7 if orientation >= 5 else 1]
        assert system.vision.requests[0].tiling.exif_orientation


async def test_orientation_does_not_count_unless_switched_on(system):
    assert tiles(await ask(system, turned(6))) == [1]
    assert not system.vision.requests[0].tiling.exif_orientation
