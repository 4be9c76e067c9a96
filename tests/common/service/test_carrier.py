"""Calls that share one stream begin, go on and end as calls of their own would."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from common.service import carrier
from common.service.carrying import CARRY, MAX_CARRIED_BYTES, WINDOW
from common.service.errors import Overloaded, from_grpc
from common.service.rpc import bind, make_leased_channel, make_server
from protos.carrier_pb2 import Begin, Orders, Reports, Said
from protos.language_pb2 import GenerateEvent, GenerateRequest, SamplingParams, Token
from protos.language_pb2_grpc import LanguageServicer, LanguageStub, add_LanguageServicer_to_server

DEADLINE = 10.0
GENERATE = "/dvd.v1.Language/Generate"


class Counting(LanguageServicer):
    """Counts to ``max_tokens``; what else it does, its tests say in ``priority``."""

    OVERLOADED, BUG, FOREVER, MUTE = 1, 2, 3, 4

    def __init__(self) -> None:
        self.num_running = 0
        self.num_said = 0
        self.num_done = 0
        self.remaining: float | None = None
        self.metadata: dict[str, Any] = {}
        self.has_changed = asyncio.Event()

    async def Generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateEvent]:
        self.remaining = context.time_remaining()
        self.metadata = dict(context.invocation_metadata())
        context.add_done_callback(lambda _: self._done())
        self.num_running += 1
        self.has_changed.set()
        try:
            for number in range(request.sampling.max_tokens):
                self.num_said += 1
                yield GenerateEvent(token=Token(token_id=number))
            if request.priority == self.OVERLOADED:
                raise Overloaded("full", param="messages")
            if request.priority == self.BUG:
                raise ValueError("of ours")
            if request.priority == self.FOREVER:
                while True:
                    self.num_said += 1
                    yield GenerateEvent(token=Token(token_id=1))
            if request.priority == self.MUTE:
                await asyncio.Event().wait()
        finally:
            self.num_running -= 1
            self.has_changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what the handlers do."""
        async with asyncio.timeout(DEADLINE):
            while not holds():
                self.has_changed.clear()
                await self.has_changed.wait()

    def _done(self) -> None:
        self.num_done += 1


class System:
    """A server and a caller whose Generate calls are carried."""

    def __init__(self) -> None:
        self.counting = Counting()
        self.server = make_server()
        add_LanguageServicer_to_server(self.counting, self.server)
        self.address = bind(self.server, "127.0.0.1:0")
        self.channel = make_leased_channel(self.address, carried=frozenset({GENERATE}))
        self.stub = LanguageStub(self.channel)

    def generate(self, num_tokens: int, priority: int = 0, *, timeout: float = DEADLINE, size: int = 0) -> Any:
        sampling = SamplingParams(max_tokens=num_tokens)
        request = GenerateRequest(sampling=sampling, priority=priority, cache_scope="x" * size)
        return self.stub.Generate(request, timeout=timeout)


@pytest.fixture
async def system() -> AsyncIterator[System]:
    system = System()
    await system.server.start()
    yield system
    await system.channel.close()
    await system.server.stop(None)


async def read_all(call: Any) -> list[int]:
    numbers = []
    async with asyncio.timeout(DEADLINE):
        while (event := await call.read()) is not grpc.aio.EOF:
            numbers.append(event.token.token_id)
    return numbers


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return caught.value


async def test_each_call_hears_its_own_messages_in_order(system):
    lengths = [0, 1, 7, 300, 2 * WINDOW + 3] * 20
    answers = await asyncio.gather(*(read_all(system.generate(length)) for length in lengths))
    assert answers == [list(range(length)) for length in lengths]
    assert (system.counting.num_running, system.counting.num_done) == (0, len(lengths))


async def test_a_failure_is_told_to_its_call_alone(system):
    """With its code and field, also after messages."""
    good, full = system.generate(5), system.generate(3, Counting.OVERLOADED)
    assert [(await full.read()).token.token_id for _ in range(3)] == [0, 1, 2]
    ours = from_grpc(await failure(full))
    assert (type(ours), ours.message, ours.param) == (Overloaded, "full", "messages")
    assert await read_all(good) == list(range(5))


async def test_a_bug_says_nothing_of_itself(system, caplog):
    error = await failure(system.generate(0, Counting.BUG))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "unexpected failure")
    assert "of ours" in caplog.text


@pytest.mark.parametrize("priority", [Counting.MUTE, Counting.FOREVER])
async def test_who_cancels_ends_its_handler(system, priority):
    call, other = system.generate(1, priority), system.generate(1, Counting.MUTE)
    await call.read()
    await other.read()
    assert call.cancel() and not call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    await system.counting.until(lambda: system.counting.num_running == 1)
    other.cancel()


async def test_who_is_cancelled_before_it_was_sent_is_never_begun(system):
    system.generate(1).cancel()
    assert await read_all(system.generate(2)) == [0, 1]
    assert system.counting.num_done == 1


async def test_a_reader_that_waits_hears_of_the_cancel(system):
    call = system.generate(0, Counting.MUTE)
    reading = asyncio.create_task(call.read())
    await system.counting.until(lambda: system.counting.num_running == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reading, DEADLINE)


async def test_a_deadline_ends_a_call_at_both_ends(system):
    error = await failure(system.generate(1, Counting.MUTE, timeout=0.3))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await system.counting.until(lambda: system.counting.num_running == 0)
    assert 0 < system.counting.remaining <= 0.3


async def test_nobody_runs_far_ahead_of_its_reader(system):
    """A call that is not read waits; those beside it do not."""
    unread = system.generate(0, Counting.FOREVER)
    assert await read_all(system.generate(3 * WINDOW)) == list(range(3 * WINDOW))
    assert system.counting.num_said == 4 * WINDOW
    for _ in range(WINDOW):
        await unread.read()
    assert await read_all(system.generate(1)) == [0]
    assert system.counting.num_said > 4 * WINDOW + 1
    unread.cancel()


async def test_all_calls_break_with_the_connection_and_the_next_has_a_new_one(system):
    calls = [system.generate(1, Counting.MUTE) for _ in range(3)]
    for call in calls:
        await call.read()
    await system.server.stop(None)
    errors = [await failure(call) for call in calls]
    assert {error.code() for error in errors} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert (await failure(system.generate(1))).code() == grpc.StatusCode.UNAVAILABLE
    system.server = make_server()
    add_LanguageServicer_to_server(system.counting, system.server)
    bind(system.server, system.address)
    await system.server.start()
    async with asyncio.timeout(DEADLINE):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                assert await read_all(system.generate(4)) == list(range(4))
                break
            await asyncio.sleep(0.02)  # gRPC waits a little before it dials again


async def test_a_caller_that_goes_ends_all_its_calls(system):
    call = system.generate(1, Counting.MUTE)
    await call.read()
    await system.channel.close()
    await system.counting.until(lambda: system.counting.num_running == 0)
    assert (await failure(call)).code() == grpc.StatusCode.UNAVAILABLE


async def test_large_requests_go_alone(system):
    assert await read_all(system.generate(3, size=MAX_CARRIED_BYTES)) == [0, 1, 2]
    assert "dvd-caller" in system.counting.metadata  # a carried call has its stream's
    assert await read_all(system.generate(3, size=10)) == [0, 1, 2]
    assert "dvd-caller" not in system.counting.metadata


async def test_only_methods_that_answer_with_a_stream_are_carried(system):
    for method in ("/dvd.v1.Language/Nothing", "/dvd.v1.Language/Tokenize"):
        channel = make_leased_channel(system.address, carried=frozenset({method}))
        ask = channel.unary_stream(
            method,
            request_serializer=GenerateRequest.SerializeToString,
            response_deserializer=GenerateEvent.FromString,
        )
        assert (await failure(ask(GenerateRequest(), timeout=DEADLINE))).code() == grpc.StatusCode.UNIMPLEMENTED
        await channel.close()


async def test_bytes_that_are_no_request_fail_their_call_alone(system, caplog):
    stub = system.channel.unary_stream(
        GENERATE, request_serializer=lambda request: b"\xff", response_deserializer=GenerateEvent.FromString
    )
    assert (await failure(stub(None, timeout=DEADLINE))).code() == grpc.StatusCode.INTERNAL
    assert await read_all(system.generate(1)) == [0]
    assert "unexpected failure" in caplog.text


@pytest.mark.parametrize("timeout", [math.nan, math.inf, -1.0, 1e300])
async def test_a_deadline_that_is_none_is_refused(system, timeout):
    """Only of those that no client of ours sends: it names at most a day."""
    request = GenerateRequest(sampling=SamplingParams(max_tokens=1)).SerializeToString()
    said = await carried(
        system, Orders(begin=[Begin(call=1, method=GENERATE, request=request, timeout_seconds=timeout)])
    )
    assert (said.end.status, len(said.messages)) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], 0)


async def test_a_number_that_is_taken_is_not_given_again(system):
    request = GenerateRequest(sampling=SamplingParams(max_tokens=0), priority=Counting.MUTE).SerializeToString()
    begin = Begin(call=7, method=GENERATE, request=request)
    said = await carried(system, Orders(begin=[begin, begin]))
    assert (said.call, said.end.status) == (7, grpc.StatusCode.INTERNAL.value[0])


async def test_who_begins_and_never_reads_is_read_no_further(system, monkeypatch):
    monkeypatch.setattr(carrier, "_MAX_UNSENT", 10)
    outbox = carrier._Outbox()
    for call in range(11):
        outbox.add(call, b"x")
    waiting = asyncio.create_task(outbox.has_room())
    await asyncio.sleep(0)
    assert not waiting.done()

    class Reader:
        async def write(self, reports: Reports) -> None:
            assert len(reports.said) == 11

    writing = asyncio.create_task(outbox.write_to(Reader()))
    await asyncio.wait_for(waiting, DEADLINE)
    writing.cancel()


async def test_a_server_that_does_not_keep_to_the_window_loses_its_call(system, monkeypatch):
    monkeypatch.setattr(carrier, "WINDOW", 10 * WINDOW)
    call = system.generate(0, Counting.FOREVER)
    assert await read_all(system.generate(WINDOW)) == list(range(WINDOW))
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "more messages than asked for")
    await system.counting.until(lambda: system.counting.num_running == 0)


async def carried(system: System, orders: Orders) -> Said:
    """The first that is said to these."""
    async with grpc.aio.insecure_channel(system.address) as channel:
        carry = channel.stream_stream(
            CARRY, request_serializer=Orders.SerializeToString, response_deserializer=Reports.FromString
        )(timeout=DEADLINE)
        await carry.write(orders)
        reports = await carry.read()
        carry.cancel()
    return reports.said[0]
