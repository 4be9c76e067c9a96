"""uvicorn's HTTP/1.1 with bounds where it has none: the time and memory that headers may take before anything is asked.

What is not HTTP, or not in time, has the same answer as every other error. Knows nothing of routes.
"""

import asyncio
import secrets
from typing import ClassVar, Final

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from common.service import metrics
from common.service.errors import DvdError, HeadersTooLarge, InvalidRequest, RequestReadTimeout, to_http
from router.settings import RouterSettings

_RAW_SHARE: Final = 2
"""What has come before headers end: their names and values, and the request line and whatever stands between them."""


class HttpProtocol(HttpToolsProtocol):
    """One connection. Use what ``within`` returns."""

    max_raw_bytes: ClassVar[int]
    header_seconds: ClassVar[float]

    _deadline: asyncio.TimerHandle | None = None  # while headers are awaited, or the end of a body nobody reads
    _num_raw_bytes = 0  # of the headers under way
    _has_begun = False  # something of the next message has come
    _has_headers = False  # ... all its headers

    @classmethod
    def within(cls, settings: RouterSettings) -> type["HttpProtocol"]:
        """The protocol with these bounds."""
        bounds = {
            "max_raw_bytes": _RAW_SHARE * settings.max_header_bytes,
            "header_seconds": settings.header_read_timeout,
        }
        return type("BoundedHttpProtocol", (cls,), bounds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._has_headers:
            self._await_headers()
            self._has_begun = True
            self._num_raw_bytes += len(data)
        super().data_received(data)
        if not self._has_headers and self._num_raw_bytes > self.max_raw_bytes:
            self._refuse(HeadersTooLarge("the headers are too large"))

    def on_message_begin(self) -> None:
        self._await_headers()
        self._has_begun = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_headers:  # else a trailer: nobody reads those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._has_headers = True
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._has_headers:  # a refused body may go on for a while, so that its sender reads why, and not for ever
            self._await_headers()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._has_begun = self._has_headers = False
        self._num_raw_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("the request is not valid HTTP"))

    def _await_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self._is_answering():  # a client may begin its next request meanwhile
            self._await_headers()
        elif self._has_begun and not self._has_headers:
            self._refuse(RequestReadTimeout("the headers took too long to arrive"))
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_in_its_body(self) -> bool:
        """Whether the request that is being answered has not ended, and no answer begun."""
        return self._has_headers and self._is_answering() and not self.pipeline and not self.cycle.response_started

    def _refuse(self, error: DvdError) -> None:
        """Answer and hang up. In the middle of another answer there is no place for this one."""
        self._stop_waiting()
        if self._is_in_its_body():
            # The endpoint, which waits for more of it, hears that its client has left.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif self._is_answering():
            return self.transport.close()
        if not self.transport.is_closing():
            metrics.HTTP_REQUESTS.labels("other", "other", error.http_status).inc()
            self.transport.write(_response(error))
        self.transport.close()


def _response(error: DvdError) -> bytes:
    status, content, headers = to_http(error)
    body = msgspec.json.encode(content)
    headers |= {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": f"req-{secrets.token_hex(16)}",
        "connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[status] + lines.encode("ascii") + b"\r\n" + body
