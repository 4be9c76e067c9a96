"""What only gRPC can do to us."""

import logging

import pytest

from common.service.errors import TransportFailed
from common.service.keys import Keys
from common.transport.grpc import GrpcReceiver, GrpcSender
from common.transport.sender import TransportLimits
from deploy.keys import main as make_keys
from deploy.settings import KeysSettings
from tests.common.transport.fakes import MemorySink, key, make_frame

SECONDS = 20.0
pytestmark = pytest.mark.usefixtures("clean_loop")


async def test_a_failing_sink_costs_only_its_frame(caplog: pytest.LogCaptureFixture):
    sink = MemorySink(crash_on=(7).to_bytes(16, "big"))
    receiver = GrpcReceiver("127.0.0.1:0", TransportLimits())
    sender = GrpcSender((await receiver.start(sink)).address, TransportLimits())
    _, packed, payload = make_frame(number=7)
    with caplog.at_level(logging.ERROR), pytest.raises(TransportFailed):
        await sender.send(packed, payload, SECONDS)
    assert "a bug in the sink" in caplog.text
    header, packed, payload = make_frame(number=8)
    await sender.send(packed, payload, SECONDS)
    assert set(sink.ready) == {key(header)}
    await sender.close()
    await receiver.close()


async def test_a_failed_call_names_no_address():
    receiver = GrpcReceiver("127.0.0.1:0", TransportLimits())
    endpoint = await receiver.start(MemorySink())
    await receiver.close()
    sender = GrpcSender(endpoint.address, TransportLimits())
    _, packed, payload = make_frame()
    with pytest.raises(TransportFailed) as failure:
        await sender.send(packed, payload, SECONDS)
    assert "127.0.0.1" not in failure.value.message
    await sender.close()


@pytest.mark.parametrize("scheme", ["dns:///", "ipv4:"])
async def test_resolvers_of_grpc_are_not_for_peers_to_choose(scheme: str):
    sink = MemorySink()
    receiver = GrpcReceiver("127.0.0.1:0", TransportLimits())
    sender = GrpcSender(scheme + (await receiver.start(sink)).address, TransportLimits())
    _, packed, payload = make_frame()
    with pytest.raises(TransportFailed, match="not an address"):
        await sender.send(packed, payload, SECONDS)
    assert sink.num_placed == 0
    await sender.close()
    await receiver.close()


async def test_with_keys_features_are_taken_from_vision_servers_only(tmp_path):
    make_keys(KeysSettings.load([]), ["init", str(tmp_path / "keys")])
    sink = MemorySink()
    receiver = GrpcReceiver("127.0.0.1:0", TransportLimits(keys=Keys(tmp_path / "keys", "language")))
    address = (await receiver.start(sink)).address
    header, packed, payload = make_frame()
    for keys in (None, Keys(tmp_path / "keys", "client"), Keys(tmp_path / "keys", "router")):
        stranger = GrpcSender(address, TransportLimits(keys=keys))
        with pytest.raises(TransportFailed):
            await stranger.send(packed, payload, SECONDS)
        await stranger.close()
    assert sink.num_placed == 0
    sender = GrpcSender(address, TransportLimits(keys=Keys(tmp_path / "keys", "vision")))
    await sender.send(packed, payload, SECONDS)
    assert set(sink.ready) == {key(header)}
    await sender.close()
    await receiver.close()
