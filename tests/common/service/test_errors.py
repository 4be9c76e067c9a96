"""Our errors survive the way over gRPC, and reach a client in OpenAI's shape."""

import grpc
import pytest

from common.service import errors
from common.service.errors import DvdError, StartupError, to_http
from common.service.rpc import bind, make_channel, make_server
from protos import status_pb2, vision_pb2, vision_pb2_grpc


def subclasses(kind: type[DvdError]) -> list[type[DvdError]]:
    """Those of the tree; what a program makes of them for itself does not travel."""
    ours = [child for child in kind.__subclasses__() if child.__module__ == DvdError.__module__]
    return [kind, *(leaf for child in ours for leaf in subclasses(child))]


WIRE_ERRORS = [kind for kind in subclasses(DvdError) if not issubclass(kind, StartupError) and kind is not DvdError]


class Raising(vision_pb2_grpc.VisionServicer):
    """A vision server that fails as it is told, in both kinds of call."""

    error: Exception

    async def Encode(self, request, context):
        raise self.error

    async def WatchStatus(self, request, context):
        yield status_pb2.WorkerStatus(name="first")
        raise self.error


@pytest.fixture
async def server():
    servicer = Raising()
    server = make_server()
    vision_pb2_grpc.add_VisionServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    channel = make_channel(address)
    yield servicer, vision_pb2_grpc.VisionStub(channel)
    await channel.close()
    await server.stop(None)


async def raised_by_unary(stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Encode(vision_pb2.EncodeRequest(), timeout=10)
    return errors.from_grpc(caught.value)


@pytest.mark.parametrize("kind", WIRE_ERRORS, ids=lambda kind: kind.__name__)
async def test_every_error_keeps_its_meaning_over_the_wire(server, kind):
    servicer, stub = server
    servicer.error = kind("said so", code="some_code", param="messages[0]")
    error = await raised_by_unary(stub)
    assert (error.message, error.code, error.param) == ("said so", "some_code", "messages[0]")
    assert error.grpc_status == kind.grpc_status
    servicer.error = kind("said so", param="a\nb\x00\u05d0")  # gRPC would say INTERNAL instead of it
    assert (await raised_by_unary(stub)).param == "a?b??"
    assert error.type == kind.type
    assert error.should_retry == kind.should_retry


async def test_an_error_after_the_first_message_of_a_stream(server):
    servicer, stub = server
    servicer.error = errors.Overloaded("full")
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for status in stub.WatchStatus(status_pb2.WatchStatusRequest(), timeout=10):
            received.append(status.name)
    assert received == ["first"]
    assert isinstance(errors.from_grpc(caught.value), errors.Overloaded)


async def test_the_unexpected_is_logged_once_and_tells_a_stranger_nothing(server, caplog):
    servicer, stub = server
    servicer.error = ValueError("secret at /etc/passwd")
    error = await raised_by_unary(stub)
    assert isinstance(error, errors.InternalError)
    assert "secret" not in error.message
    assert sum("secret" in (record.exc_text or "") or bool(record.exc_info) for record in caplog.records) == 1


async def test_our_error_inside_a_task_group_is_found(server):
    servicer, stub = server
    servicer.error = ExceptionGroup("tasks", [ValueError("x"), errors.InvalidRequest("bad", code="invalid_image")])
    assert (await raised_by_unary(stub)).code == "invalid_image"


async def test_a_peer_that_is_not_there_is_unavailable():
    async with make_channel("127.0.0.1:1") as channel:
        error = await raised_by_unary(vision_pb2_grpc.VisionStub(channel))
    assert isinstance(error, errors.Unavailable)
    assert "127.0.0.1" not in error.message


@pytest.mark.parametrize("kind", WIRE_ERRORS, ids=lambda kind: kind.__name__)
def test_http_shape(kind):
    status, body, headers = to_http(kind("m" * 600, param="p"))
    assert status == kind.http_status
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) == 512
    assert headers["x-should-retry"] == ("true" if kind.should_retry else "false")
    assert ("retry-after" in headers) == kind.should_retry
