"""What schemathesis asks of every answer beside its own checks; ``SCHEMATHESIS_HOOKS`` names this module to it."""

import json
import re
import socket
from typing import Any

import schemathesis

MAX_ERROR_CHARS = 512
ERROR_KEYS = {"message", "type", "param", "code"}
SECRETS = re.compile(
    rf"0x[0-9a-f]{{4}}|Traceback|/(tmp|home|usr|work|root|proc|etc)/|\.py\b|<_io|{re.escape(socket.gethostname())}|127\.0\.0\.1"
)
"""Of this machine and of us; only what was sent may hold any of it."""
SAID_BY_TYPES = re.compile(r"Expected `|Object missing|Object contains|Invalid enum value|Invalid value")
NO_INTEGER_HERE = re.compile(r"Expected `int[^`]*`, got `float`")
"""JSON Schema says that 1.0 is one."""


def failed(what: str, shown: object) -> AssertionError:
    return AssertionError(f"{what}: {str(shown)[:500]}")


@schemathesis.check
def errors_tell_no_secrets(ctx: Any, response: Any, case: Any) -> None:
    if response.status_code < 400 or not response.content:
        return
    error = json.loads(response.content)["error"]
    if error.keys() != ERROR_KEYS or len(error["message"]) > MAX_ERROR_CHARS:
        raise failed("Not the shape of an error", error)
    asked = f"{response.request.url} {response.request.body!r} {response.request.headers}"
    for secret in SECRETS.finditer(json.dumps(error)):
        if secret[0] not in asked:
            raise failed("An error tells of this machine", error)
    for name in ("x-request-id", "x-should-retry"):
        if name not in response.headers:
            raise failed(f"An error without {name}", response.headers)


@schemathesis.check
def the_schema_says_what_is_read(ctx: Any, response: Any, case: Any) -> None:
    """A request that fits the schema may be refused for its meaning, but not by the types that read it."""
    is_good = case.meta is not None and case.meta.generation.mode.is_positive
    if is_good and response.status_code == 400:
        message = json.loads(response.content)["error"]["message"]
        if SAID_BY_TYPES.search(message) and not NO_INTEGER_HERE.search(message):
            raise failed("The schema allows what the types refuse", message)


@schemathesis.check
def streams_are_events(ctx: Any, response: Any, case: Any) -> None:
    """Each is JSON of the right kind, an error says so, and ``[DONE]`` is the last."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    *events, rest = response.content.decode().split("\n\n")
    if rest or events[-1] != "data: [DONE]":
        raise failed("A stream without an end", response.content[-200:])
    for event in events[:-1]:
        is_error = event.startswith("event: error\n")
        data = json.loads(event.removeprefix("event: error\n").removeprefix("data: "))
        if is_error:
            raise failed("A stream ends in an error", data)
        if not {"id", "object", "created", "model", "choices"} <= data.keys():
            raise failed("Not the shape of a chunk", data)
