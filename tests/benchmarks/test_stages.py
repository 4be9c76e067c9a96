"""A time to first token is the sum of its parts, each moment counted once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.stages import PARTS, STAGES, mean_parts, server_stages, split_ttft
from tests.benchmarks.conftest import sample

milliseconds = st.none() | st.floats(0, 1e4)
reports = st.fixed_dictionaries({**dict.fromkeys(STAGES, milliseconds), "images": st.integers(0, 2)})


@settings(deadline=None)
@given(st.floats(0, 1e4), reports)
def test_parts_add_up(ttft, stages):
    parts = split_ttft(ttft, stages)
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == pytest.approx(ttft, abs=1e-6)
    assert min(parts.values()) >= 0


def test_text():
    stages = {"language_queue_ms": 3.0, "prefill_ms": 8.0, "feature_wait_ms": 0.0, "images": 0}
    parts = split_ttft(14.0, stages)
    assert {name: value for name, value in parts.items() if value} == {"language queue": 3, "prefill": 8, "other": 3}


def test_an_image_is_waited_for_while_the_language_server_prefills_what_is_there():
    stages = {
        "fetch_ms": 1.0,
        "decode_ms": 10.0,
        "vision_queue_ms": 5.0,
        "encode_ms": 50.0,
        "transfer_ms": 40.0,
        "feature_wait_ms": 70.0,
        "language_queue_ms": 2.0,
        "prefill_ms": 80.0,
        "images": 1,
    }
    assert split_ttft(90.0, stages) == {
        "fetch": 1,
        "decode": 10,
        "vision queue": 5,
        "encode": 50,
        "transfer": 5,  # the rest of it was hidden behind encoding
        "language queue": 0,  # over before the features were there
        "prefill": 12,
        "other": 7,
    }


def test_features_that_were_there_already():
    stages = {"feature_wait_ms": 0.0, "language_queue_ms": 1.0, "prefill_ms": 9.0, "images": 1}
    assert split_ttft(11.0, stages)["prefill"] == 9


def test_groups_by_speed():
    def told(ttft: float):
        return sample(0.0, ttft, metrics={"dvd": {"images": 0, "prefill_ms": 1e3 * ttft}})

    assert list(mean_parts([told(1.0)] * 3)) == ["all"]
    groups = mean_parts([told(1.0)] * 15 + [told(3.0)] * 5)
    assert {name: parts["prefill"] for name, parts in groups.items()} == {
        "all": 1500,
        "fastest 50 %": 1000,
        "slowest 10 %": 3000,
    }


def test_a_peer_tells_nothing():
    assert server_stages(sample(0.0, metrics={"dvd": None})) == {}
    assert mean_parts([sample(0.0)]) == {}
