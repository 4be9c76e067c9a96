"""Content that kills servers is refused after two; what was there by accident is not."""

import asyncio

import pytest

from common.service import metrics
from common.service.errors import InternalError, InvalidRequest
from router.affinity import content_key
from router.quarantine import KEEP_SECONDS, MAX_ENTRIES, Quarantine
from router.workers import ServerLost
from tests.router.conftest import error_of, png, running_system, user


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def quarantine(clock):
    return Quarantine(clock)


def is_refused(quarantine: Quarantine, key: bytes) -> bool:
    try:
        quarantine.check(key)
    except InvalidRequest as error:
        assert (error.code, error.http_status, error.should_retry) == ("request_quarantined", 400, False)
        return True
    return False


def test_two_deaths_are_enough(quarantine):
    quarantine.died_with([b"x", b"y"], b"1")
    assert not is_refused(quarantine, b"x")
    quarantine.died_with([b"x"], b"2")
    assert is_refused(quarantine, b"x")
    assert not is_refused(quarantine, b"y")
    assert len(quarantine) == 1


def test_one_death_told_by_many_is_one(quarantine):
    for _ in range(8):
        quarantine.died_with([b"x"], b"1")
    assert not is_refused(quarantine, b"x")
    assert quarantine.is_suspect(b"x")


def test_who_survives_is_cleared(quarantine):
    quarantine.died_with([b"x"], b"1")
    quarantine.survived(b"x")
    quarantine.died_with([b"x"], b"2")
    assert not is_refused(quarantine, b"x")


def test_a_lost_connection_is_no_death(quarantine):
    quarantine.died_with([b"x", b"y"], b"1")
    quarantine.died_with([b"x"], b"2")
    quarantine.forgive(b"1")
    assert not is_refused(quarantine, b"x")
    assert [quarantine.is_suspect(key) for key in (b"x", b"y")] == [True, False]


def test_it_forgets_in_time(quarantine, clock):
    quarantine.died_with([b"x"], b"1")
    clock.now = KEEP_SECONDS / 2
    quarantine.died_with([b"x", b"y"], b"2")
    clock.now = KEEP_SECONDS + 1
    assert is_refused(quarantine, b"x")
    clock.now = 1.5 * KEEP_SECONDS + 1
    assert not is_refused(quarantine, b"x")
    assert not quarantine.is_suspect(b"y")


def test_it_is_bounded(quarantine):
    for index in range(MAX_ENTRIES + 10):
        quarantine.died_with([index.to_bytes(4, "big")], b"1")
    assert not quarantine.is_suspect((9).to_bytes(4, "big"))
    assert quarantine.is_suspect((10).to_bytes(4, "big"))


async def test_suspects_take_turns_on_each_server_and_nobody_else_does(quarantine):
    quarantine.died_with([b"x", b"y"], b"1")
    order = []

    async def visit(key: bytes, server: str, leave: asyncio.Event) -> None:
        async with quarantine.trial(lambda: key, server):
            order.append((key, server))
            await leave.wait()

    leave = asyncio.Event()
    visits = [
        asyncio.create_task(visit(key, server, leave))
        for key, server in ((b"x", "a"), (b"y", "a"), (b"y", "b"), (b"innocent", "a"))
    ]
    await asyncio.sleep(0.01)
    assert order == [(b"x", "a"), (b"y", "b"), (b"innocent", "a")]
    leave.set()
    await asyncio.gather(*visits)
    assert order[-1] == (b"y", "a")


async def test_a_trial_tells_what_became_of_it(quarantine):
    def key() -> bytes:
        return b"x"

    for death in (b"1", b"2"):
        with pytest.raises(ServerLost):
            async with quarantine.trial(key, "a"):
                raise ServerLost("reset", death)
    with pytest.raises(InvalidRequest):
        async with quarantine.trial(key, "a"):
            pytest.fail("it was let in")


@pytest.mark.parametrize("error", [ServerLost("heartbeat", b"1"), ServerLost("unreachable", b"1"), InternalError("x")])
async def test_only_deaths_make_suspects(quarantine, error):
    with pytest.raises(type(error)):
        async with quarantine.trial(lambda: b"x", "a"):
            raise error
    assert not quarantine.has_suspects


async def test_a_suspect_that_has_passed_makes_room_before_its_end(quarantine):
    quarantine.died_with([b"x", b"y"], b"1")
    async with quarantine.trial(lambda: b"x", "a") as trial:
        trial.passed()
        trial.passed()
        async with asyncio.timeout(5), quarantine.trial(lambda: b"y", "a"):
            assert not quarantine.is_suspect(b"x")


async def test_a_suspect_that_gives_up_waiting_holds_nothing(quarantine):
    quarantine.died_with([b"x", b"y"], b"1")
    async with quarantine.trial(lambda: b"x", "a"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), quarantine.trial(lambda: b"y", "a"):
                pytest.fail("two at once")
    async with asyncio.timeout(5), quarantine.trial(lambda: b"y", "a"):
        pass
    assert not quarantine.has_suspects


POISON = png("black")


def num_dead(system) -> int:
    return sum(vision.is_dead for vision in system.visions)


async def test_a_poisonous_image_kills_two_and_is_refused():
    """Its batch-mates are answered, and so is everything that comes later."""
    async with running_system(num_vision=3) as system:
        for vision in system.visions:
            vision.poison = POISON
        mates = [png(color) for color in ("red", "blue", "green")]
        asked = await asyncio.gather(
            *(system.chat(messages=[user(image)]) for image in (POISON, *mates)), system.chat(messages=[user("text")])
        )
        assert [response.status_code for response in asked] == [400, 200, 200, 200, 200]
        error = error_of(asked[0])
        assert (error["code"], error["param"]) == ("request_quarantined", "messages[0].content[0].image_url.url")
        assert asked[0].headers["x-should-retry"] == "false"
        assert num_dead(system) == 2
        assert (await system.chat(messages=[user(POISON)])).status_code == 400
        assert (await system.chat(messages=[user(mates[0])])).status_code == 200
        assert num_dead(system) == 2
        assert "dvd_quarantine_entries" in metrics.exposition("router").decode()
        assert len(system.router.fleet.quarantine) == 1


async def test_a_poisonous_prompt_kills_two_and_is_refused():
    async with running_system(num_language=3) as system:
        for language in system.languages:
            language.break_after = 0
        response = await system.chat(messages=[user("poison")])
        assert (response.status_code, error_of(response)["code"]) == (400, "request_quarantined")
        for language in system.languages:
            language.break_after = None
        assert (await system.chat(messages=[user("poison")])).status_code == 400
        assert (await system.chat(messages=[user("food")])).status_code == 200
        assert sum(bool(language.requests) for language in system.languages) == 3
        assert sum(len(language.requests) for language in system.languages) == 3


async def test_a_server_that_is_lost_while_a_suspect_waits_for_its_turn_is_not_called():
    """The call would fail as if that server had died of it."""
    async with running_system(num_language=2) as system:
        assert (await system.chat(messages=[user("food")])).status_code == 200
        (request,) = [each for language in system.languages for each in language.requests]
        quarantine = system.router.fleet.quarantine
        quarantine.died_with([content_key(request)], b"elsewhere")
        turns = {worker: quarantine._turn(worker.address) for worker in system.router.fleet.language}
        for turn in turns.values():
            await turn.acquire()
        asking = asyncio.create_task(system.chat(messages=[user("food")]))
        await system.until(lambda: any(turn._waiters for turn in turns.values()))
        ((lost, its_turn),) = [(worker, turn) for worker, turn in turns.items() if turn._waiters]
        ((_, other_turn),) = [(worker, turn) for worker, turn in turns.items() if worker is not lost]
        num_calls = {language.name: len(language.requests) for language in system.languages}
        lost._is_doubted = True
        its_turn.release()
        other_turn.release()
        assert (await asking).status_code == 200
        assert {language.name: len(language.requests) for language in system.languages} == {
            name: number + (name != lost.name) for name, number in num_calls.items()
        }
        assert len(quarantine) == 0
