"""The soak sees what it is for: requests end as they must, nothing is held, and memory that grows is told."""

import pytest
from rich.console import Console

from benchmarks import soak
from benchmarks.serve import print_table
from benchmarks.soak import BATCH, Ask, Report, serve_settings, shown
from benchmarks.workload import chat_body
from deploy.local import LocalDeployment


@pytest.fixture(scope="module")
def deployment():
    with LocalDeployment(serve_settings("nano")) as running:
        yield running


def test_random_requests_end_as_they_must(deployment):
    report = soak.soak(deployment, 3 * BATCH)
    assert report.failures == []
    assert sum(report.ends.values()) == 3 * BATCH
    assert report.ends["answered"] > 0
    assert set(report.memory[-1]) == {"vision", "language", "router"}
    print_table(Console(quiet=True), shown(report))


async def test_an_end_that_must_not_be_is_a_failure(deployment):
    report = Report()
    good, bad = chat_body("Hello", [], max_tokens=2), chat_body("Hello", [], n=0)
    await soak._ask_all(deployment, [Ask(good, 400), Ask(bad, 200), Ask(bad, None)], report)
    assert report.ends == {"failed": 3}
    assert [failure.partition(" for ")[0] for failure in report.failures] == [
        "InternalError: status 200",
        "InternalError: status 400",
        "InternalError: status 400",
    ]


def test_growth_counts_from_the_first_quarter():
    memory = [{"language": mib} for mib in (100.0, 300.0, 310.0, 320.0, 350.0)]
    report = Report(memory=memory)
    assert report.growth == {"language": 50.0}
    soak.judge_memory(report)
    assert report.failures == ["language grew by 50 MiB"]
