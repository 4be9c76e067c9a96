"""One HTTP request and its answer, and the seam where errors become HTTP (API.md sections 4 and 5).

Every response passes through an ``Exchange``: it adds ``X-Request-Id``, knows whether the answer has begun, and
therefore how an error must be told: as a status with a JSON body, or as an ``event: error`` inside a stream.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import Message, Scope, Send

from common.service.errors import (
    Cancelled,
    DvdError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestReadTimeout,
    RequestTooLarge,
    Unavailable,
    to_http,
)
from router.api import sse
from router.quotas import Grant, Meter
from router.record import RequestRecord

log = logging.getLogger(__name__)

_WELL_FORMED_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KEY: Final = "dvd.exchange"


class Exchange:
    """What has been sent to the client so far. Use ``send`` instead of the server's own.

    Args:
        overload_status: of the answer to a request for which there is no room.
    """

    def __init__(self, scope: Scope, send: Send, overload_status: int = Overloaded.http_status) -> None:
        scope[_KEY] = self
        self._send = send
        self._overload_status = overload_status
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = Headers(scope=scope)
        asked = self.headers.get("x-request-id", "")
        self.has_own_id = _WELL_FORMED_ID.fullmatch(asked) is not None
        self.record = RequestRecord(asked if self.has_own_id else f"req-{secrets.token_hex(16)}")
        self.other_records: list[RequestRecord] = []  # of the other prompts, where a request has several
        self.status: int | None = None  # None until the response has begun
        self.code: str | None = None  # of the error the client was told
        self.tenant = ""  # whose API key was used
        self.meter: Meter | None = None  # of a tenant with a quota
        self.grant: Grant | None = None  # once it was let in
        self._is_event_stream = False
        self._is_complete = False

    @classmethod
    def of(cls, scope: Scope) -> "Exchange":
        """The exchange this request belongs to."""
        exchange: Exchange = scope[_KEY]
        return exchange

    async def send(self, message: Message) -> None:
        """Pass on what an endpoint sends."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.record.request_id
            if self.meter is not None:
                headers.update(self.meter.headers(time.monotonic()))
            self.status = message["status"]
            self._is_event_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    def charge(self, num_tokens: int, num_tiles: int) -> None:
        """What the request will cost at most, before a server is asked. Raises RateLimited."""
        if self.grant is not None:
            self.grant.charge(num_tokens, num_tiles, time.monotonic())

    def end_grant(self) -> None:
        """What it has cost is known now; safe to call again."""
        if self.grant is not None:
            records = [self.record, *self.other_records]
            num_tokens = sum(record.usage()["total_tokens"] for record in records)
            is_taken = any(record.admitted_at is not None for record in records)
            self.grant.end(num_tokens, time.monotonic(), is_taken=is_taken)

    async def respond(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a whole response."""
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def respond_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send a JSON response."""
        await self.respond(
            status, msgspec.json.encode(content), {"content-type": "application/json", **(headers or {})}
        )

    async def fail(self, error: Exception) -> None:
        """Tell the client what went wrong, in the way that is still possible."""
        ours = as_dvd_error(error)
        self.code = ours.code
        if isinstance(ours, Cancelled):
            self.status = ours.http_status
            return
        status, body, headers = to_http(ours)
        if ours.code == Overloaded.default_code:  # neither "not_ready" nor "draining"
            status = self._overload_status
        if self.status is None:
            if _must_close(ours):
                headers["connection"] = "close"
            if isinstance(error, HTTPException):
                headers.update(error.headers or {})
            await self.respond_json(body, status, headers)
        elif self._is_event_stream and not self._is_complete:
            await self.send({"type": "http.response.body", "body": sse.error(body) + sse.DONE})


def as_dvd_error(error: Exception) -> DvdError:
    """Any failure of a request as one of ours; the unexpected is logged and becomes ``InternalError``."""
    if isinstance(error, Unavailable):
        return Unavailable(error.message)  # why is not the client's business
    if isinstance(error, DvdError):
        return error
    if isinstance(error, HTTPException):
        return _from_starlette(error)
    log.error("unexpected failure of a request", exc_info=error)
    return InternalError("internal error")


def _from_starlette(error: HTTPException) -> DvdError:
    if error.status_code == 404:
        return NotFound("no such route")
    if error.status_code == 405:
        return MethodNotAllowed("this method is not allowed here")
    return InvalidRequest("the request cannot be read")


def _must_close(error: DvdError) -> bool:
    """Part of the body may be unread, or this router is about to go away."""
    return isinstance(error, RequestTooLarge | RequestReadTimeout) or error.code == "draining"
