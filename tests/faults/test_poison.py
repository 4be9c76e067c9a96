"""Row 15: a request that kills whoever works on it is refused after two deaths; its neighbours get their answers."""

import asyncio
import dataclasses
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.load import Reply, ask_once, number_question
from tests.faults.system import System

pytestmark = pytest.mark.timeout(600)

POISON = "poison"


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Iterator[System]:
    """Three of each: after two deaths there is one left to serve the others."""
    with System(tmp_path_factory.mktemp("faults"), num_vision=3, num_language=3) as system:
        yield system


def ask_with_poison(system: System, tier: str) -> Reply:
    """A picture with the word in its bytes, or a question with the word in its text."""

    async def ask() -> Reply:
        body = number_question().body("image", POISON if tier == "vision" else "harmless")
        if tier == "language":
            body["messages"][0]["content"][-1]["text"] += f" ({POISON})"
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            return await ask_once(client, f"{system.routers[0]}/v1/chat/completions", body)

    return asyncio.run(ask())


@pytest.mark.parametrize(("tier", "place"), [("vision", "vision.encode.before"), ("language", "language.admit")])
def test_row_15_two_deaths_and_no_more(system, story, tier, place):
    for server in system.of(tier):
        server.arm(f"{place}=kill:has({POISON})")
    with story.fault():
        first = ask_with_poison(system, tier)
        second = ask_with_poison(system, tier)
        story.go_on()
        alive = [server for server in system.of(tier) if server.is_running]
        system.mend()
    story.recovery()
    for reply in (first, second):
        assert (reply.status, "request_quarantined" in reply.error) == (400, True), dataclasses.asdict(reply)
    assert len(alive) == 1
    story.report.assert_no_harm()
