"""What no simulation may break: conservation, and the laws of queues."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.arrivals import ClosedLoop, OpenLoop
from benchmarks.simulator.hardware import VisionPoint, VisionRates
from benchmarks.simulator.jobs import Image, Job
from benchmarks.simulator.lanes import Busy, Clock, Lane
from benchmarks.simulator.pipeline import Burst, Cards, Layout, Loss, Pipeline, Scenario, simulate
from benchmarks.simulator.vision import VisionServer
from benchmarks.workload import Lengths, Size, Workload, fixed
from tests.benchmarks.simulator.conftest import TILE_S, round_card

FOREVER = 1e9


@st.composite
def runs(draw):
    """Any small system under any short load, with whatever can happen to it."""
    layout = Layout(draw(st.integers(0, 3)), draw(st.integers(1, 3)))
    workload = Workload(
        image_sizes=((Size(448, 448), 1.0), (Size(896, 896), 1.0)),
        images_per_request=Lengths(0, draw(st.integers(0, 3))),
        image_reuse_ratio=draw(st.sampled_from([0.0, 0.5])),
        input_tokens=Lengths(1, draw(st.integers(1, 300))),
        output_tokens=Lengths(1, draw(st.integers(1, 60))),
    )
    groups = [name for name, number in (("vision", layout.num_vision), ("language", layout.num_language)) if number > 1]
    scenario = Scenario(
        workload,
        draw(st.one_of(st.builds(OpenLoop, st.floats(0.5, 20)), st.builds(ClosedLoop, st.integers(1, 8)))),
        seconds=5,
        vir_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        loss=draw(st.builds(Loss, st.sampled_from(groups), st.floats(0.1, 4)))
        if groups and draw(st.booleans())
        else None,
        burst=draw(st.one_of(st.none(), st.builds(Burst, st.integers(1, 10), st.floats(0, 4)))),
        seed=draw(st.integers(0, 100)),
    )
    card = round_card(kv_tokens=draw(st.sampled_from([5000, 100_000])), max_num_seqs=draw(st.sampled_from([2, 64])))
    return Pipeline(layout, Cards(card, card), scenario)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_every_request_ends_once_and_nothing_is_lost(pipeline):
    servers, counted = [*pipeline.language], pipeline._count

    def count(change):
        """At every arrival and every end: no queue below zero, no KV memory beyond its size."""
        counted(change)
        assert pipeline.num_inside >= 0
        assert all(server.load >= 0 for server in (*pipeline.vision, *pipeline.language))
        assert all(0 <= server._kv_tokens <= pipeline._rates.kv_tokens for server in servers)

    pipeline._count = count
    outcome = pipeline.run()
    assert pipeline.num_inside == 0
    assert all(job.ended_at is not None for job in pipeline.jobs)
    assert len({job.number for job in pipeline.jobs}) == len(pipeline.jobs) == outcome.num_requests
    # Little's law on the sample path: the integral of those inside is the sum of their times inside.
    times = [job.ended_at - job.arrived_at for job in pipeline.jobs]
    assert pipeline.inside_s == pytest.approx(sum(times))
    for job in pipeline.jobs:
        assert job.arrived_at <= job.first_at <= job.ended_at
        assert all(image.num_there == image.num_sent == image.num_tiles for image in job.images)
        assert job.num_read == job.prompt_tokens
    assert sum(server.num_tokens_out for server in servers) == sum(job.num_answered for job in pipeline.jobs)
    assert all(server.load == 0 for server in (*pipeline.vision, *pipeline.language))
    assert all(0 <= share <= 1 + 1e-9 for share in outcome.utilisation.values())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_a_vision_server_never_idles_while_tiles_wait(seed, images):
    """Work conservation: all there at once, it is done after as long as the tiles take, however they are batched."""
    clock, busy, delivered = Clock(), Busy(0, FOREVER), []
    rates = round_card().vision_part()
    server = VisionServer(clock, rates, busy, lambda job, image, num_tiles: delivered.append(num_tiles))
    for number, num_tiles in enumerate(images):
        image = Image(num_tiles)
        server.submit(Job(number, 1, 1, [image]), image, num_tiles)
    clock.run()
    assert sum(delivered) == sum(images)
    assert clock.now == pytest.approx(busy.seconds) == pytest.approx(TILE_S * sum(images))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_vision_server_with_batches_of_one_is_m_d_1(load):
    """Mean wait of M/D/1: load / (2 (1 - load)) services (Pollaczek and Khinchine)."""
    clock, rng = Clock(), np.random.default_rng(0)
    rates = VisionRates(max_batch=1, tiles=(VisionPoint(batch=1, tiles_per_s=1.0),))
    arrived, waits = {}, []
    server = VisionServer(
        clock, rates, Busy(0, FOREVER), lambda job, image, num_tiles: waits.append(clock.now - 1 - arrived[job])
    )
    gaps = iter(rng.exponential(1 / load, 20_000))

    def arrive():
        image = Image(1)
        job = Job(len(arrived), 1, 1, [image])
        arrived[job] = clock.now
        server.submit(job, image, 1)
        if (gap := next(gaps, None)) is not None:
            clock.after(gap, arrive)

    arrive()
    clock.run()
    assert len(waits) == len(arrived) == 20_001
    assert np.mean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.1)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_lane_is_m_m_1(load):
    """Mean wait of M/M/1: load / (1 - load) services."""
    clock, rng = Clock(), np.random.default_rng(1)
    lane, waits = Lane(clock, Busy(0, FOREVER)), []
    gaps = iter(rng.exponential(1 / load, 40_000))

    def arrive():
        service = rng.exponential(1.0)
        waits.append(lane.take(service) - service)
        if (gap := next(gaps, None)) is not None:
            clock.after(gap, arrive)

    arrive()
    clock.run()
    assert min(waits) >= -1e-9
    assert np.mean(waits) == pytest.approx(load / (1 - load), rel=0.1)


def test_utilisation_is_the_load():
    """Utilisation law: rate x seconds of service, for each group that is not the limit."""
    workload = Workload(input_tokens=fixed(100), output_tokens=fixed(1))
    card = round_card()
    outcome = simulate(Layout(2, 1), Cards(card, card), Scenario(workload, OpenLoop(10.0), 400, warmup=20))
    assert outcome.requests_per_s == pytest.approx(10, rel=0.05)
    assert outcome.utilisation["vision"] == pytest.approx(outcome.requests_per_s * TILE_S / 2, rel=0.03)
    assert outcome.utilisation["language"] == pytest.approx(outcome.requests_per_s * 356 * 1e-4, rel=0.03)


@pytest.mark.parametrize("layout", [Layout(0, 2), Layout(1, 1), Layout(2, 1), Layout(1, 2)], ids=str)
def test_a_faster_card_never_lowers_throughput(layout):
    rates = []
    for speed in (1.0, 1.3, 2.0):
        card = round_card(speed)
        scenario = Scenario(Workload(output_tokens=fixed(16)), ClosedLoop(16), 60, warmup=5)
        rates.append(simulate(layout, Cards(card, card), scenario).requests_per_s)
    assert rates == sorted(rates)
    assert rates[2] == pytest.approx(2 * rates[0], rel=0.05)
