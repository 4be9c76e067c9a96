"""The benchmark of overload sees what it is for: what is refused, how fast, and what the others did meanwhile."""

import time

import pytest
from rich.console import Console

from benchmarks.overload import Outcome, Phase, Report, measure, open_loop, shown
from benchmarks.serve import print_table
from deploy.local import LocalDeployment
from deploy.settings import ServeSettings


async def test_a_small_system_says_no_and_goes_on():
    settings = ServeSettings.model_validate({"model": "nano", "port": 0, "threads": 1, "max_num_queued_image_reqs": 1})
    with LocalDeployment(settings) as deployment:
        report = await measure(deployment.address, seconds=4.0, factor=8.0, text_rate=2.0, clients=[1])
    assert report.num_clients == 1
    assert {each.status for each in report.overload.images} == {200, 503}
    assert {each.status for each in [*report.peak.images, *report.peak.texts, *report.overload.texts]} == {200}
    assert all(each.retry_after_ms for each in report.overload.images if each.status == 503)
    marks = ("goodput", "refusals take", "text takes")  # of a loaded machine in four seconds
    assert [failure for failure in report.failures if not failure.startswith(marks)] == []
    print_table(Console(quiet=True), shown(report))


def phase(num_answered: int, refusal: Outcome, text_seconds: float) -> Phase:
    answered = [Outcome(200, 0.1 * index, 0.05) for index in range(num_answered)]
    return Phase(10.0, [*answered, refusal], [Outcome(200, 1.0, text_seconds)])


def test_what_is_not_as_it_must_be_is_told():
    quick = Outcome(503, 5.0, 0.004, 1000)
    good = Report(4, {}, phase(50, quick, 0.1), phase(48, quick, 0.12))
    assert good.failures == []
    assert good.goodput_ratio == pytest.approx(0.96)
    assert good.text_ratio == pytest.approx(1.2)
    bad = Report(4, {}, phase(50, quick, 0.1), phase(40, Outcome(503, 5.0, 0.02), 0.2))
    bad.overload.texts.append(Outcome(0, 2.0, 0.1))
    assert len(bad.failures) == 6
    assert bad.figures["overload"]["rejection_ms"] == pytest.approx(20.0)


async def test_what_is_late_does_not_move_what_comes_after():
    times: list[float] = []

    async def ask() -> Outcome:
        times.append(time.perf_counter())
        return Outcome(200, 0.0, 0.0)

    started = time.perf_counter()
    assert len(await open_loop(ask, rate=50, seconds=0.5)) == 25
    assert times[-1] - started >= 0.45
