"""The pool: one sender per address, the next endpoint when one fails, nothing open that is not needed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from common.service import metrics
from common.service.errors import ConfigError, DeadlineExceeded, TransportFailed
from common.transport.base import FeatureReceiver
from common.transport.grpc import GrpcReceiver
from common.transport.registry import make_receiver
from common.transport.select import SenderPool
from common.transport.sender import TransportLimits
from common.transport.zmq import ZmqReceiver
from protos.frame import FrameRejected
from protos.status_pb2 import Endpoint
from tests.common.transport.fakes import MIB, MIB_TOKENS, MemorySink, key, make_frame, relayed

SECONDS = 20.0


@dataclass
class Peer:
    """A language server's side: a receiver per transport, one sink."""

    sink: MemorySink = field(default_factory=MemorySink)
    receivers: dict[str, FeatureReceiver] = field(default_factory=dict)
    endpoints: list[Endpoint] = field(default_factory=list)

    async def listen(self, transport: str, listen: str = "127.0.0.1:0") -> Endpoint:
        receiver = self.receivers[transport] = make_receiver(transport, listen)
        self.endpoints.append(await receiver.start(self.sink))
        return self.endpoints[-1]

    async def close(self) -> None:
        for receiver in self.receivers.values():
            await receiver.close()


@pytest.fixture
async def peer(clean_loop: None) -> AsyncIterator[Peer]:
    peer = Peer()
    await peer.listen("zmq")
    await peer.listen("grpc")
    yield peer
    await peer.close()


@contextlib.asynccontextmanager
async def pool_of(**options) -> AsyncIterator[SenderPool]:
    pool = SenderPool(**options)
    try:
        yield pool
    finally:
        await pool.close()


async def start_at(address: str, sink: MemorySink) -> ZmqReceiver:
    """ZeroMQ frees a port some time after the close."""
    async with asyncio.timeout(SECONDS):
        while True:
            receiver = ZmqReceiver(address, TransportLimits())
            try:
                await receiver.start(sink)
                return receiver
            except ConfigError:
                await asyncio.sleep(0.01)


def count(family, *labels: str) -> float:
    return float(family.labels(*labels)._value.get())


async def test_the_receivers_first_choice_is_taken_and_its_connection_kept(peer: Peer):
    async with pool_of() as pool:
        for number in range(4):
            _, packed, payload = make_frame(number=number)
            assert await pool.send(peer.endpoints, packed, payload, SECONDS) == "zmq"
        assert await pool.send(peer.endpoints[::-1], packed, payload, SECONDS) == "grpc"
        assert len(pool) == 2
    assert len(peer.sink.ready) == 4


async def test_transports_that_are_not_allowed_are_passed_over(peer: Peer):
    _, packed, payload = make_frame()
    async with pool_of(transports=("grpc",)) as pool:
        assert await pool.send(peer.endpoints, packed, payload, SECONDS) == "grpc"
        with pytest.raises(TransportFailed, match="in common"):
            await pool.send(peer.endpoints[:1], packed, payload, SECONDS)
        with pytest.raises(TransportFailed, match="in common"):
            await pool.send([Endpoint(transport="pigeon", address="x")], packed, payload, SECONDS)
        with pytest.raises(TransportFailed, match="in common"):
            await pool.send([], packed, payload, SECONDS)


async def test_a_dead_endpoint_is_replaced_by_the_next_and_tried_last_for_a_while(peer: Peer):
    fallbacks = count(metrics.TRANSFER_FALLBACKS, "grpc")
    await peer.receivers["zmq"].close()
    async with pool_of() as pool:
        for number in range(3):
            _, packed, payload = make_frame(number=number)
            assert await pool.send(peer.endpoints, packed, payload, SECONDS) == "grpc"
    assert len(peer.sink.ready) == 3
    assert count(metrics.TRANSFER_FALLBACKS, "grpc") == fallbacks + 1


async def test_a_transport_that_dies_under_load_loses_no_frame(peer: Peer, private_directory: str):
    zmq_endpoint, grpc_endpoint = peer.endpoints
    async with relayed(zmq_endpoint, private_directory) as (relay, endpoint), pool_of() as pool:
        frames = [make_frame(number=number, num_tokens=1024) for number in range(60)]
        _, packed, payload = frames[0]
        assert await pool.send([endpoint, grpc_endpoint], packed, payload, SECONDS) == "zmq"
        relay.pause()
        sends = [
            asyncio.create_task(pool.send([endpoint, grpc_endpoint], packed, payload, SECONDS))
            for _, packed, payload in frames
        ]
        await asyncio.sleep(0.05)
        await relay.close()
        assert set(await asyncio.gather(*sends)) == {"grpc"}
    assert len(peer.sink.ready) == 60


async def test_shared_memory_that_breaks_in_flight_loses_no_frame_and_is_used_again(private_directory: str):
    """Frames under way when the socket of ``shm`` is cut arrive by the next transport; later ones by ``shm`` again."""
    peer = Peer()
    shm_endpoint = await peer.listen("shm")
    others = [await peer.listen(transport) for transport in ("tcp", "zmq")]
    async with relayed(shm_endpoint, private_directory) as (relay, endpoint), pool_of(retry_seconds=0.5) as pool:
        endpoints = [endpoint, *others]
        frames = [make_frame(number=number, num_tokens=4 * MIB_TOKENS) for number in range(20)]
        _, packed, payload = frames[0]
        assert await pool.send(endpoints, packed, payload, SECONDS) == "shm"
        relay.cut_after(20 * MIB)
        sends = [pool.send(endpoints, packed, payload, SECONDS) for _, packed, payload in frames]
        carried_by = await asyncio.gather(*sends)
        assert set(carried_by) <= {"shm", "tcp"} and "tcp" in carried_by
        assert peer.sink.ready == {key(header): payload for header, _, payload in frames}

        async with asyncio.timeout(SECONDS):
            number = 100
            while await pool.send(endpoints, *make_frame(number=number)[1:], SECONDS) != "shm":
                number += 1
                await asyncio.sleep(0.05)
    await peer.close()


async def test_an_endpoint_on_another_host_is_passed_over_at_once(peer: Peer):
    elsewhere = Endpoint(transport="shm", address="shm://5203e9dd-0000-4e54-828e-e863d651ae31.4026531833/dvd-1")
    fallbacks = count(metrics.TRANSFER_FALLBACKS, "zmq")
    async with pool_of() as pool:
        _, packed, payload = make_frame()
        assert await pool.send([elsewhere, *peer.endpoints], packed, payload, SECONDS) == "zmq"
        assert len(pool) == 1
    assert count(metrics.TRANSFER_FALLBACKS, "zmq") == fallbacks


async def test_a_peer_that_returns_at_its_address_is_used_again(peer: Peer):
    address = peer.endpoints[0].address
    async with pool_of() as pool:
        _, packed, payload = make_frame(number=1)
        await pool.send(peer.endpoints[:1], packed, payload, SECONDS)
        await peer.receivers["zmq"].close()
        with pytest.raises(TransportFailed):
            await pool.send(peer.endpoints[:1], packed, payload, SECONDS)
        peer.receivers["zmq"] = await start_at(address, peer.sink)
        _, packed, payload = make_frame(number=2)
        assert await pool.send(peer.endpoints[:1], packed, payload, SECONDS) == "zmq"
        assert await pool.send(peer.endpoints, packed, payload, SECONDS) == "zmq"  # the failure is forgotten
    assert len(peer.sink.ready) == 2


async def test_a_connection_that_broke_while_idle_is_made_again_without_a_failed_send(private_directory: str):
    """A language server that restarted is not a failure of the frame that meets it next."""
    peer = Peer()
    target = await peer.listen("zmq")
    reconnects = count(metrics.TRANSFER_RECONNECTS, "zmq", "send")
    async with pool_of() as pool:
        async with relayed(target, private_directory) as (_, endpoint):
            _, packed, payload = make_frame(number=1)
            await pool.send([endpoint], packed, payload, SECONDS)
            entry = next(iter(pool._entries.values()))
        async with asyncio.timeout(SECONDS):
            while not entry.sender.is_broken:
                await asyncio.sleep(0.005)
        with pytest.raises(TransportFailed):
            await pool.send([endpoint], packed, payload, SECONDS)  # tried anew, and really refused
        assert count(metrics.TRANSFER_RECONNECTS, "zmq", "send") == reconnects + 1
    await peer.close()


async def test_rejections_and_deadlines_are_not_reasons_to_fall_back(peer: Peer, private_directory: str):
    _, packed, payload = make_frame(ticket=b"x" * 32)
    async with pool_of() as pool:
        with pytest.raises(FrameRejected, match="ticket"):
            await pool.send(peer.endpoints, packed, payload, SECONDS)
        assert peer.sink.num_placed == 1
        async with relayed(peer.endpoints[0], private_directory) as (relay, endpoint):
            relay.pause()
            with pytest.raises(DeadlineExceeded):
                await pool.send([endpoint, peer.endpoints[1]], packed, payload, 0.1)
    assert peer.sink.num_placed == 1


async def test_the_longest_unused_sender_gives_way_but_never_one_that_is_sending(private_directory: str):
    peers = [Peer() for _ in range(4)]
    for peer in peers:
        await peer.listen("zmq")
    async with relayed(peers[0].endpoints[0], private_directory) as (relay, endpoint), pool_of(max_senders=2) as pool:
        _, packed, payload = make_frame(number=1)
        await pool.send([endpoint], packed, payload, SECONDS)
        relay.pause()
        _, packed, payload = make_frame(number=2)
        busy = asyncio.create_task(pool.send([endpoint], packed, payload, SECONDS))
        await asyncio.sleep(0)
        for other in peers[1:]:
            await pool.send(other.endpoints, packed, payload, SECONDS)
            assert len(pool) == 2
        relay.resume()
        assert await busy == "zmq"
        assert relay.num_connections == 1
    for peer in peers:
        await peer.close()


async def test_a_sender_just_used_stays(private_directory: str):
    peers = [Peer() for _ in range(3)]
    for peer in peers:
        await peer.listen("grpc")
    async with relayed(peers[0].endpoints[0], private_directory) as (relay, endpoint), pool_of(max_senders=2) as pool:
        _, packed, payload = make_frame()
        for to in ([endpoint], peers[1].endpoints, [endpoint], peers[2].endpoints, [endpoint]):
            await pool.send(to, packed, payload, SECONDS)
        assert relay.num_connections == 1
    for peer in peers:
        await peer.close()


async def test_idle_senders_are_closed(peer: Peer):
    _, packed, payload = make_frame()
    async with pool_of(idle_seconds=0.0) as pool:
        await pool.send(peer.endpoints[:1], packed, payload, SECONDS)
        await asyncio.sleep(0.01)
        await pool.send(peer.endpoints[1:], packed, payload, SECONDS)
        assert len(pool) == 1


async def test_closing_a_pool_fails_what_it_is_sending(peer: Peer, private_directory: str):
    async with relayed(peer.endpoints[0], private_directory) as (relay, endpoint):
        pool = SenderPool()
        _, packed, payload = make_frame()
        await pool.send([endpoint], packed, payload, SECONDS)
        relay.pause()
        send = asyncio.create_task(pool.send([endpoint, *peer.endpoints], packed, payload, SECONDS))
        await asyncio.sleep(0.01)
        await pool.close()
        with pytest.raises(TransportFailed, match="closed"):
            await send
        assert len(pool) == 0


async def test_an_empty_pool_closes(clean_loop: None):
    pool = SenderPool()
    await pool.close()
    with pytest.raises(TransportFailed):
        await pool.send([Endpoint(transport="zmq", address="tcp://127.0.0.1:1")], b"", b"", SECONDS)


@pytest.mark.parametrize("transports", [(), ("zmq", "pigeon")])
def test_unknown_transports_are_a_config_error(transports):
    with pytest.raises(ConfigError, match="zmq, grpc"):
        SenderPool(transports=transports)


def test_receivers_are_made_by_name(private_directory: str):
    assert isinstance(make_receiver("zmq", "127.0.0.1:0"), ZmqReceiver)
    assert isinstance(make_receiver("grpc", f"unix-dir:{private_directory}"), GrpcReceiver)
    with pytest.raises(ConfigError, match="pigeon"):
        make_receiver("pigeon", "127.0.0.1:0")
