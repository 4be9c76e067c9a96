"""Cards: read back as they were written, refused with the reason, and never faster for more work."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.hardware import HardwareCard, Line, Surface
from common.service.errors import ConfigError

LANGUAGE: dict[str, Any] = {
    "kv_tokens": 1000,
    "bytes_per_token": 512,
    "prefill": [{"length": 100, "tokens_per_s": 1000}, {"length": 200, "tokens_per_s": 800}],
    "decode": [{"batch": b, "context": c, "step_s": 0.01 * b + c / 1e5} for b in (1, 8) for c in (100, 1000)],
}
CARD = {
    "name": "a card",
    "model": "nano",
    "source": {"kind": "measured", "text": "dvd profile"},
    "hardware": "2 cores",
    "vision": {"tiles": [{"batch": 1, "tiles_per_s": 10}, {"batch": 4, "tiles_per_s": 20}]},
    "language": LANGUAGE,
    "transports": {"tcp": {"gb_per_s": 2, "latency_s": 0.001}},
    "router": {"s_per_request": 0.001},
}
SECONDS = st.floats(1e-4, 10)
SIZES = st.floats(0.1, 1e5)


def card(**changes):
    return HardwareCard.from_json(json.dumps(CARD | changes))


def test_a_card_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(card().to_json())
    assert HardwareCard.load(path) == card()


def test_seconds_lie_on_a_line_between_two_points():
    vision, language = card().vision_part(), card().language_part()
    assert [vision.batch_seconds(size) for size in (1, 4)] == pytest.approx([0.1, 0.2])
    assert vision.batch_seconds(2) == pytest.approx(0.1 + 0.1 / 3)
    assert vision.batch_seconds(8) == pytest.approx(0.4)  # at the last rate
    assert language.prefill_seconds(150) == pytest.approx((0.1 + 0.25) / 2)
    assert language.decode_seconds(4.5, 550) == pytest.approx(0.045 + 0.0055)
    assert card().transport("tcp").seconds(2e9) == pytest.approx(1.001)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": None, "language": None}, "vision, language or both"),
        ({"vision": {"tiles": []}}, "vision.tiles"),
        ({"vision": {"tiles": [{"batch": 1, "tiles_per_s": 0}]}}, "vision.tiles.0.tiles_per_s.*given: 0"),
        ({"vision": {"tiles": [{"batch": 1, "tiles_per_s": 1}] * 2}}, "two points for the same size"),
        ({"format": 2}, "format.*given: 2"),
        ({"colour": "red"}, "colour"),
        (
            {"language": LANGUAGE | {"decode": LANGUAGE["decode"][1:]}},
            "batch 1 has none for 100",
        ),
    ],
)
def test_a_wrong_card_is_refused_with_the_key(changes, said):
    with pytest.raises(ConfigError, match=said):
        card(**changes)


def test_what_is_not_on_a_card_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no vision figures"):
        card(vision=None).vision_part()
    with pytest.raises(ConfigError, match="rdma: card a card has tcp"):
        card().transport("rdma")
    with pytest.raises(ConfigError, match="No such file"):
        HardwareCard.load(tmp_path / "none.json")


@given(st.dictionaries(SIZES, SECONDS, min_size=1, max_size=6), SIZES, SIZES)
def test_more_never_takes_less(points, one, other):
    line = Line.through(points.items())
    assert line.at(min(one, other)) <= line.at(max(one, other)) * (1 + 1e-9)


@given(st.data())
def test_more_sequences_and_longer_ones_never_take_less(data):
    batches = data.draw(st.lists(SIZES, min_size=1, max_size=4, unique=True))
    lengths = data.draw(st.lists(SIZES, min_size=1, max_size=4, unique=True))
    surface = Surface.through((b, n, data.draw(SECONDS)) for b in batches for n in lengths)
    (batch, more), (length, longer) = (sorted(data.draw(st.tuples(SIZES, SIZES))) for _ in range(2))
    assert surface.at(batch, length) <= surface.at(more, longer) * (1 + 1e-9)
