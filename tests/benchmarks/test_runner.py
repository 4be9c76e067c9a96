"""A plan is carried out: as many requests as were asked for, no more at a time than allowed, and none forgotten."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from benchmarks.arrivals import ClosedLoop, OpenLoop, Recorded, Replay
from benchmarks.measures import summarize
from benchmarks.plan import Phase, Plan, Source, Target
from benchmarks.runner import Progress, run_plan
from benchmarks.samples import Result
from benchmarks.workload import Size, Workload, fixed
from common.service.errors import Unavailable
from tests.benchmarks.conftest import DEADLINE, TEXT, MisbehavingServer

TINY_IMAGES = Workload(((Size(64, 64), 1.0),), input_tokens=fixed(16), output_tokens=fixed(2))
AT_ONCE = OpenLoop(float("inf"))


def text(arrivals, number: int | None = None, name: str = "text", **options) -> Source:
    return Source(name, arrivals, replace(TEXT, options=options), number)


class Watcher:
    """An observer that keeps what it is shown."""

    def __init__(self) -> None:
        self.progress = Progress()

    @contextlib.asynccontextmanager
    async def watching(self, progress: Progress) -> AsyncIterator[None]:
        self.progress = progress
        yield


async def run(server: MisbehavingServer, *phases: Phase, watcher: Watcher | None = None) -> Result:
    return await run_whole(server, Plan(phases), watcher)


async def run_whole(server: MisbehavingServer, plan: Plan, watcher: Watcher | None = None) -> Result:
    async with asyncio.timeout(DEADLINE):
        return await run_plan(plan, Target(server.url), watcher)


def asked(server: MisbehavingServer) -> list[dict]:
    """Bodies without those tried first."""
    return server.bodies[1:]


@pytest.mark.parametrize(
    "arrivals", [ClosedLoop(3), AT_ONCE, OpenLoop(2000.0), OpenLoop(2000.0, 0.5, max_concurrency=2)], ids=str
)
async def test_as_many_as_asked_for(server, arrivals):
    result = await run(server, Phase("load", (text(arrivals, 20),)))
    (phase,) = result.phases
    assert len(phase.samples) == 20 == len(asked(server))
    assert all(sample.is_ok and sample.sent_at >= phase.opened_at for sample in phase.samples)
    assert max(sample.ended_at for sample in phase.samples) <= phase.closed_at
    assert len({body["messages"][0]["content"][0]["text"] for body in server.bodies}) == 21
    assert {body["model"] for body in server.bodies} == {"misbehaving"} == {result.model}


@pytest.mark.parametrize(
    ("arrivals", "most"), [(ClosedLoop(3), 3), (replace(AT_ONCE, max_concurrency=4), 4), (AT_ONCE, 12)], ids=str
)
async def test_requests_at_a_time(server, arrivals, most):
    running = asyncio.create_task(run(server, Phase("load", (text(arrivals, 12, behaviour="held"),))))
    await until(lambda: server.num_open == 1)  # the one that is tried first
    server.release_held()
    await until(lambda: server.num_open == most)
    server.released.set()
    result = await running
    assert server.most_open == most
    assert summarize(result.phases[0])[0].peak_in_flight == most


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_the_cap_holds_back_is_measured(server):
    result = await run(server, Phase("load", (text(replace(AT_ONCE, max_concurrency=1), 10),)))
    queues = sorted(sample.queue for sample in result.phases[0].samples)
    assert queues[-1] > queues[0] >= 0
    first, last = result.phases[0].samples[0], result.phases[0].samples[-1]
    assert last.queue >= first.e2e
    assert all(sample.sent_at - sample.scheduled_at >= sample.queue for sample in result.phases[0].samples)


async def test_a_trace_decides_times_and_lengths(server):
    trace = Replay((Recorded(0.0, 20, 5), Recorded(0.1, 40, 7)), speed=10.0)
    result = await run(server, Phase("load", (text(trace),)))
    assert [body["max_tokens"] for body in server.bodies] == [5, 5, 7]
    words = [len(body["messages"][0]["content"][0]["text"].split()) for body in asked(server)]
    assert words == [13, 33]
    first, second = result.phases[0].samples
    assert second.scheduled_at - first.scheduled_at == pytest.approx(0.01)


async def test_by_duration_what_is_on_its_way_is_waited_for(server):
    watcher = Watcher()
    phase = Phase("load", (text(AT_ONCE, 3, behaviour="held"),), 0.2)
    running = asyncio.create_task(run(server, phase, watcher=watcher))
    await until(lambda: server.num_open == 1)
    server.release_held()
    await until(lambda: watcher.progress.is_draining)
    assert server.num_open == 3
    server.released.set()
    (found,) = (await running).phases
    assert found.seconds >= 0.2
    assert all(sample.is_ok and sample.ended_at > found.closed_at for sample in found.samples)
    (summary,) = summarize(found)
    assert (summary.num_sent, summary.num_late, summary.num_completed, summary.requests_per_s) == (3, 3, 0, 0.0)


async def test_arrivals_that_were_never_sent_are_told(server):
    watcher = Watcher()
    phase = Phase("load", (text(OpenLoop(1000.0, max_concurrency=1), behaviour="held"),), 0.2)
    running = asyncio.create_task(run(server, phase, watcher=watcher))
    await until(lambda: server.num_open == 1)
    server.release_held()
    await until(lambda: watcher.progress.is_draining)
    server.released.set()
    (found,) = (await running).phases
    assert len(found.samples) == 1
    assert found.num_unsent["text"] > 0


async def test_a_source_beside_others_goes_on_until_all_have_theirs(server):
    sources = (text(ClosedLoop(2), 4, "few"), text(ClosedLoop(1), 30, "many"))
    (phase,) = (await run(server, Phase("load", sources))).phases
    counts = Counter(sample.source for sample in phase.samples)
    assert counts["many"] >= 30
    assert counts["few"] > 4


async def test_the_warm_up_is_load_that_is_not_measured(server):
    (phase,) = (await run(server, Phase("load", (text(ClosedLoop(2), 10),), warmup=0.1))).phases
    before = [sample for sample in phase.samples if sample.scheduled_at < phase.opened_at]
    assert before
    assert len(phase.samples) - len(before) == 10
    assert summarize(phase)[0].num_sent == 10


async def test_phases_differ_in_their_requests(server):
    source = Source("images", ClosedLoop(1), TINY_IMAGES, 5)
    result = await run(server, Phase("one", (source,)), Phase("two", (source,)))
    assert [phase.phase.name for phase in result.phases] == ["one", "two"]
    images = {body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies}
    assert len(images) == 11


async def test_the_same_seed_and_salt_ask_the_same_and_no_other(server):
    phase = Phase("load", (Source("images", ClosedLoop(1), TINY_IMAGES, 3),))
    asked_for = []
    plans = (Plan((phase,), salt=1), Plan((phase,), salt=1), Plan((phase,), salt=2), Plan((phase,), 1, salt=1))
    for plan in (*plans, Plan((phase,)), Plan((phase,))):
        await run_whole(server, plan)
        asked_for.append([json.dumps(body["messages"]) for body in server.bodies])
        server.bodies = []
    first, again, *others = asked_for
    assert first == again
    everything = [message for messages in (first, *others) for message in messages]
    assert len(set(everything)) == len(everything)


async def test_failures_are_kept_and_do_not_end_the_run(server):
    # The first good one lets the run begin.
    source = replace(text(ClosedLoop(2), 6), name="bad")
    behaviours = iter(["good", "overloaded", "cut", "error_event", "good", "no_finish", "good"])
    original = server._chat

    async def chat(writer, body):
        return await original(writer, {**body, "behaviour": next(behaviours)})

    server._chat = chat
    (summary,) = summarize((await run(server, Phase("load", (source,)))).phases[0])
    assert (summary.num_sent, summary.num_failed, summary.num_completed) == (6, 4, 2)
    assert set(summary.failures) == {
        "http_status 503 overloaded",
        "protocol cut",
        "error_event worker_unavailable",
        "no_finish_reason",
    }


async def test_a_server_that_fails_the_first_request_is_not_loaded(server):
    with pytest.raises(Unavailable, match=r"the first request \(text\) failed: http_status 503 overloaded: come later"):
        await run(server, Phase("load", (text(ClosedLoop(1), 5, behaviour="overloaded"),)))
    assert len(server.bodies) == 1


async def test_an_observer_sees_the_run(server):
    watcher = Watcher()
    await run(server, Phase("load", (text(ClosedLoop(1), 5),)), watcher=watcher)
    seen = watcher.progress
    assert (seen.phase, seen.num_done, seen.num_requests, seen.num_in_flight) == ("load", 5, 5, 0)


def test_plans_that_never_end_or_mix_up_sources():
    with pytest.raises(ValueError, match="nothing ends it"):
        Phase("load", (text(ClosedLoop(1)),))
    with pytest.raises(ValueError, match="different names"):
        Phase("load", (text(ClosedLoop(1)), text(ClosedLoop(2))), 1.0)
