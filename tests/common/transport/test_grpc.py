"""What only gRPC can do to us."""

import logging

import pytest

from common.service.errors import TransportFailed
from common.transport.grpc import GrpcReceiver, GrpcSender
from common.transport.sender import TransportLimits
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
