"""The bounds at the door, without a server."""

from typing import Any

import pytest

from common.service.errors import Overloaded
from router.admission import SMALL_BODY_BYTES, Admission, AdmissionLimits, Places

UNKNOWN = Places()


class Clock:
    """Stands until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    text: int = 1, image: int = 1, max_held_bytes: int = 100, places: Places = UNKNOWN, **limits: Any
) -> tuple[Admission, Clock]:
    clock = Clock()
    bounds = AdmissionLimits({"text": text, "image": image}, max_held_bytes, **limits)
    return Admission(bounds, lambda: places, clock, lambda: 0.5), clock


def serve(admission: Admission, clock: Clock, every: float, num_waiting: int, num_served: int = 100) -> list:
    """So many wait, and one after the other is served; the slots of those who still wait."""
    slots = [admission.enter("image") for _ in range(num_waiting)]
    for _ in range(num_served):
        clock.now += every
        slots.append(admission.enter("image"))
        with slots.pop(0) as served:
            served.first_token()
    return slots


def test_classes_have_their_own_places():
    admission, _ = make()
    with admission.enter("image"):
        with pytest.raises(Overloaded) as refused:
            admission.enter("image")
        assert (refused.value.code, refused.value.retry_after) == ("overloaded", 1.0)
        with admission.enter("text"):
            assert admission.num_waiting == admission.num_running == 2
    assert admission.num_waiting == admission.num_running == 0


def test_the_first_token_frees_the_place_once():
    admission, _ = make()
    with admission.enter("text") as slot:
        slot.first_token()
        slot.first_token()
        assert (admission.num_waiting, admission.num_running) == (0, 1)
        with admission.enter("text"):
            assert (admission.num_waiting, admission.num_running) == (1, 2)
    assert (admission.num_waiting, admission.num_running) == (0, 0)


def test_a_failure_gives_everything_back():
    admission, _ = make(max_tokens=10)
    with pytest.raises(ZeroDivisionError), admission.hold(50) as held, admission.enter("text") as slot:
        held.grow(20)
        slot.weigh(10)
        assert admission.held_bytes == 70
        raise ZeroDivisionError
    assert admission.held_bytes == admission.num_running == admission.num_waiting == 0
    with admission.enter("text") as slot:
        slot.weigh(10)


def test_bytes_are_bounded_over_all_requests():
    admission, _ = make()
    with admission.hold(60) as first, admission.hold(0) as second:
        with pytest.raises(Overloaded):
            second.grow(41)
        second.grow(40)
        with pytest.raises(Overloaded):
            first.grow(1)
    assert admission.held_bytes == 0


def test_one_request_alone_may_be_as_large_as_its_own_cap_allows():
    admission, _ = make()
    with admission.hold(0) as held:
        held.grow(50)
        held.grow(500)
        assert admission.held_bytes == 550


def test_the_last_part_of_the_memory_is_for_small_bodies():
    admission, _ = make(max_held_bytes=16 * SMALL_BODY_BYTES)
    with admission.hold(13 * SMALL_BODY_BYTES), admission.hold(0) as large, admission.hold(0) as small:
        with pytest.raises(Overloaded):
            large.grow(2 * SMALL_BODY_BYTES)
        small.grow(SMALL_BODY_BYTES)
        assert admission.held_bytes == 14 * SMALL_BODY_BYTES


def test_tokens_of_waiting_requests_are_bounded_by_class():
    admission, _ = make(text=9, image=9, max_tokens=100)
    with admission.enter("image") as first, admission.enter("image") as second, admission.enter("text") as text:
        first.weigh(1000)  # alone it may be as large as it is
        with pytest.raises(Overloaded):
            second.weigh(1)
        text.weigh(100)
        first.first_token()
        second.weigh(100)


def test_images_leave_places_at_the_language_servers_to_text():
    admission, _ = make(text=99, image=99, places=Places(requests=8))
    for _ in range(6):
        admission.enter("image")
    with pytest.raises(Overloaded):
        admission.enter("image")
    admission.enter("text")


def test_tiles_that_wait_fit_into_the_vision_servers():
    admission, _ = make(image=99, places=Places(tiles=100))
    with admission.enter("image") as first, admission.enter("image") as second:
        first.weigh(1, 80)
        with pytest.raises(Overloaded):
            second.weigh(1, 1)
    with admission.enter("image") as first, admission.enter("image") as second:
        first.weigh(1, 40)
        second.weigh(1, 35)


def test_who_would_be_late_is_refused():
    admission, clock = make(image=99)
    admission.enter("image", seconds_left=0.001)  # nobody knows yet
    serve(admission, clock, every=0.5, num_waiting=3)
    with pytest.raises(Overloaded):
        admission.enter("image", seconds_left=2.0)
    admission.enter("image", seconds_left=4.0)
    admission.enter("text", seconds_left=0.001)


def test_the_wait_is_bounded_beyond_a_few_requests():
    admission, clock = make(image=99, max_wait=10)
    slots = serve(admission, clock, every=1.0, num_waiting=15)
    slots.append(admission.enter("image"))  # it may take 16 seconds
    with pytest.raises(Overloaded):
        admission.enter("image")
    for slot in slots:
        slot.__exit__()
    with admission.enter("image"):
        assert admission.num_waiting == 1


@pytest.mark.parametrize(("every", "num_waiting", "seconds"), [(0.5, 9, 5.0), (0.01, 9, 1.0), (30.0, 9, 60.0)])
def test_come_again_when_those_who_wait_are_served(every, num_waiting, seconds):
    admission, clock = make(image=num_waiting + 1)
    serve(admission, clock, every, num_waiting)
    admission.enter("image")
    with pytest.raises(Overloaded) as refused:
        admission.enter("image")
    assert refused.value.retry_after == pytest.approx(seconds, rel=0.15)


def test_not_all_come_again_at_once():
    admission = Admission(AdmissionLimits({"text": 0, "image": 0}, 1))
    times = []
    for _ in range(50):
        with pytest.raises(Overloaded) as refused:
            admission.enter("text")
        times.append(refused.value.retry_after or 0.0)
    assert len(set(times)) > 40
    assert 0.75 <= min(times) < max(times) <= 1.25


def test_a_stall_makes_the_wait_longer():
    admission, clock = make(image=99)
    serve(admission, clock, every=0.1, num_waiting=4)
    admission.enter("image", seconds_left=1.0)
    clock.now += 30.0
    with pytest.raises(Overloaded):
        admission.enter("image", seconds_left=5.0)


def test_a_rest_counts_for_nothing():
    admission, clock = make(image=99)
    for slot in serve(admission, clock, every=0.1, num_waiting=4):
        slot.__exit__()
    clock.now += 1000.0
    admission.enter("image")
    admission.enter("image", seconds_left=0.5)
