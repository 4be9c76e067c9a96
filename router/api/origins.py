"""Pages of which other origins a browser lets talk to this router (CORS); of none unless configured.

The rules are starlette's, the answers ours: a refused preflight has the shape of every other error.
"""

import functools
import re
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from common.service.errors import InvalidRequest

_ORIGIN: Final = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#@,]+")
_EXPOSED: Final = ("x-request-id", "x-dvd-ignored", "x-should-retry", "retry-after", "retry-after-ms")


def is_origin(text: str) -> bool:
    """``*``, or scheme, host and port as a browser sends them, without a path."""
    return _ORIGIN.fullmatch(text) is not None


class Origins:
    """Those that are allowed. No cookies are ever asked for: a key stands in a header, which no browser adds itself."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._cors = _make_cors(allowed) if allowed else None

    def wrap(self, scope: Scope, send: Send) -> Send:
        """A ``send`` that tells the browser who may read the answer."""
        if self._cors is None:
            return send
        return functools.partial(self._cors.send, send=send, request_headers=Headers(scope=scope))

    def is_preflight(self, scope: Scope) -> bool:
        """A browser asks before it sends the request itself; it has no key then."""
        if self._cors is None or scope["method"] != "OPTIONS":
            return False
        headers = Headers(scope=scope)
        return "origin" in headers and "access-control-request-method" in headers

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A preflight. Raises InvalidRequest where the request it asks for is not allowed."""
        assert self._cors is not None
        response = self._cors.preflight_response(Headers(scope=scope))
        if response.status_code != 200:
            raise InvalidRequest("this origin or method is not allowed")
        await response(scope, receive, send)


def _make_cors(allowed: Sequence[str]) -> CORSMiddleware:
    # Clients send headers of many names, none of which does anything here without a key.
    return CORSMiddleware(
        _nothing, allow_origins=allowed, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=_EXPOSED
    )


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Nothing is behind it: only its rules are used."""
