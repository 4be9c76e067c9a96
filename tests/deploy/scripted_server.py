"""A chat server that says what a test wrote down, over real HTTP."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ScriptedServer:
    """``replies`` are used up one by one: a list of events is streamed, an (status, body) pair is an error."""

    def __init__(self, replies: Sequence[Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._replies = list(replies)
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, {"data": [{"id": "scripted"}]})

            def do_POST(self) -> None:
                script.keys.append(self.headers.get("authorization"))
                script.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                reply = script._replies.pop(0)
                if isinstance(reply, tuple):
                    self._answer(*reply)
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for event in reply:
                    self.wfile.write(event.encode())

            def _answer(self, status: int, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Nothing: test output is read by people."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator["ScriptedServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def saying(*pieces: str, thinking: Sequence[str] = (), metrics: dict[str, Any] | None = None) -> list[str]:
    """The events of one streamed answer (API.md section 4); ``thinking`` goes before it."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": piece, "reasoning": piece} for piece in thinking]
    deltas += [{"content": piece} for piece in pieces]
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    if metrics is not None:
        chunks.append({"choices": [], "metrics": metrics})
    return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
