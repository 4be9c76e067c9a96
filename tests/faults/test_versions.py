"""Row 23: neighbours of another build: their messages hold fields that this build does not know."""

import secrets
from typing import TypeVar

from google.protobuf.message import Message

from common.service import rpc
from protos import frame
from protos.language_pb2 import ChatMessage, ContentPart, GenerateRequest, SamplingParams
from protos.language_pb2_grpc import LanguageStub
from protos.status_pb2 import WatchStatusRequest
from protos.vision_pb2_grpc import VisionStub
from tests.faults.load import HANG_SECONDS

MessageT = TypeVar("MessageT", bound=Message)

UNKNOWN_FIELD = bytes.fromhex("c2ee0703616263")  # field 15400, three bytes


def of_a_newer_build(message: MessageT) -> MessageT:
    """The same message with a field nobody here knows."""
    newer = type(message)()
    newer.MergeFromString(message.SerializeToString() + UNKNOWN_FIELD)
    assert newer.SerializeToString().endswith(UNKNOWN_FIELD)
    return newer


def request() -> GenerateRequest:
    sampling = SamplingParams(max_tokens=64, temperature=0, top_p=1, repetition_penalty=1, n=1)
    message = ChatMessage(role="user", parts=[ContentPart(text="Who are you?")])
    return GenerateRequest(request_id=secrets.token_bytes(frame.ID_BYTES), messages=[message], sampling=sampling)


async def answer(system, request: GenerateRequest) -> str:
    channel = rpc.make_channel(system["language-a"].address)
    try:
        events = LanguageStub(channel).Generate(request, timeout=HANG_SECONDS)
        return "".join([event.token.text + event.finished.text async for event in events])
    finally:
        await channel.close()


async def test_row_23_a_newer_router_gets_the_same_answer(system):
    old, new = await answer(system, request()), await answer(system, of_a_newer_build(request()))
    assert old == new != ""


async def test_row_23_a_newer_router_may_watch(system):
    for name, stub in (("language-a", LanguageStub), ("vision-a", VisionStub)):
        channel = rpc.make_channel(system[name].address)
        watching = stub(channel).WatchStatus(of_a_newer_build(WatchStatusRequest(router_id="newer")), timeout=60)
        assert (await watching.read()).name == name
        watching.cancel()
        await channel.close()
