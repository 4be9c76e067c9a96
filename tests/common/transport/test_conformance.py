"""What every transport must do, whatever it is made of. A failure is always a status, never a hang."""

import asyncio
import contextlib
import os
import signal
import time

import pytest

from common.service.errors import DeadlineExceeded, TransportFailed
from common.transport.select import SenderPool
from common.transport.sender import TransportLimits
from protos.frame import FrameRejected
from protos.status_pb2 import Endpoint
from tests.common.transport.conftest import STREAMS, Wire, end
from tests.common.transport.fakes import MIB, MIB_TOKENS, MemorySink, key, make_frame

SECONDS = 20.0  # a deadline that only a hang can reach
damaged_on_the_way = pytest.mark.parametrize("wire", STREAMS, indirect=True)


async def eventually(condition) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_many_concurrent_frames_arrive_intact_in_any_order(wire: Wire):
    sink = MemorySink()
    endpoint = await wire.receiver(sink)
    senders = [wire.sender(endpoint) for _ in range(3)]
    frames = [make_frame(number=n, num_tokens=1 + 37 * n) for n in range(150)]

    await asyncio.gather(
        *(senders[n % 3].send(packed, payload, SECONDS) for n, (_, packed, payload) in enumerate(reversed(frames)))
    )

    assert sink.ready == {key(header): payload for header, _, payload in frames}
    assert all(sender.inflight_bytes == 0 for sender in senders)


async def test_a_frame_has_arrived_when_send_returns(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    for number in range(5):
        header, packed, payload = make_frame(number=number)
        await sender.send(packed, payload, SECONDS)
        assert sink.ready[key(header)] == payload


async def test_frames_sent_one_after_the_other_arrive_in_that_order(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    frames = [make_frame(number=number, num_tokens=1 + 997 * (number % 5)) for number in range(40)]
    for _, packed, payload in frames:
        await sender.send(packed, payload, SECONDS)
    assert list(sink.ready) == [key(header) for header, _, _ in frames]


async def test_many_tiny_images(wire: Wire):
    """More than may be in flight at once, each of one row."""
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    frames = [make_frame(number=number, num_tokens=1) for number in range(600)]
    await asyncio.gather(*(sender.send(packed, payload, SECONDS) for _, packed, payload in frames))
    assert sink.ready == {key(header): payload for header, _, payload in frames}


async def test_the_payload_may_be_reused_after_send(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    buffer = bytearray(MIB)
    for number in range(8):
        header, packed, payload = make_frame(number=number, num_tokens=MIB_TOKENS)
        buffer[:] = payload
        await sender.send(packed, memoryview(buffer), SECONDS)
        buffer[:] = bytes(MIB)
        assert sink.ready[key(header)] == payload


async def test_a_duplicate_is_success(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    await sender.send(packed, payload, SECONDS)
    assert (len(sink.ready), sink.num_placed) == (1, 2)


@pytest.mark.parametrize("reason", ["tombstone", "unknown_request", "stale", "fingerprint", "nonfinite", "dtype"])
async def test_the_reason_of_a_rejection_reaches_the_sender(wire: Wire, reason: str):
    sink = MemorySink(refuse_with=reason)
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload = make_frame()
    with pytest.raises(FrameRejected) as rejection:
        await sender.send(packed, payload, SECONDS)
    assert rejection.value.reason == reason

    sink.refuse_with = None
    await sender.send(packed, payload, SECONDS)
    assert len(sink.ready) == 1


async def test_a_frame_signed_with_another_ticket_is_rejected(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload = make_frame(ticket=b"x" * 32)
    with pytest.raises(FrameRejected, match="ticket"):
        await sender.send(packed, payload, SECONDS)
    assert sink.ready == {}


async def test_a_payload_of_another_size_never_reaches_the_sink(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload = make_frame()
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(FrameRejected, match="size"):
            await sender.send(packed, wrong, SECONDS)
    assert sink.num_placed == 0


async def test_garbage_for_a_header_is_rejected(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload = make_frame()
    for header, reason in ((b"", "size"), (b"x" * len(packed), "magic"), (packed + b"\0", "size")):
        with pytest.raises(FrameRejected, match=reason):
            await sender.send(header, payload, SECONDS)
    await sender.send(packed, payload, SECONDS)
    assert len(sink.ready) == 1


async def test_a_payload_that_is_not_what_the_header_says_is_rejected(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    for number, num_tokens in enumerate((1, 16, MIB_TOKENS)):
        header, packed, payload = make_frame(number=number, num_tokens=num_tokens)
        damaged = bytearray(payload)
        damaged[len(damaged) // 2] ^= 1
        with pytest.raises(FrameRejected, match="checksum"):
            await sender.send(packed, damaged, SECONDS)
        assert key(header) not in sink.ready
        await sender.send(packed, payload, SECONDS)
        assert sink.ready[key(header)] == payload


@damaged_on_the_way
async def test_a_frame_cut_short_on_the_way_never_arrives(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    first = wire.sender(endpoint)
    _, packed, payload = make_frame(number=1)
    await first.send(packed, payload, SECONDS)

    _, packed, payload = make_frame(number=2, num_tokens=MIB_TOKENS)
    relay.cut_after(MIB // 2)
    with pytest.raises(TransportFailed):
        await first.send(packed, payload, SECONDS)
    assert (len(sink.ready), first.inflight_bytes) == (1, 0)
    await wire.sender(endpoint).send(packed, payload, SECONDS)
    assert len(sink.ready) == 2


@damaged_on_the_way
async def test_a_bit_flipped_on_the_way_is_noticed(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint)
    _, packed, payload = make_frame(number=1)
    await sender.send(packed, payload, SECONDS)

    header, packed, payload = make_frame(number=2, num_tokens=MIB_TOKENS, fill=b"\x55" * 16)
    relay.flip_a_bit_after(MIB // 2)
    with pytest.raises(FrameRejected, match="checksum"):
        await sender.send(packed, payload, SECONDS)
    await sender.send(packed, payload, SECONDS)
    assert sink.ready[key(header)] == payload


async def test_a_frame_above_the_cap_is_refused_before_it_is_sent(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink), TransportLimits(max_frame_bytes=4096))
    _, packed, payload = make_frame(num_tokens=33)
    with pytest.raises(FrameRejected, match="size"):
        await sender.send(packed, payload, SECONDS)
    _, packed, payload = make_frame(num_tokens=32)
    await sender.send(packed, payload, SECONDS)
    assert len(sink.ready) == sink.num_placed == 1


async def test_a_frame_above_the_receivers_cap_costs_only_its_sender(wire: Wire):
    sink = MemorySink()
    endpoint = await wire.receiver(sink, TransportLimits(max_frame_bytes=4096))
    rude, polite = wire.sender(endpoint), wire.sender(endpoint)
    _, packed, payload = make_frame(number=1)
    await polite.send(packed, payload, SECONDS)
    _, packed, payload = make_frame(number=2, num_tokens=MIB_TOKENS)
    with pytest.raises(TransportFailed):
        await rude.send(packed, payload, SECONDS)
    _, packed, payload = make_frame(number=3)
    await polite.send(packed, payload, SECONDS)
    assert len(sink.ready) == 2


async def test_losing_the_receiver_fails_pending_sends(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint)
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)

    relay.pause()
    frames = [make_frame(number=number, num_tokens=512) for number in range(1, 9)]
    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await eventually(lambda: sender.inflight_bytes == sum(len(payload) for _, _, payload in frames))
    await wire.receivers[0].close()
    await relay.close()

    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {TransportFailed}
    assert sender.inflight_bytes == 0


async def test_shutdown_of_the_receiver_with_data_in_flight(wire: Wire):
    sink = MemorySink()
    endpoint = await wire.receiver(sink)
    senders = [wire.sender(endpoint) for _ in range(2)]
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(40)]
    sink.on_place = lambda: closing.set() if sink.num_placed == 5 else None
    closing = asyncio.Event()
    sends = [
        asyncio.create_task(senders[number % 2].send(packed, payload, SECONDS))
        for number, (_, packed, payload) in enumerate(frames)
    ]
    await closing.wait()
    await wire.receivers[0].close()
    num_ready = len(sink.ready)

    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {TransportFailed, type(None)}
    assert TransportFailed in {type(outcome) for outcome in outcomes}
    assert outcomes.count(None) <= num_ready == len(sink.ready)  # nothing is taken after close
    for (header, _, payload), outcome in zip(frames, outcomes, strict=True):
        assert outcome is not None or sink.ready[key(header)] == payload
    assert [sender.inflight_bytes for sender in senders] == [0, 0]


async def test_a_killed_receiver_is_noticed(wire: Wire):
    process = await wire.process("receive", wire.listen)
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    sender = wire.sender(Endpoint(transport=wire.transport, address=address))
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)

    process.send_signal(signal.SIGSTOP)
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(1, 9)]
    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await eventually(lambda: sender.inflight_bytes == 8 * MIB)
    killed = time.monotonic()
    await end(process)
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {TransportFailed}
    assert time.monotonic() - killed < SECONDS / 2  # by the loss of its peer, not by the deadline


async def test_a_killed_sender_costs_the_receiver_nothing(wire: Wire):
    sink = MemorySink()
    endpoint = await wire.receiver(sink)
    sender = wire.sender(endpoint)
    _, packed, payload = make_frame(number=2**31)
    await sender.send(packed, payload, SECONDS)
    baseline = num_open_files()

    process = await wire.process("send", endpoint.address)
    await eventually(lambda: len(sink.ready) >= 20)
    await end(process)

    _, packed, payload = make_frame(number=2**31 + 1)
    await sender.send(packed, payload, SECONDS)
    sink.forget_unfinished()
    await eventually(lambda: num_open_files() <= baseline)
    for (request_id, _, _), payload in sink.ready.items():
        number = int.from_bytes(request_id, "big")
        assert payload == make_frame(number=number, num_tokens=len(payload) // 128)[2]


async def test_closing_the_receiver_is_noticed_without_a_relay(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    await wire.receivers[0].close()
    with pytest.raises(TransportFailed):
        await sender.send(packed, payload, SECONDS)


async def test_a_peer_that_restarted_is_found_again(wire: Wire):
    """A new receiver, at an address of its own; then the pool drops the old one's sender by itself."""
    sink = MemorySink()
    pool = SenderPool(transports=[wire.transport])
    wire.cleanup.push_async_callback(pool.close)
    for incarnation in range(3):
        endpoint = await wire.receiver(sink)
        for number in range(3):
            _, packed, payload = make_frame(number=10 * incarnation + number, num_tokens=512)
            assert await pool.send([endpoint], packed, payload, SECONDS) == wire.transport
        await wire.receivers[-1].close()
        with pytest.raises(TransportFailed):
            await pool.send([endpoint], packed, payload, SECONDS)
    assert len(sink.ready) == 9


async def test_nobody_listens(wire: Wire):
    endpoint = await wire.receiver(MemorySink())
    await wire.receivers[0].close()
    _, packed, payload = make_frame()
    with pytest.raises(TransportFailed):
        await wire.sender(endpoint).send(packed, payload, SECONDS)


async def test_a_peer_that_accepts_and_never_speaks(wire: Wire):
    relay, endpoint = await wire.relay(await wire.receiver(MemorySink()))
    relay.pause()
    limits = TransportLimits(connect_timeout=0.2)
    _, packed, payload = make_frame()
    with pytest.raises(TransportFailed):
        await wire.sender(endpoint, limits).send(packed, payload, SECONDS)
    with pytest.raises(DeadlineExceeded):
        await wire.sender(endpoint).send(packed, payload, 0.1)


@pytest.mark.parametrize(
    "address", ["", "nonsense", "http://127.0.0.1:1", "inproc://x", "xds://x", "pgm://lo;239.1.1.1:1"]
)
async def test_an_address_of_no_transport_fails(wire: Wire, address: str):
    sender = wire.sender(Endpoint(transport=wire.transport, address=address))
    _, packed, payload = make_frame()
    with pytest.raises(TransportFailed):
        await sender.send(packed, payload, SECONDS)


async def test_without_credit_sends_wait_and_memory_stays_bounded(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint, TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=4 * MIB))
    relay.pause()
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(12)]
    relay.resume()
    _, packed, payload = make_frame(number=99)
    await sender.send(packed, payload, SECONDS)
    relay.pause()
    forwarded = relay.num_forwarded

    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await eventually(lambda: sender.inflight_bytes == 4 * MIB)
    await asyncio.sleep(0.1)
    assert (sender.inflight_bytes, len(sink.ready)) == (4 * MIB, 1)

    relay.resume()
    await asyncio.gather(*sends)
    assert len(sink.ready) == 13
    assert sender.inflight_bytes == 0
    assert relay.num_forwarded - forwarded >= 12 * MIB or wire.transport == "nixl"  # whose payload goes another way


async def test_a_slow_receiver_slows_its_senders_down(wire: Wire):
    sink = MemorySink(on_place=lambda: time.sleep(0.01))
    sender = wire.sender(await wire.receiver(sink), TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=2 * MIB))
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, sender.inflight_bytes)
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(20)]
    await asyncio.gather(*(sender.send(packed, payload, SECONDS) for _, packed, payload in frames))
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert 0 < most <= 2 * MIB
    assert sink.ready == {key(header): payload for header, _, payload in frames}


async def test_the_number_of_frames_in_flight_is_bounded(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint, TransportLimits(max_inflight_frames=3))
    frames = [make_frame(number=number) for number in range(10)]
    await sender.send(frames[0][1], frames[0][2], SECONDS)
    relay.pause()
    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await eventually(lambda: sender.inflight_bytes == 3 * len(frames[0][2]))
    relay.resume()
    await asyncio.gather(*sends)
    assert len(sink.ready) == 10


async def test_deadlines_hold_while_waiting_and_the_sender_survives_them(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint, TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=MIB))
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)

    relay.pause()
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in (1, 2, 3)]
    sends = [asyncio.create_task(sender.send(packed, payload, 0.2)) for _, packed, payload in frames]
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {DeadlineExceeded}

    relay.resume()
    await eventually(lambda: sender.inflight_bytes == 0)
    _, packed, payload = make_frame(number=4, num_tokens=MIB_TOKENS)
    await sender.send(packed, payload, SECONDS)


async def test_cancelling_a_send_leaves_the_others_alone(wire: Wire):
    sink = MemorySink()
    relay, endpoint = await wire.relay(await wire.receiver(sink))
    sender = wire.sender(endpoint, TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=2 * MIB))
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)

    relay.pause()
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(1, 7)]
    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await eventually(lambda: sender.inflight_bytes == 2 * MIB)
    sends[0].cancel()  # in flight
    sends[3].cancel()  # waiting for credit
    await asyncio.wait({sends[0], sends[3]})
    assert sends[0].cancelled() and sends[3].cancelled()

    relay.resume()
    await asyncio.gather(*(sends[n] for n in (1, 2, 4, 5)))
    await eventually(lambda: sender.inflight_bytes == 0)
    assert {key(frames[n][0]) for n in (1, 2, 4, 5)} <= set(sink.ready)
    assert key(frames[3][0]) not in sink.ready


async def test_closing_the_sender_fails_what_is_in_flight_and_what_waits(wire: Wire):
    relay, endpoint = await wire.relay(await wire.receiver(MemorySink()))
    sender = wire.sender(endpoint, TransportLimits(max_frame_bytes=MIB, max_inflight_bytes=2 * MIB))
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    relay.pause()
    frames = [make_frame(number=number, num_tokens=MIB_TOKENS) for number in range(1, 7)]
    sends = [asyncio.create_task(sender.send(packed, payload, SECONDS)) for _, packed, payload in frames]
    await eventually(lambda: sender.inflight_bytes == 2 * MIB)

    await sender.close()

    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {TransportFailed}
    with pytest.raises(TransportFailed):
        await sender.send(packed, payload, SECONDS)


async def test_closing_the_sender_while_it_connects(wire: Wire):
    relay, endpoint = await wire.relay(await wire.receiver(MemorySink()))
    relay.pause()
    sender = wire.sender(endpoint)
    _, packed, payload = make_frame()
    send = asyncio.create_task(sender.send(packed, payload, SECONDS))
    await eventually(lambda: relay.num_connections == 1)
    await sender.close()
    with pytest.raises(TransportFailed):
        await send


async def test_a_64_mb_image_in_tile_groups(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(
        await wire.receiver(sink), TransportLimits(max_frame_bytes=8 * MIB, max_inflight_bytes=16 * MIB)
    )
    frames = [make_frame(number=number, num_tokens=8 * MIB_TOKENS) for number in range(8)]
    await asyncio.gather(*(sender.send(packed, payload, SECONDS) for _, packed, payload in frames))
    assert sum(len(payload) for payload in sink.ready.values()) == 64 * MIB
    assert sink.ready == {key(header): payload for header, _, payload in frames}


async def test_a_64_mb_frame_in_one_piece(wire: Wire):
    sink = MemorySink()
    sender = wire.sender(await wire.receiver(sink))
    for number in range(2):
        header, packed, payload = make_frame(number=number, num_tokens=64 * MIB_TOKENS)
        await sender.send(packed, payload, SECONDS)
        assert sink.ready.pop(key(header)) == payload


async def test_close_is_harmless_unused_and_twice(wire: Wire):
    endpoint = await wire.receiver(MemorySink())
    unused = wire.sender(endpoint)
    await unused.close()
    await unused.close()
    await wire.receivers[0].close()
    await wire.receivers[0].close()


async def test_nothing_is_left_open(wire: Wire):
    """Files: the third round must not need more descriptors than the second, and the sockets are gone."""

    async def round_trip() -> int:
        sink = MemorySink()
        endpoint = await wire.receiver(sink)
        sender = wire.sender(endpoint)
        _, packed, payload = make_frame(num_tokens=MIB_TOKENS)
        await sender.send(packed, payload, SECONDS)
        await sender.close()
        await wire.receivers[-1].close()
        return num_open_files()

    await round_trip()
    baseline = await round_trip()
    await round_trip()
    await eventually(lambda: num_open_files() <= baseline)
    assert os.listdir(wire.directory) == []
