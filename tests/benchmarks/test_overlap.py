"""The overlap benchmark: what is started, what is asked, and what becomes of the figures."""

import pytest

from benchmarks.overlap import (
    BARRIER,
    NUM_TILES,
    STREAMED,
    make_plan,
    make_shape,
    make_systems,
    make_table,
    ratios,
    read,
)
from benchmarks.plan import Phase, Source
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.samples import Failure, PhaseResult, Result
from common.model.config import load_config
from common.model.geometry import count_tiles
from common.service.errors import Unavailable
from deploy.settings import ServeSettings
from tests.benchmarks.conftest import sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("overlap") / "model"
    write_checkpoint(path, make_shape(1, 1))
    return path


def test_both_systems_are_the_same_but_for_the_barrier(model):
    settings = [
        ServeSettings.model_validate({"model": str(model), **s.options}) for s in make_systems(model, 0, 1, "auto")
    ]
    streamed, barrier = (own.model_dump() for own in settings)
    assert {name for name in streamed if streamed[name] != barrier[name]} == {"streamed_prefill"}
    assert (settings[0].vision_cores, settings[0].language_cores) == ([0], [1])
    assert [own.streamed_prefill for own in settings] == [True, False]


def test_a_picture_has_ten_tiles_and_the_first_one_is_not_counted(model):
    plan = make_plan(6)
    assert [phase.sources[0].num_requests for phase in plan.phases] == [1, 6]
    for phase in plan.phases:
        ((size, share),) = phase.sources[0].workload.image_sizes
        assert (count_tiles(size.width, size.height, load_config(model).tiling), share) == (NUM_TILES, 1.0)
        assert phase.sources[0].workload.text_only_share == 0


def run_of(*ttfts, failure=None):
    told = {"encode_ms": 400.0, "prefill_ms": 450.0, "feature_wait_ms": 410.0, "tiles": 10}
    samples = [sample(1.0, ttft, metrics={"dvd": told}, failure=failure) for ttft in ttfts]
    plan = make_plan(len(ttfts))
    source: Source = plan.phases[-1].sources[0]
    measured = PhaseResult(Phase("measured", (source,)), 0.0, 10.0, samples)
    warm_up = PhaseResult(plan.phases[0], 0.0, 1.0, [sample(0.1, 9.0)])
    return Result(plan, "http://x", "overlap", "now", 0.0, [warm_up, measured])


def records_of(streamed, barrier):
    records = []
    for name, ttfts in ((STREAMED, streamed), (BARRIER, barrier)):
        records += [{"system": name, **read(None, run_of(ttft))} for ttft in ttfts]
    return records


def test_medians_of_a_run_leave_the_warm_up_out():
    found = read(None, run_of(0.5, 0.6, 3.0))
    assert found["ttft_ms"] == pytest.approx(600)
    assert (found["encode_ms"], found["prefill_ms"], found["tiles"]) == (400.0, 450.0, 10.0)
    assert len(found["samples"]) == 3


def test_ratios_are_of_neighbours():
    records = records_of([0.6, 1.0], [1.0, 1.25])
    assert ratios(records) == pytest.approx([0.6, 0.8])
    table = make_table(records)
    assert [row[:2] for row in table.rows] == [[STREAMED, "800"], [BARRIER, "1125"]]
    assert "median 0.70 of 2 rounds, 0.60 to 0.80" in table.notes[0]


def test_a_failed_request_spoils_the_run():
    with pytest.raises(Unavailable, match="a request failed: timeout"):
        read(None, run_of(0.5, failure=Failure("timeout")))
