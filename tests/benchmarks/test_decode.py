"""The benchmark of decoding compares equal pixels, and says so."""

from benchmarks.decode import PILLOW, WORKER, by_stage, comparison, measure


async def test_both_ways_are_measured_in_every_round():
    found = await measure(1000, 700, 4, num_rounds=2)
    assert found["tiles"] == 5
    assert {name: len(times) for name, times in found["ms"].items()} == {PILLOW: 2, WORKER: 2}
    assert all(time > 0 for times in found["stages_ms"].values() for time in times)
    assert len(found["hop_ms"]["448 x 448 in a worker"]) == 10


def test_the_ratio_is_that_of_the_medians():
    found = {
        "image": "1x1 JPEG",
        "bytes": 1,
        "tiles": 1,
        "ms": {PILLOW: [30.0, 20.0, 90.0], WORKER: [10.0, 15.0, 12.0]},
    }
    assert comparison(found).rows[0] == ["median, ms", "30", "12", "2.50 x"]
    assert comparison(found).rows[1] == ["fastest, ms", "20", "10", "2.00 x"]
    assert by_stage(found | {"stages_ms": {"a": [1.0, 3.0]}, "hop_ms": {}}).rows == [["a", "2", "1"]]
