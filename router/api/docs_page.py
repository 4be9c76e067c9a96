"""``GET /docs``: the OpenAPI document as one page without scripts and without anything from elsewhere."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final, Self

import msgspec
from starlette.types import Receive, Scope, Send

from router.api.exchange import Exchange

_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{overflow-x:auto;background:#8881;padding:.5rem}summary{cursor:pointer}code{font-weight:600}"
    ":root{color-scheme:light dark}"
)
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HTML_HEADERS: Final = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


class StaticPage:
    """The same bytes for everybody."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        self._body = body
        self._headers = headers

    @classmethod
    def json(cls, content: Any) -> Self:
        return cls(msgspec.json.encode(content), {"content-type": "application/json"})

    @classmethod
    def html(cls, text: str) -> Self:
        """A page whose only style is the one that ``render`` gives it."""
        return cls(text.encode(), _HTML_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange.of(scope).respond(200, self._body, self._headers)


def render(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    body = "".join([*_routes(document["paths"]), "<h2>Types</h2>", *_schemas(document["components"]["schemas"])])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a></p>{body}</body></html>'
    )


def _routes(paths: Mapping[str, Any]) -> Iterator[str]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            yield _details(f"<code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}", operation)


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield _details(f"<code>{escape(name)}</code> {escape(schema.get('description', ''))}", schema)


def _details(summary: str, content: Any) -> str:
    pretty = msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
    return f"<details><summary>{summary}</summary><pre>{escape(pretty)}</pre></details>"
