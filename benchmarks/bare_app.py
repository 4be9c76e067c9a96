"""What the router is compared with: the same HTTP server program around an application that does nothing.

    python -m benchmarks.bare_app

It reads a body, looks at nothing in it, and streams as many tokens as its query string says, byte for byte in the
events of the router. Prints its address when it listens; ends with its standard input.
"""

import asyncio
import socket
import sys
from typing import Any, Final

import uvloop
from starlette.types import Receive, Scope, Send

from benchmarks.mock_workers import TEXT
from common.service.heap import freeze_heap, keep_freed_memory
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
    pieces = []
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    _body = b"".join(pieces)
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    event = _ROLE + _TOKEN
    for _ in range(int(scope["query_string"])):
        await send({"type": "http.response.body", "body": event, "more_body": True})
        # A token is an event of its own: without this, all of them would leave in one write of the loop.
        await asyncio.sleep(0)
        event = _TOKEN
    await send({"type": "http.response.body", "body": _FINISH, "more_body": True})
    await send({"type": "http.response.body", "body": sse.DONE})


async def serve() -> None:
    """Until the standard input ends: whoever started this has gone."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
    listener.setblocking(False)
    settings = RouterSettings.model_validate({"vision": ["127.0.0.1:1"], "language": ["127.0.0.1:1"]})
    http = HttpServer(http_config(bare_app, settings))
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    http.should_exit = True
    await serving


if __name__ == "__main__":
    keep_freed_memory()
    freeze_heap()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
