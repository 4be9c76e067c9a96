"""Row 3: a router dies or stops; the others serve on, and the servers let go of what it had asked for."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.load import Reply, ask_once, number_question
from tests.faults.system import Server, System

pytestmark = pytest.mark.timeout(600)

LEASE = 5.0
"""Seconds after which the work of a router that is gone is dropped."""
NUM_ELSEWHERE = 6
BUSY = 10.0
"""Seconds more that a machine with other work may take."""


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Iterator[System]:
    """Two routers, and one of each of the others: both routers are on the same servers."""
    with System(tmp_path_factory.mktemp("faults"), num_vision=1, num_language=1, num_routers=2) as system:
        yield system


def answers_of(router: Server) -> list[Reply]:
    """What it says while the clients of the other one wait."""

    async def ask() -> list[Reply]:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            url = f"http://{router.address}/v1/chat/completions"
            bodies = [number_question(seed).body("image", f"elsewhere {seed}") for seed in range(NUM_ELSEWHERE)]
            return await asyncio.gather(*(ask_once(client, url, body) for body in bodies))

    return asyncio.run(ask())


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_row_3_only_its_own_requests_are_lost(system, load, story, how):
    workers, victim = ("vision", "language"), system["router-b"]
    load.routers[:] = ["router-b"]
    system.until(lambda: system["router-a"].metrics()["dvd_requests_running"] == 0, "nobody on the other one")
    system["language-a"].arm("language.token=sleep(3)")  # what it has in work lasts longer than the lease
    system.until(lambda: victim.metrics()["dvd_requests_running"] == load.num_clients, "work on it")
    load.hold()
    with story.fault():
        getattr(victim, how)()
        system.until(lambda: not system.held(*workers), lambda: f"held: {system.held(*workers)}", LEASE + BUSY)
        system["language-a"].arm()
        assert [reply.status for reply in answers_of(system["router-a"])] == [200] * NUM_ELSEWHERE
        victim.mend()
        system.until_ready()
    load.routers[:] = ["router-a", "router-b"]
    load.go_on()
    story.recovery()
    report = story.report
    lost = [outcome for outcome in report.outcomes if outcome.state != "right"]
    strange = [outcome for outcome in lost if outcome.router != "router-b" or outcome.state != "failed"]
    assert not strange, f"{report}\n" + "\n".join(map(repr, strange))
    assert len(lost) <= load.num_clients, report
