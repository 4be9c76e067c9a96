"""The bounds at the door, without a server."""

import pytest

from common.service.errors import Overloaded
from router.admission import Admission


def test_classes_have_their_own_places():
    admission = Admission({"text": 1, "image": 1}, 100)
    with admission.enter("image"):
        with pytest.raises(Overloaded) as refused:
            admission.enter("image")
        assert (refused.value.code, refused.value.retry_after) == ("overloaded", 1.0)
        with admission.enter("text"):
            assert admission.num_waiting == admission.num_running == 2
    assert admission.num_waiting == admission.num_running == 0


def test_the_first_token_frees_the_place_once():
    admission = Admission({"text": 1, "image": 1}, 100)
    with admission.enter("text") as slot:
        slot.first_token()
        slot.first_token()
        assert (admission.num_waiting, admission.num_running) == (0, 1)
        with admission.enter("text"):
            assert (admission.num_waiting, admission.num_running) == (1, 2)
    assert (admission.num_waiting, admission.num_running) == (0, 0)


def test_a_failure_gives_everything_back():
    admission = Admission({"text": 1, "image": 1}, 100)
    with pytest.raises(ZeroDivisionError), admission.hold(50) as held, admission.enter("text"):
        held.grow(20)
        assert admission.held_bytes == 70
        raise ZeroDivisionError
    assert admission.held_bytes == admission.num_running == admission.num_waiting == 0


def test_bytes_are_bounded_over_all_requests():
    admission = Admission({"text": 9, "image": 9}, 100)
    with admission.hold(60) as first:
        with pytest.raises(Overloaded), admission.hold(0) as second:
            second.grow(41)
        first.grow(40)
        with pytest.raises(Overloaded):
            first.grow(1)
    assert admission.held_bytes == 0


def test_one_request_alone_may_be_as_large_as_its_own_cap_allows():
    admission = Admission({"text": 1, "image": 1}, 100)
    with admission.hold(0) as held:
        held.grow(500)
        assert admission.held_bytes == 500
