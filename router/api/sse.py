"""Server-sent events: the bytes of one event (API.md section 4).

One token is one event: benchmark tools measure the time between events, and merging would hide stalls. Comments are
sent only where the operator wants them, since some of those tools parse every line as JSON.
"""

from typing import Any, Final

import msgspec

DONE: Final = b"data: [DONE]\n\n"
HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
KEEP_ALIVE: Final = b": keep-alive\n\n"
encode: Final = msgspec.json.Encoder().encode


def data(content: Any) -> bytes:
    """An ordinary event."""
    return b"data: " + encode(content) + b"\n\n"


def error(content: Any) -> bytes:
    """An error after the 200. The event's name is what makes every client notice."""
    return b"event: error\n" + data(content)
