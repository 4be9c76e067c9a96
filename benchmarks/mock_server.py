"""A server of the chat API that does nothing but stream, for measuring the client alone. A process of its own.

    python -m benchmarks.mock_server --tokens-per-second 20

One asyncio protocol, no framework: it must cost less than what it measures. Every stream sends a token at its own
steady pace, and at its end says when it sent each of them (``metrics``, seconds of the monotonic clock), so that the
lateness of a client on the same machine is known exactly. Prints its address when it listens; ends with its standard
input.
"""

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Sequence
from typing import Final, cast

import msgspec
import uvloop

_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_MODELS: Final = b'{"object":"list","data":[{"id":"mock","object":"model"}]}'
_ENVELOPE: Final = '"id":"chatcmpl-mock","object":"chat.completion.chunk","created":0,"model":"mock"'
_DEFAULT_TOKENS: Final = 16


class _Wanted(msgspec.Struct):
    max_tokens: int = _DEFAULT_TOKENS


_wanted = msgspec.json.Decoder(_Wanted)


def _event(payload: str) -> bytes:
    """One server-sent event as one chunk of the body."""
    data = f"data: {payload}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunk(delta: str, finish_reason: str = "null") -> bytes:
    return _event(f'{{{_ENVELOPE},"choices":[{{"index":0,"delta":{delta},"finish_reason":{finish_reason}}}]}}')


_ROLE: Final = _chunk('{"role":"assistant","content":""}')
_TOKEN: Final = _chunk('{"content":" token"}')
_FINISH: Final = _chunk("{}", '"length"')


class MockServer(asyncio.Protocol):
    """One connection: answers its requests one by one."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._sent: list[float] = []
        self._num_tokens = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        num_bytes = int(length[1]) if length else 0
        if not found or len(body) < num_bytes:
            return
        self._received = body[num_bytes:]
        if head.startswith(b"GET"):
            self._write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(_MODELS), _MODELS))
        else:
            self._start(_wanted.decode(body[:num_bytes]).max_tokens)

    def _start(self, num_tokens: int) -> None:
        self._num_tokens, self._sent = num_tokens, []
        self._write(_HEAD + _ROLE)
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick, time.perf_counter())

    def _tick(self, began_at: float) -> None:
        now = time.perf_counter()
        self._sent.append(now)
        self._write(_TOKEN)
        if len(self._sent) == self._num_tokens:
            self._finish()
            return
        # Counted from the beginning: a late token does not delay the next.
        due_at = began_at + self._interval * (len(self._sent) + 1)
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due_at - now), self._tick, began_at)

    def _finish(self) -> None:
        usage = f'"usage":{{"prompt_tokens":1,"completion_tokens":{self._num_tokens}}}'
        metrics = f'"metrics":{{"sent":{msgspec.json.encode(self._sent).decode()}}}'
        self._write(
            _FINISH + _event(f'{{{_ENVELOPE},"choices":[],{usage},{metrics}}}') + _event("[DONE]") + b"0\r\n\r\n"
        )

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(tokens_per_second: float) -> None:
    """Until the standard input ends: whoever started this has gone."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: MockServer(1 / tokens_per_second), "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await loop.run_in_executor(None, sys.stdin.read)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mock_server", description=__doc__)
    parser.add_argument("--tokens-per-second", type=float, default=20.0, help="of each stream")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(parser.parse_args(argv).tokens_per_second))


if __name__ == "__main__":
    main()
