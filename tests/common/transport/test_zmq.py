"""What only ZeroMQ can do to us: messages that are no frames, answers that are no verdicts, a peer that goes silent."""

import asyncio
import logging
import struct
import time

import pytest
import zmq
import zmq.asyncio

from common.service import metrics
from common.service.errors import ConfigError, DeadlineExceeded, TransportFailed
from common.transport.sender import TransportLimits
from common.transport.zmq import ZmqReceiver, ZmqSender
from tests.common.transport.fakes import MemorySink, make_frame, relayed

SECONDS = 20.0
pytestmark = pytest.mark.usefixtures("clean_loop")


def rejected(reason: str) -> float:
    return float(metrics.TRANSFER_FRAMES_REJECTED.labels("zmq", "receive", reason)._value.get())


def unanswered() -> float:
    return float(metrics.TRANSFER_FAILURES.labels("zmq", "receive", "acknowledgement")._value.get())


class RawPeer:
    """A bare ZeroMQ socket that may say anything."""

    def __init__(self, kind: int) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)

    async def __aenter__(self) -> zmq.asyncio.Socket:
        return self.socket

    async def __aexit__(self, *_: object) -> None:
        self.socket.close(linger=0)


@pytest.mark.parametrize(
    "garbage",
    [
        [b""],
        [b"", b"", b"", b"", b"", b""],
        [b"1234567", b"header", b"payload"],
        [b"123456789", b"header", b"payload"],
        [b"x" * 65_536],
        [b"x"] * 5_000,
    ],
    ids=["one empty part", "six parts", "short number", "long number", "one large part", "5000 parts"],
)
async def test_garbage_is_counted_and_the_receiver_goes_on(garbage: list[bytes]):
    sink = MemorySink()
    receiver = ZmqReceiver("tcp://127.0.0.1:0", TransportLimits())
    endpoint = await receiver.start(sink)
    sender = ZmqSender(endpoint.address, TransportLimits())
    before = rejected("magic")
    async with RawPeer(zmq.DEALER) as peer:
        peer.connect(endpoint.address)
        for _ in range(10):
            await peer.send_multipart(garbage)
        _, packed, payload = make_frame()
        await peer.send_multipart([bytes(8), packed, payload])
        async with asyncio.timeout(SECONDS):
            assert await peer.recv_multipart() == [bytes(8), b"ok"]  # the same connection still works
        await sender.send(packed, payload, SECONDS)
    assert rejected("magic") - before == 10
    assert len(sink.ready) == 1
    await sender.close()
    await receiver.close()


async def test_a_part_above_the_cap_ends_that_connection_only():
    sink = MemorySink()
    receiver = ZmqReceiver("tcp://127.0.0.1:0", TransportLimits(max_frame_bytes=4096))
    endpoint = await receiver.start(sink)
    sender = ZmqSender(endpoint.address, TransportLimits())
    _, packed, payload = make_frame(number=1)
    async with RawPeer(zmq.DEALER) as peer:
        monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.connect(endpoint.address)
        await peer.send_multipart([bytes(8), packed, bytes(2**20)])
        async with asyncio.timeout(SECONDS):
            await monitor.recv_multipart()
        peer.disable_monitor()
        monitor.close(linger=0)
        await sender.send(packed, payload, SECONDS)
    assert sink.num_placed == 1
    await sender.close()
    await receiver.close()


async def test_a_peer_that_never_reads_its_verdicts_does_not_hold_up_the_others(private_directory: str):
    """Long verdicts on a unix socket, whose buffer is small, fill the way back soon."""
    sink = MemorySink(refuse_with="x" * 4_000)
    receiver = ZmqReceiver(f"ipc://{private_directory}/zmq.sock", TransportLimits())
    endpoint = await receiver.start(sink)
    sender = ZmqSender(endpoint.address, TransportLimits())
    before = unanswered()
    _, packed, payload = make_frame(number=1)
    async with RawPeer(zmq.DEALER) as peer:
        peer.setsockopt(zmq.RCVHWM, 1)
        peer.connect(endpoint.address)
        async with asyncio.timeout(SECONDS):
            while unanswered() == before:
                await peer.send_multipart([bytes(8), packed, payload])
                await asyncio.sleep(0)
        sink.refuse_with = None
        await sender.send(packed, payload, SECONDS)
    assert len(sink.ready) == 1
    await sender.close()
    await receiver.close()


async def test_a_verdict_for_a_peer_that_has_left_is_counted():
    """ROUTER_MANDATORY: without it ZeroMQ drops the answer without a word."""
    receiver = ZmqReceiver("tcp://127.0.0.1:0", TransportLimits())
    endpoint = await receiver.start(MemorySink(on_place=lambda: time.sleep(0.01)))
    before = unanswered()
    _, packed, payload = make_frame()
    async with asyncio.timeout(SECONDS):
        while unanswered() == before:
            async with RawPeer(zmq.DEALER) as peer:
                peer.setsockopt(zmq.LINGER, 1_000)
                peer.connect(endpoint.address)
                for _ in range(5):
                    await peer.send_multipart([bytes(8), packed, payload])
                peer.close(linger=1_000)
            await asyncio.sleep(0.01)
    await receiver.close()


@pytest.mark.parametrize(
    "answer",
    [[b""], [bytes(8)], [bytes(8), b"ok", b""], [b"x" * 8, b"ok"], [b"short", b"ok"]],
    ids=["empty", "no verdict", "three parts", "unknown number", "short number"],
)
async def test_a_peer_that_answers_nonsense_is_given_up(answer: list[bytes]):
    async with RawPeer(zmq.ROUTER) as peer:
        port = peer.bind_to_random_port("tcp://127.0.0.1")
        sender = ZmqSender(f"tcp://127.0.0.1:{port}", TransportLimits())
        _, packed, payload = make_frame()
        send = asyncio.create_task(sender.send(packed, payload, SECONDS))
        async with asyncio.timeout(SECONDS):
            identity, *_ = await peer.recv_multipart()
        await peer.send_multipart([identity, *answer])
        with pytest.raises(TransportFailed):
            await send
        assert sender.is_broken
        await sender.close()


@pytest.mark.parametrize("verdict", [b"", b"\xff\xfe", b"two words", b"x" * 1000])
async def test_an_unknown_verdict_is_a_rejection_with_a_plain_reason(verdict: bytes):
    async with RawPeer(zmq.ROUTER) as peer:
        port = peer.bind_to_random_port("tcp://127.0.0.1")
        sender = ZmqSender(f"tcp://127.0.0.1:{port}", TransportLimits())
        _, packed, payload = make_frame()
        send = asyncio.create_task(sender.send(packed, payload, SECONDS))
        async with asyncio.timeout(SECONDS):
            identity, number, *_ = await peer.recv_multipart()
        await peer.send_multipart([identity, number, verdict])
        with pytest.raises(ValueError, match=r"^unknown: "):
            await send
        await sender.close()


async def test_a_frame_keeps_its_credit_until_it_is_acknowledged_even_when_its_caller_has_left():
    """Otherwise callers that give up, one after the other, would fill the memory of a connection that stands still."""
    async with RawPeer(zmq.ROUTER) as peer:
        port = peer.bind_to_random_port("tcp://127.0.0.1")
        sender = ZmqSender(f"tcp://127.0.0.1:{port}", TransportLimits())
        _, packed, payload = make_frame()
        with pytest.raises(DeadlineExceeded):
            await sender.send(packed, payload, 0.2)
        assert sender.inflight_bytes == len(payload)
        async with asyncio.timeout(SECONDS):
            identity, number, *_ = await peer.recv_multipart()
            await peer.send_multipart([identity, number, b"ok"])
            while sender.inflight_bytes:
                await asyncio.sleep(0.005)
        await sender.close()


async def test_a_peer_that_falls_silent_is_noticed_by_its_heartbeat(private_directory: str):
    """Half-open connection: nothing is closed, nothing arrives. Noticed long before the deadline."""
    receiver = ZmqReceiver("tcp://127.0.0.1:0", TransportLimits())
    async with relayed(await receiver.start(MemorySink()), private_directory) as (relay, endpoint):
        sender = ZmqSender(endpoint.address, TransportLimits())
        _, packed, payload = make_frame()
        await sender.send(packed, payload, SECONDS)
        relay.pause()
        with pytest.raises(TransportFailed):
            await sender.send(packed, payload, 60.0)
        await sender.close()
    await receiver.close()


async def test_a_failing_sink_hangs_up_and_says_so(caplog: pytest.LogCaptureFixture):
    sink = MemorySink(crash_on=(7).to_bytes(16, "big"))
    receiver = ZmqReceiver("tcp://127.0.0.1:0", TransportLimits())
    sender = ZmqSender((await receiver.start(sink)).address, TransportLimits())
    _, packed, payload = make_frame(number=7)
    with caplog.at_level(logging.ERROR), pytest.raises(TransportFailed):
        await sender.send(packed, payload, SECONDS)
    assert "a bug in the sink" in caplog.text
    await sender.close()
    await receiver.close()


async def test_a_flood_of_frames_leaves_the_loop_to_others():
    """The receiver's awaits do not suspend while messages wait; it must give way by itself."""
    sink = MemorySink()
    receiver = ZmqReceiver("tcp://127.0.0.1:0", TransportLimits())
    endpoint = await receiver.start(sink)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    num_frames = 200
    async with RawPeer(zmq.DEALER) as peer:
        peer.connect(endpoint.address)
        frames = [make_frame(number=number) for number in range(num_frames)]
        for number, (_, packed, payload) in enumerate(frames):
            await peer.send_multipart([struct.pack("<Q", number), packed, payload])
        other = asyncio.create_task(count_turns())
        async with asyncio.timeout(SECONDS):
            while len(sink.ready) < num_frames:
                await peer.recv_multipart()
        assert turns >= num_frames // 2
        other.cancel()
        await asyncio.wait({other})
    await receiver.close()


async def test_a_host_name_can_be_listened_on():
    receiver = ZmqReceiver("tcp://localhost:0", TransportLimits())
    endpoint = await receiver.start(MemorySink())
    sender = ZmqSender(endpoint.address, TransportLimits())
    _, packed, payload = make_frame()
    await sender.send(packed, payload, SECONDS)
    await sender.close()
    await receiver.close()


async def test_more_frames_in_flight_than_the_high_water_mark_allows_is_a_config_error():
    with pytest.raises(ConfigError, match="max_inflight_frames"):
        ZmqSender("tcp://127.0.0.1:1", TransportLimits(max_inflight_frames=1000))
