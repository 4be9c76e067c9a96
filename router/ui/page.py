"""The playground: one page, its style and its scripts, as files that are the same for everybody and hold no secrets.

Nothing comes from elsewhere and nothing is written into the page, so that its policy can be the strictest there is.
"""

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Final

from starlette.types import Receive, Scope, Send

from common.service.errors import NotFound
from router.api.exchange import Exchange

_PREFIX: Final = "/ui/"
_INDEX: Final = "index.html"
_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)
_HEADERS: Final = {
    "cache-control": "no-cache",  # ask again each time; the answer is mostly that nothing has changed
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Playground:
    """Answers ``/`` and ``/ui/{name}``. No path is made of what a request says: what is here was read at the start."""

    def __init__(self) -> None:
        folder = files("router.ui") / "static"
        contents = {file.name: file.read_bytes() for file in folder.iterdir() if _type_of(file.name)}
        self._files = {f"{_PREFIX}{name}": _File(name, content) for name, content in contents.items()}
        self._files["/"] = self._files.pop(f"{_PREFIX}{_INDEX}")

    @property
    def paths(self) -> frozenset[str]:
        """All that is answered."""
        return frozenset(self._files)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises NotFound."""
        exchange = Exchange.of(scope)
        file = self._files.get(exchange.path)
        if file is None:
            raise NotFound("no such route")
        await file.answer(exchange)


class _File:
    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._headers: Mapping[str, str] = {**_HEADERS, "content-type": _type_of(name), "etag": self._etag}

    async def answer(self, exchange: Exchange) -> None:
        known = exchange.headers.get("if-none-match", "")
        if self._etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            # Not ``respond``: a length would be that of the file.
            raw = [(name.encode(), value.encode()) for name, value in {**_HEADERS, "etag": self._etag}.items()]
            await exchange.send({"type": "http.response.start", "status": 304, "headers": raw})
            await exchange.send({"type": "http.response.body", "body": b""})
        else:
            await exchange.respond(200, self._content, self._headers)


def _type_of(name: str) -> str:
    """Empty for what is no part of the page."""
    return _TYPES.get(name.rpartition(".")[2], "")
