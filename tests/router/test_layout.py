"""Where blocks stand in a message: combined images, markers, and what clients that exist send."""

from router.api.layout import IMAGE_MARKER
from tests.router.conftest import error_of, png, user
from tests.router.parts import BLUE, PHOTO, RED, ask, block, image, parts_of, text, tiles, whole


async def test_consecutive_images_become_one_block(system):
    wide = png("green", (1344, 448))
    request = await ask(system, "a", RED, wide, "b", BLUE, dvd={"combine_images": True})
    assert parts_of(system) == [text("a"), block((0, 0, 0), (1, 0, 0)), text("b"), whole(2)]
    assert tiles(request) == [1, 4, 1]
    assert {call.image_index: call.image for call in system.vision.requests} == {0: RED, 1: wide, 2: BLUE}


async def test_images_of_two_messages_stay_apart(system):
    await system.chat(messages=[user(RED, BLUE), user(BLUE, RED)], dvd={"combine_images": True})
    blocks = [list(message.parts) for message in system.language.requests[0].messages]
    assert blocks == [[block((0, 0, 0), (1, 0, 0))], [block((2, 0, 0), (3, 0, 0))]]


async def test_one_marker_stands_for_all_images_of_a_message(system):
    combine = {"dvd": {"combine_images": True}}
    await ask(system, RED, "first", BLUE, f" {IMAGE_MARKER} what?", **combine)
    assert parts_of(system) == [text("first"), text(" "), block((0, 0, 0), (1, 0, 0)), text(" what?")]
    assert system.language.requests[0].messages[0].inline_images
    for num_markers in (2, 3):
        response = await system.chat(messages=[user(RED, BLUE, IMAGE_MARKER * num_markers)], **combine)
        assert error_of(response)["code"] == "image_marker_mismatch"


async def test_images_are_not_combined_unless_asked(system):
    for dvd in (None, {}, {"combine_images": False}, {"combine_images": None}):
        await ask(system, RED, BLUE, dvd=dvd)
        assert parts_of(system) == [whole(0), whole(1)]


async def test_lmms_eval_sends_a_video_as_many_images_and_says_how_it_made_them(system):
    pictures = [png(f"#{index:02x}0000") for index in range(32)]
    await ask(system, *pictures, "what?", media_io_kwargs={"video": {"num_frames": 200, "fps": 1}}, max_tokens=16)
    assert parts_of(system) == [*(whole(index) for index in range(32)), text("what?")]


async def test_vlmevalkit_sends_images_first_and_writes_markers(system):
    """A budget on each part, and far more tokens than there is room for."""
    photo = png(size=PHOTO)
    given = [image(photo, max_dynamic_patch=24), image(RED, max_dynamic_patch=24)]
    request = await ask(system, *given, f"{IMAGE_MARKER} and {IMAGE_MARKER}", n=1, max_tokens=16384)
    assert parts_of(system) == [whole(0), text(" and "), whole(1)]
    assert tiles(request) == [16, 1]
