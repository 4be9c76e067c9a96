"""What the router is compared with: the same HTTP server program around an application that does nothing.

    python -m benchmarks.bare_app

It reads a body, looks at nothing in it, and streams as many tokens as its query string says, byte for byte in the
events of the router; or, as the least that a router can do, those that a language server says. Prints its address when
it listens; ends with its standard input.
"""

import argparse
import asyncio
import socket
import sys
from typing import Any, Final

import grpc.aio
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.mock_workers import TEXT
from common.service.heap import freeze_heap, keep_freed_memory
from common.service.rpc import make_channel
from protos.language_pb2 import GenerateRequest, SamplingParams
from protos.language_pb2_grpc import LanguageStub
from router.__main__ import HttpServer, http_config
from router.api import sse
from router.settings import RouterSettings

_HEADERS: Final = [(name.encode(), value.encode()) for name, value in sse.HEADERS.items()]
_BACKLOG: Final = 2048


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    envelope = {"id": f"chatcmpl-req-{'0' * 32}", "object": "chat.completion.chunk", "created": 10**9, "model": "mock"}
    return sse.data({**envelope, "choices": [choice]})


_ROLE: Final = _event({"role": "assistant", "content": ""})
_TOKEN: Final = _event({"content": TEXT})
_FINISH: Final = _event({}, "length")


async def bare_app(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application."""
    await _read_body(receive)
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    event = _ROLE + _TOKEN
    for _ in range(int(scope["query_string"])):
        await send({"type": "http.response.body", "body": event, "more_body": True})
        # A token is an event of its own: without this, all of them would leave in one write of the loop.
        await asyncio.sleep(0)
        event = _TOKEN
    await send({"type": "http.response.body", "body": _FINISH, "more_body": True})
    await send({"type": "http.response.body", "body": sse.DONE})


def bare_relay(language: str) -> ASGIApp:
    """The same with an event for each token that the language server at this address says."""
    stub = LanguageStub(make_channel(language))  # type: ignore[no-untyped-call]

    async def relay(scope: Scope, receive: Receive, send: Send) -> None:
        await _read_body(receive)
        call = stub.Generate(GenerateRequest(sampling=SamplingParams(max_tokens=int(scope["query_string"]), n=1)))
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        token = _ROLE + _TOKEN
        while (event := await call.read()) is not grpc.aio.EOF:
            kind = event.WhichOneof("event")
            if kind == "token":
                await send({"type": "http.response.body", "body": token, "more_body": True})
                token = _TOKEN
            elif kind == "finished":
                await send({"type": "http.response.body", "body": _FINISH, "more_body": True})
        await send({"type": "http.response.body", "body": sse.DONE})

    return relay


async def _read_body(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def serve(language: str | None) -> None:
    """Until the standard input ends: whoever started this has gone."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
    listener.setblocking(False)
    settings = RouterSettings.model_validate({"vision": ["127.0.0.1:1"], "language": ["127.0.0.1:1"]})
    http = HttpServer(http_config(bare_relay(language) if language else bare_app, settings))
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    http.should_exit = True
    await serving


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_app", description=__doc__)
    parser.add_argument("--language", help="address of a language server whose tokens are relayed")
    keep_freed_memory()
    freeze_heap()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(parser.parse_args().language))
