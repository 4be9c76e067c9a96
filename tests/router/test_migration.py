"""A language server is lost while it answers: the client gets what it would have got, to the byte."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.service.errors import InternalError, Overloaded, Unavailable
from router.record import RequestRecord
from tests.router.conftest import System, error_of, png, running_system, user
from tests.router.fakes import FakeLanguage, digest

SAID = "one two three four five six"
QUESTION: dict[str, Any] = {"messages": [user(SAID)], "request_id": "same", "logprobs": True, "top_logprobs": 2}
PICTURE: dict[str, Any] = {"messages": [user(png(), "what is it?")], "request_id": "same"}
STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
NUM_STREAMS = 16
NUM_TOKENS = 1 + len(SAID.split())


class Relayed:
    """Counts what the router has passed on, so that a connection breaks when nothing is under way on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num = 0
        for name in ("token", "choice_finished"):
            monkeypatch.setattr(RequestRecord, name, self._counting(getattr(RequestRecord, name)))

    async def wait_for(self, languages: list[FakeLanguage]) -> None:
        async with asyncio.timeout(10):
            while self.num < sum(language.num_said for language in languages):
                await asyncio.sleep(0.001)

    def _counting(self, method: Any) -> Any:
        def counted(record: RequestRecord, message: Any) -> None:
            method(record, message)
            self.num += 1

        return counted


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``async with losing(loss, ...) as system``: its language servers are lost one after the other, whichever gets the
    request, each as told; ``then`` is called with the system at every loss."""

    @asynccontextmanager
    async def running(
        *losses: dict[str, Any], num_language: int = 0, then: Any = lambda system: None, **options: Any
    ) -> AsyncIterator[System]:
        rest = iter(losses)
        async with running_system(num_language=num_language or len(losses) + 1, **options) as system:
            relayed = Relayed(monkeypatch)

            async def on_break() -> None:
                await relayed.wait_for(system.languages)
                set_faults(system, next(rest, {}))
                then(system)

            set_faults(system, next(rest, {}))
            for language in system.languages:
                language.on_break = on_break
            yield system
            await system.until_idle()
            assert all(worker.load == 0 for worker in system.router.fleet.workers)

    return running


def set_faults(system: System, loss: dict[str, Any]) -> None:
    for language in system.languages:
        vars(language).update({"break_after": None, "breaks_before_end": False, "breaks_behind_end": False, **loss})


def same(response: httpx.Response) -> str:
    """What must not depend on losses: everything but the second in which it happened."""
    return re.sub(r'"created": ?\d+', "", response.text)


async def undisturbed(**body: Any) -> str:
    async with running_system() as system:
        return same(await system.chat(**body))


async def metric(system: System, name: str, **labels: str) -> float:
    text = (await system.http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def answering(system: System) -> list[FakeLanguage]:
    """Servers that were asked, and how often."""
    return [language for language in system.languages for _ in language.requests]


LOSSES = {
    **{f"after {k} tokens": {"break_after": k} for k in range(NUM_TOKENS)},
    "before the end is told": {"breaks_before_end": True},
    "behind the end": {"breaks_behind_end": True},
}


@pytest.mark.parametrize("stream", [{}, STREAMED], ids=["whole", "streamed"])
@pytest.mark.parametrize("loss", LOSSES)
async def test_a_lost_server_costs_nothing(losing, loss, stream):
    body = {**QUESTION, **stream, "return_token_ids": True}
    async with losing(LOSSES[loss]) as system:
        response = await system.chat(**body)
        assert response.status_code == 200
        assert len(answering(system)) == (1 if loss == "behind the end" else 2)
    assert same(response) == await undisturbed(**body)


@pytest.mark.parametrize("stream", [{}, STREAMED], ids=["whole", "streamed"])
async def test_choices_go_on_where_each_of_them_was(losing, stream):
    """One has ended: nothing of it is computed or said again."""
    body = {**QUESTION, **stream, "n": 2}
    texts = []
    for losses in ([], [{"break_after": 4}], [{"break_after": 2}, {"break_after": 5}]):
        async with losing(*losses) as system:
            for language in system.languages:
                language.num_words = [3, 6]
            texts.append(same(await system.chat(**body)))
            told = [
                [(each.choice, len(each.output_token_ids), each.is_finished) for each in request.continuations]
                for language in system.languages
                for request in language.requests
            ]
            assert len(told) == len(losses) + 1
            if len(losses) == 1:
                assert sorted(told) == [[], [(0, 3, True), (1, 4, False)]]
    assert texts[0] == texts[1] == texts[2]


async def test_thoughts_and_what_was_held_back_are_said_once(losing):
    body = {**QUESTION, **STREAMED}
    texts = []
    for losses in ([], [{"break_after": 1}], [{"break_after": 2}], [{"breaks_before_end": True}]):
        async with losing(*losses) as system:
            for language in system.languages:
                language.thoughts, language.held = ["a ", "b "], ("", "!")
            texts.append(same(await system.chat(**body)))
    assert len(set(texts)) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_two_servers_are_lost_in_a_row(losing, stream):
    body = {**QUESTION, "stream": stream}
    async with losing({"break_after": 2}, {"break_after": 5}) as system:
        response = await system.chat(**body)
        ids = {request.request_id for language in system.languages for request in language.requests}
        assert len(ids) == len(answering(system)) == 3  # no handle of a failed attempt is used again
        seeds = {request.sampling.seed for language in system.languages for request in language.requests}
        assert len(seeds) == 1
    assert same(response) == await undisturbed(**body)


async def test_a_fourth_server_is_not_tried(losing):
    async with losing({"break_after": 1}, {"break_after": 2}, {"break_after": 3}, num_language=4) as system:
        given_up = await metric(system, "dvd_replays_total", outcome="given_up")
        response = await system.chat(stream=True, **QUESTION)
        assert error_event(response)["code"] == "worker_unavailable"
        assert await metric(system, "dvd_replays_total", outcome="given_up") == given_up + 1
        assert (await system.chat()).status_code == 200


def error_event(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200
    *_, last, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("event: error\ndata: "))["error"]


@pytest.mark.parametrize("failure", [Unavailable("x", code="draining"), Unavailable("the engine has stopped")])
@pytest.mark.parametrize("after", [0, 3])
async def test_servers_that_give_up_a_request_are_as_good_as_lost(failure, after):
    async with running_system(num_language=2) as system:
        asking = asyncio.create_task(system.chat(**QUESTION))
        (await first_asked(system)).fail_after = (after, failure)
        for language in system.languages:
            language.at_admission.is_open.set()
        assert same(await asking) == await undisturbed(**QUESTION)


async def first_asked(system: System) -> FakeLanguage:
    """Held before it admits, as is every other."""
    for language in system.languages:
        language.at_admission.is_open.clear()
    async with asyncio.timeout(10):
        while not (asked := [each for each in system.languages if each.at_admission.num_entered]):
            await asyncio.sleep(0.01)
    return asked[0]


async def test_what_another_server_would_say_as_well_is_not_tried_again():
    async with running_system(num_language=2) as system:
        for language in system.languages:
            language.fail_after = (2, InternalError("not a number"))
        assert error_event(await system.chat(stream=True, **QUESTION))["code"] == "internal_error"
        assert len(answering(system)) == 1


async def test_a_server_that_would_begin_again_is_not_let(losing, impatience):
    """Of an older version, say: better an error than tokens that come twice."""

    def age(system: System) -> None:
        for language in system.languages:
            language.is_old = True

    async with losing({"break_after": 3}, then=age) as system:
        response = await system.chat(stream=True, **QUESTION)
        assert error_event(response)["code"] == "worker_unavailable"
        assert response.text.count('"delta":') == 1 + 3


async def test_lost_before_it_admits():
    async with running_system(num_language=2) as system:
        asking = asyncio.create_task(system.chat(**QUESTION))
        await (await first_asked(system)).stop()
        for language in system.languages:
            language.at_admission.is_open.set()
        assert same(await asking) == await undisturbed(**QUESTION)
        assert [list(each.requests[0].continuations) for each in system.languages] == [[], []]


async def test_lost_while_its_images_are_encoded():
    """The features are for the lost server alone: the next one gets its own, with its own tickets."""
    async with running_system(num_language=2) as system:
        system.vision.at_encode.is_open.clear()
        asking = asyncio.create_task(system.chat(**PICTURE))
        await system.vision.at_encode.wait_for(lambda gate: gate.num_entered == 1)
        await answering(system)[0].stop()
        await system.vision.at_encode.wait_for(lambda gate: gate.num_entered == 2)
        system.vision.at_encode.is_open.set()
        assert same(await asking) == await undisturbed(**PICTURE)
        assert system.vision.at_encode.num_cancelled == 1
        first, second = system.vision.requests
        assert (first.attempt, second.attempt) == (0, 0)
        assert first.request_id != second.request_id
        assert first.ticket != second.ticket
        assert first.deliver_to != second.deliver_to


@pytest.mark.parametrize("is_resident", [False, True])
async def test_images_of_a_running_reply_are_brought_to_the_next_server_if_it_lacks_them(losing, is_resident):
    async with losing({"break_after": 3}) as system:
        if is_resident:
            for language in system.languages:
                language.keeps_features = True
            messages = [{"role": "user", "content": [*PICTURE["messages"][0]["content"]]}]
            for language in system.languages:
                language.resident = {key: png() for key in await mm_hashes(messages)}
        response = await system.chat(**PICTURE)
        assert digest(png()) in response.text
        assert len(system.vision.requests) == (0 if is_resident else 2)
    assert same(response) == await undisturbed(**PICTURE)


async def mm_hashes(messages: list[Any]) -> list[bytes]:
    async with running_system() as system:
        await system.chat(messages=messages)
        return [image.mm_hash for image in system.language.requests[0].images]


async def test_images_that_cannot_be_brought_again_end_the_reply(losing, impatience):
    """The first server had its features, which says nothing of the second."""

    def refuse(system: System) -> None:
        system.vision.failures = [Unavailable("no") for _ in range(9)]

    async with losing({"break_after": 2}, then=refuse) as system:
        response = await asyncio.wait_for(system.chat(stream=True, **PICTURE), 15)
        assert error_event(response)["code"] == "worker_unavailable"


@pytest.fixture
def impatience(monkeypatch):
    """Nobody waits for a lost server to come back."""
    monkeypatch.setattr("router.language_search.PATIENCE_SECONDS", 0.2)


async def test_nobody_left(losing, impatience):
    async with losing({"break_after": 2}, num_language=1) as system:
        response = await system.chat(**QUESTION)
        assert (response.status_code, error_of(response)["code"]) == (503, "worker_unavailable")
        assert "retry-after" in response.headers


@pytest.mark.parametrize("after", [0, 2])
async def test_the_only_server_comes_back(losing, after):
    """Restarted, it knows nothing of the request, and goes on with it."""
    async with losing({"break_after": after}, num_language=1) as system:
        asking = asyncio.create_task(system.chat(**QUESTION))
        await system.until(lambda: not system.router.fleet.has_language)
        assert not asking.done()
        system.language.incarnation = b"another".ljust(16)
        await system.language.start()
        assert same(await asking) == await undisturbed(**QUESTION)


async def test_the_next_server_has_no_room_at_first(losing):
    """All streams of a lost server want a place in the same moment."""

    def fill(system: System) -> None:
        for language in system.languages:
            language.fail_with = Overloaded("full")

    async with losing({"break_after": 2}, then=fill) as system:
        asking = asyncio.create_task(system.chat(**QUESTION))
        async with asyncio.timeout(10):
            while len(answering(system)) < 2:
                await asyncio.sleep(0.01)
        assert not asking.done()
        for language in system.languages:
            language.change(fail_with=None)
        assert same(await asking) == await undisturbed(**QUESTION)


async def test_all_streams_of_a_lost_server_go_on_at_once(monkeypatch):
    """They said something there, so none of them is suspected of having killed it, and none waits for the others."""
    async with running_system(num_language=2) as system:
        victim, other = system.languages
        victim.words = other.words = SAID.split()
        victim.break_after = 1
        relayed, num_broken = Relayed(monkeypatch), 0

        async def on_break() -> None:
            nonlocal num_broken
            num_broken += 1
            async with asyncio.timeout(10):
                while len(answering(system)) < NUM_STREAMS or num_broken < len(victim.requests):
                    await asyncio.sleep(0.001)
            await relayed.wait_for(system.languages)
            other.at_admission.is_open.clear()

        victim.on_break = on_break
        streams = [
            asyncio.create_task(system.chat(messages=[user(f"{number}")], stream=True)) for number in range(NUM_STREAMS)
        ]
        await other.at_admission.wait_for(lambda gate: gate.num_entered == NUM_STREAMS)
        assert 1 < num_broken < NUM_STREAMS
        other.at_admission.is_open.set()
        for response in await asyncio.gather(*streams):
            assert response.text.count('"content":') == 1 + len(SAID.split())


async def test_a_full_server_refuses_what_only_begins():
    async with running_system(num_language=2) as system:
        for language in system.languages:
            language.fail_with = Overloaded("full")
        response = await system.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")


async def test_losses_are_counted_and_the_client_is_timed_as_ever(losing, caplog):
    caplog.set_level("INFO")
    async with losing({"break_after": 3}, enable_per_request_metrics=True) as system:
        names = {
            "replays": ("dvd_replays_total", {"outcome": "ok"}),
            "first": ("dvd_time_to_first_token_seconds_count", {}),
            "between": ("dvd_inter_token_latency_seconds_count", {}),
            "tokens": ("dvd_generation_tokens_total", {}),
            "admitted": ("dvd_request_queue_seconds_count", {}),
        }
        before = {key: await metric(system, name, **labels) for key, (name, labels) in names.items()}
        response = await system.chat(**QUESTION)
        after = {key: await metric(system, name, **labels) for key, (name, labels) in names.items()}
        assert {key: after[key] - before[key] for key in names} == {
            "replays": 1,
            "first": 1,
            "between": NUM_TOKENS - 1,
            "tokens": NUM_TOKENS,
            "admitted": 1,
        }
        timings = response.json()["metrics"]
        # The fake says 40 ms of a reply it only ended; here they are the client's.
        assert timings["generation_time_ms"] != 40
        assert timings["mean_itl_ms"] == pytest.approx(timings["generation_time_ms"] / (NUM_TOKENS - 1), abs=0.01)
        assert 0 < timings["time_to_first_token_ms"] < timings["dvd"]["total_ms"]
    assert "after 3 tokens" in caplog.text
    assert "replays=1" in caplog.text
