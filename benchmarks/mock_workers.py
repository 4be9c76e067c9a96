"""A vision and a language server that do nothing, for measuring the router alone. A process of its own.

    python -m benchmarks.mock_workers

Real gRPC at one address. The language server admits at once, needs no features, and says ``max_tokens`` tokens without
a pause. Prints its address when it listens; ends with its standard input.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, Final

import uvloop

from common.service.rpc import bind, make_server
from protos.language_pb2 import Admitted, Finished, GenerateEvent, GenerateRequest, Token, Usage
from protos.language_pb2_grpc import LanguageServicer, add_LanguageServicer_to_server
from protos.status_pb2 import (
    WORKER_STATE_READY,
    LanguageLoad,
    ModelInfo,
    VisionLoad,
    WorkerStatus,
)
from protos.vision_pb2_grpc import VisionServicer, add_VisionServicer_to_server

_MODEL: Final = ModelInfo(
    model="mock",
    max_model_len=2**17,
    image_size=448,
    tokens_per_tile=256,
    min_dynamic_patch=1,
    max_dynamic_patch=12,
    use_thumbnail=True,
    dynamic_image_size=True,
    vocab_size=1000,
    default_temperature=1.0,
    default_top_p=1.0,
    default_repetition_penalty=1.0,
)
_STATUS_SECONDS: Final = 1.0
_PLACES: Final = 2**16
"""More than any load here needs: nothing is refused."""
TEXT: Final = " token"
_TOKEN: Final = GenerateEvent(token=Token(token_id=1, text=TEXT))


class MockLanguage(LanguageServicer):
    """Has read every prompt and seen every image before."""

    async def Generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateEvent]:
        num_tokens = request.sampling.max_tokens
        yield GenerateEvent(admitted=Admitted(num_prompt_tokens=1))
        for _ in range(num_tokens):
            yield _TOKEN
        usage = Usage(prompt_tokens=1, completion_tokens=num_tokens)
        yield GenerateEvent(finished=Finished(finish_reason="length", usage=usage))

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[WorkerStatus]:
        async for status in _statuses("mock-language"):
            status.language.CopyFrom(LanguageLoad(max_num_waiting=_PLACES))
            yield status


class MockVision(VisionServicer):
    """Is there, as a router asks for; nobody gives it work."""

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[WorkerStatus]:
        async for status in _statuses("mock-vision"):
            status.vision.CopyFrom(VisionLoad(max_queued_tiles=_PLACES, max_batch_tiles=_PLACES))
            yield status


async def _statuses(name: str) -> AsyncIterator[WorkerStatus]:
    for progress in count(1):
        yield WorkerStatus(
            name=name,
            state=WORKER_STATE_READY,
            progress=progress,
            incarnation=bytes(16),
            fingerprint=bytes(16),
            model=_MODEL,
        )
        await asyncio.sleep(_STATUS_SECONDS)


async def serve() -> None:
    """Until the standard input ends: whoever started this has gone."""
    server = make_server()
    add_LanguageServicer_to_server(MockLanguage(), server)  # type: ignore[no-untyped-call]
    add_VisionServicer_to_server(MockVision(), server)  # type: ignore[no-untyped-call]
    address = bind(server, "127.0.0.1:0")
    await server.start()
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
