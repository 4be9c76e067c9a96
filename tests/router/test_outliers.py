"""Servers that fail or crawl are left out for a while, tried, and taken back; never the last one."""

from common.service import metrics
from common.service.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from protos.vision_pb2 import EncodeReply
from router import fleet as fleets
from router.outliers import FIRST_EJECTION_SECONDS, MAX_EJECTION_SECONDS, MAX_FAILURES, Circuit, Speed, is_slow
from tests.router.conftest import png, running_system, user


def fail(circuit: Circuit, now: float, times: int = MAX_FAILURES) -> list[bool]:
    ejected = []
    for _ in range(times):
        circuit.begin()
        ejected.append(circuit.end(False, now))
    return ejected


def succeed(circuit: Circuit, now: float) -> None:
    assert circuit.allows(now)
    circuit.begin()
    circuit.end(True, now)


def test_failures_in_a_row_eject():
    circuit = Circuit()
    assert fail(circuit, 0.0) == [False] * (MAX_FAILURES - 1) + [True]
    assert not circuit.allows(FIRST_EJECTION_SECONDS - 0.01)


def test_a_success_between_them_begins_a_new_row():
    circuit = Circuit()
    fail(circuit, 0.0, MAX_FAILURES - 1)
    succeed(circuit, 0.0)
    assert fail(circuit, 0.0, MAX_FAILURES - 1)[-1] is False
    assert circuit.allows(0.0)


def test_what_says_nothing_of_the_server_does_not_count():
    circuit = Circuit()
    fail(circuit, 0.0, MAX_FAILURES - 1)
    circuit.begin()
    assert circuit.end(None, 0.0) is False
    assert fail(circuit, 0.0, 1) == [True]


def test_it_returns_after_trials_one_at_a_time():
    circuit = Circuit()
    fail(circuit, 0.0)
    now = FIRST_EJECTION_SECONDS
    assert circuit.allows(now)
    circuit.begin()
    assert not circuit.allows(now)
    circuit.end(True, now)
    succeed(circuit, now)
    circuit.begin()
    assert circuit.allows(now)  # more than one at a time: it is closed


def test_a_failed_trial_doubles_the_time_up_to_a_bound():
    circuit, now, times = Circuit(), 0.0, []
    fail(circuit, now)
    for _ in range(6):
        start = now
        while not circuit.allows(now):
            now += 0.5
        times.append(now - start)
        assert fail(circuit, now, 1) == [True]
    assert times == [5, 10, 20, 40, MAX_EJECTION_SECONDS, MAX_EJECTION_SECONDS]


def test_a_new_process_is_trusted():
    circuit = Circuit()
    fail(circuit, 0.0)
    circuit.reset()
    assert circuit.allows(0.0)


def test_a_slow_server_is_known_by_its_time_for_a_tile():
    slow, fast = Speed(), Speed()
    for index in range(10):
        assert slow.seconds_per_tile is None
        slow.observe(num_tiles=1 + index % 3, seconds=0.8 * (2 + index % 3))
        fast.observe(num_tiles=12, seconds=0.1 * 13)
    assert is_slow(slow.seconds_per_tile, [fast.seconds_per_tile, None])
    assert not is_slow(fast.seconds_per_tile, [slow.seconds_per_tile])
    assert not is_slow(slow.seconds_per_tile, [None])
    assert not is_slow(0.09, [0.001])  # nobody would notice
    slow.reset()
    assert slow.seconds_per_tile is None


async def encode_on(system, vision, times: int) -> int:
    """Ask until a server was called so often; returns how many requests failed."""
    failed = index = 0
    while len(vision.requests) < times:
        response = await system.chat(messages=[user(png(), f"{index}")])
        failed += response.status_code != 200
        index += 1
    return failed


def circuit_states(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("dvd_circuit_state"))


def worker_of(system, vision):
    return next(each for each in system.router.fleet.vision if each.address == vision.address)


async def favourite(system):
    """Of the image that ``encode_on`` sends."""
    assert (await system.chat(messages=[user(png())])).status_code == 200
    return next(vision for vision in system.visions if vision.requests)


async def test_a_failing_server_is_left_out_and_comes_back():
    async with running_system(num_vision=2) as system:
        bad = await favourite(system)
        bad.failures = [InternalError("x") for _ in range(MAX_FAILURES)]
        assert await encode_on(system, bad, 1 + MAX_FAILURES) == 0
        worker = worker_of(system, bad)
        assert (worker.circuit.state, worker.is_usable) == ("open", True)
        for _ in range(5):
            assert (await system.chat(messages=[user(png())])).status_code == 200
        assert len(bad.requests) == 1 + MAX_FAILURES
        text = metrics.exposition("router").decode()
        assert f'server="{bad.name}",tier="vision"}} 2.0' in circuit_states(text)
        assert f'reason="failures",server="{bad.name}",tier="vision"}} 1.0' in text
        worker.circuit._open_until = 0.0  # the time has come
        await encode_on(system, bad, 3 + MAX_FAILURES)
        assert worker.circuit.state == "closed"


async def test_refusals_and_bad_input_are_no_failures():
    async with running_system(num_vision=2) as system:
        vision = await favourite(system)
        kinds = (Overloaded("full"), InvalidRequest("bad image"), Unavailable("x", code="transport_failed"))
        vision.failures = [kinds[index % 3] for index in range(12)]
        await encode_on(system, vision, 13)
        assert worker_of(system, vision).circuit.state == "closed"


async def test_the_last_server_is_used_whatever_it_does(system):
    system.vision.failures = [InternalError("x") for _ in range(MAX_FAILURES)]
    for _ in range(MAX_FAILURES):
        assert (await system.chat(messages=[user(png())])).status_code == 500
    assert system.router.fleet.vision[0].circuit.state == "open"
    assert (await system.chat(messages=[user(png())])).status_code == 200


async def test_a_crawling_server_is_ejected():
    async with running_system(num_vision=2) as system:
        known: fleets.Fleet = system.router.fleet
        slow, fast = known.vision
        for _ in range(10):
            known.observe_encode(fast, 1, 0.1, EncodeReply())
            known.observe_encode(slow, 1, 2.0, EncodeReply(cache_hit=True))
            assert slow.circuit.state == "closed"
        for _ in range(10):
            known.observe_encode(slow, 1, 2.0, EncodeReply())
        assert (slow.circuit.state, fast.circuit.state) == ("open", "closed")
        slow.circuit._open_until = 0.0
        assert slow.circuit.allows(0.0)
        known.observe_encode(slow, 1, 2.0, EncodeReply())  # one is enough on trial
        assert slow.circuit.state == "open"


async def test_time_in_a_queue_is_not_the_servers_speed():
    async with running_system(num_vision=2) as system:
        busy, idle = system.router.fleet.vision
        for _ in range(10):
            system.router.fleet.observe_encode(idle, 1, 0.2, EncodeReply())
            reply = EncodeReply()
            reply.timings.queue_ms = 3800
            system.router.fleet.observe_encode(busy, 1, 4.0, reply)
        assert busy.circuit.state == "closed"


async def test_a_language_server_is_not_blamed_for_the_vision_tier():
    async with running_system(num_language=2) as system:
        system.vision.failures = [InternalError("x") for _ in range(2 * MAX_FAILURES)]
        for _ in range(2 * MAX_FAILURES):
            assert (await system.chat(messages=[user(png())])).status_code == 500
        assert {worker.circuit.state for worker in system.router.fleet.language} == {"closed"}


async def test_a_failing_language_server_is_left_out():
    async with running_system(num_language=2) as system:
        assert (await system.chat()).status_code == 200
        bad = next(language for language in system.languages if language.requests)
        bad.fail_with = InternalError("x")
        for _ in range(MAX_FAILURES):
            await system.chat()
        bad.fail_with = None
        before = len(bad.requests)
        for _ in range(5):
            assert (await system.chat()).status_code == 200
        assert len(bad.requests) == before
